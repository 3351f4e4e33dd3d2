"""The claims, one a file. Each file calls `register_claim` once; registry.py finds it."""
