"""Conversion of any model's BatchNorms to this package's, with fusion and folding."""
