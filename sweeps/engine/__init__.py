"""Optuna sweeps for any Hydra program; `hydra_plugins/bn_optuna` connects them to Hydra.

Imports neither torch nor Lightning nor the rest of this project.
"""
