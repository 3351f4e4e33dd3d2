"""What ends a run from outside, as exceptions: SIGINT and SIGTERM, the end of another rank."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The user or the system asked the process to end.

    Like KeyboardInterrupt it is no `Exception`: code that mends errors must not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class RankLostError(RuntimeError):
    """One of several processes that train together has ended before the others."""


def raise_interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that raises `Interrupted` at once."""
    raise Interrupted(signum)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` answer SIGINT and SIGTERM inside the block (which is in the main thread)."""
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
