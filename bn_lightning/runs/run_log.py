"""The log of a run, `TASK.log`: what happened, a line each, without what the terminal shows.

Hydra gives the logger its file (conf/hydra/job_logging/run.yaml). Without Hydra it writes nothing.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

RUN_LOG = logging.getLogger(__name__)
RUN_LOG.propagate = False
RUN_LOG.addHandler(logging.NullHandler())


class RunLogFile(logging.FileHandler):
    """Appends to a file in UTF-8, and goes on without it when the disk is full or it is gone.

    Args:
        filename: path of the file.
    """

    def __init__(self, filename: str) -> None:
        # Paths may contain bytes that are not UTF-8.
        super().__init__(filename, encoding="utf-8", errors="backslashreplace")

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None:  # closed files are not opened again: the run may be removed
            super().emit(record)

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def detach_file() -> None:
    """Write nothing more into the file of a run that has ended."""
    RUN_LOG.handlers[:] = [logging.NullHandler()]


@contextmanager
def logged_warnings() -> Iterator[None]:
    """Log the warnings that are shown inside the block."""
    show = warnings.showwarning

    def log_and_show(message: Any, category: Any, *place: Any, **given: Any) -> None:
        RUN_LOG.warning("%s: %s", category.__name__, message)
        show(message, category, *place, **given)

    warnings.showwarning = log_and_show
    try:
        yield
    finally:
        warnings.showwarning = show
