"""Sweeps: the engine, its Hydra plugin, analysis of results, and reports."""
