"""From numbers to figures and a page."""
