"""What the commands share: Hydra, one-line errors, checks of a configuration, tables."""
