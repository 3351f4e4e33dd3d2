"""Exceptions for what ends a run from outside: SIGINT, SIGTERM, the end of another rank."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The user or the system asked the process to end.

    Not an `Exception`, as KeyboardInterrupt is none: code that recovers from errors must let it
    through.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class RankLostError(RuntimeError):
    """Another of the processes that train together has ended."""


def raise_interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """Raise `Interrupted`; a signal handler."""
    raise Interrupted(signum)


class LateInterrupt:
    """A signal handler that waits until the state is complete; a second signal is raised at once.

    Attributes:
        signum: of the signal that came, to be raised as `Interrupted`; None for none.
    """

    signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum


def raises_interrupted() -> bool:
    """Return whether a signal would raise `Interrupted` in this thread, as in a command."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) is raise_interrupted


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `handler` for SIGINT and SIGTERM inside the block, which runs in the main thread."""
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
