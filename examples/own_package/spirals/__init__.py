"""Tell two spirals apart: a package of one's own, whose parts bn_lightning trains and sweeps."""
