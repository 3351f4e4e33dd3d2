"""From runs to what one can read off them."""
