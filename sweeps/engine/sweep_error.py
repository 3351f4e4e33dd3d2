"""The error that ends a sweep."""

from hydra.errors import CompactHydraException


class SweepError(CompactHydraException):
    """Raised if a setting, a study or a storage cannot be used, or if too many trials failed.

    Hydra prints the message without a traceback and exits with code 1.
    """
