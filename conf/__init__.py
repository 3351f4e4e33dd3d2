"""The configurations, composed by Hydra from `pkg://bn_lightning.conf`."""
