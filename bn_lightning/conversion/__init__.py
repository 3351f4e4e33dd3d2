"""Exchanging the BatchNorms of any model for this project's, fusing and folding them."""
