"""From a study or runs to numbers."""
