"""Compute the numbers of a report from a study or from runs."""
