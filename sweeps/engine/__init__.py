"""Sweeps by Optuna for any Hydra program; hydra_plugins/bn_optuna is the way to it.

Free of torch, of Lightning and of the rest of this project.
"""
