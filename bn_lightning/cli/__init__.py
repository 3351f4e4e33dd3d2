"""What the commands share: Hydra, one-line errors, configuration checks, tables."""
