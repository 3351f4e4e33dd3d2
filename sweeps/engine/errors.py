"""What a sweep says when it cannot go on."""

from hydra.errors import CompactHydraException


class SweepError(CompactHydraException):
    """A setting, a study or a storage cannot be used, or too many trials failed.

    Hydra prints its message without a traceback and exits with code 1.
    """
