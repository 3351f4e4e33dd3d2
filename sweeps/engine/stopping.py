"""Ctrl-C, once and twice."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bn_lightning.sweeps.engine.outcome import Outcome, interrupted


class Stopping:
    """Lets a sweep end in order.

    The first SIGINT asks it to end when the running trials have; another one, and SIGTERM, end it
    at once, by what the program does on that signal.
    """

    def __init__(self) -> None:
        # A plain flag: a lock that the interrupted code holds would never be free in a handler.
        self._requested = self._is_ending = False
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        """Whether the sweep was asked to end."""
        return self._requested

    def request(self) -> None:
        """Ask the sweep to end when the running trials have."""
        self._requested = True

    def excused(self, outcome: Outcome) -> Outcome:
        """The outcome of a trial: interrupted, if it failed when the sweep was ended at once.

        Code that this end passes through may answer it with an error of its own: OmegaConf does, in
        the middle of a list.
        """
        return interrupted() if self._is_ending and outcome.state == "FAIL" else outcome

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Answer SIGINT and SIGTERM inside the block, if it is in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, before in self._before.items():
                signal.signal(signum, before)  # type: ignore[arg-type]  # what signal gave us

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and not self():
            self.request()
            os.write(2, b"\nending when the running trials have; Ctrl-C again ends at once\n")
            return
        self._requested = self._is_ending = True
        before = self._before[signal.Signals(signum)]
        if callable(before):
            before(signum, frame)
        # Ignored, or left to the system, which would end the process without a word to the study.
        sys.exit(128 + signum)
