"""What can be wrong with data on disk, by name."""


class DataError(ValueError):
    """Data that is there but cannot be trusted: truncated, altered, not finite, mislabelled."""


class DataUnavailableError(DataError):
    """Data that is neither there nor to be had by download."""


class DataFallbackWarning(UserWarning):
    """Other data than was asked for is in use."""


class CorruptImageWarning(UserWarning):
    """Images that cannot be read are left out."""
