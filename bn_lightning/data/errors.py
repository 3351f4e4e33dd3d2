"""Errors and warnings about data."""


class DataError(ValueError):
    """The data are truncated, altered, not finite, or mislabelled."""


class DataUnavailableError(DataError):
    """The data are absent and could not be downloaded."""


class DataFallbackWarning(UserWarning):
    """The run uses other data than the configured ones."""


class CorruptImageWarning(UserWarning):
    """Images that cannot be read are skipped."""
