"""Stop a sweep on a signal: the first Ctrl-C waits for running trials, the second does not."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bn_lightning.sweeps.engine.outcome import Outcome, interrupted


class StopRequest:
    """Whether a sweep was asked to stop.

    The first SIGINT asks the sweep to stop after the running trials. A second SIGINT, and SIGTERM,
    end it immediately: they call the handler that the program had installed.
    """

    def __init__(self) -> None:
        # Plain flags: the interrupted code could hold a lock that a signal handler waits for.
        self._requested = self._is_immediate = False
        self._before: dict[signal.Signals, object] = {}

    def is_set(self) -> bool:
        """Return whether the sweep was asked to stop."""
        return self._requested

    def set(self) -> None:
        """Ask the sweep to stop after the running trials."""
        self._requested = True

    def corrected(self, outcome: Outcome) -> Outcome:
        """Return the outcome of a trial: interrupted if it failed while the sweep was ended.

        Code that the ending passes through may replace its exception by an error: OmegaConf does.
        """
        return interrupted() if self._is_immediate and outcome.state == "FAIL" else outcome

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside the block, if it runs in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, before in self._before.items():
                signal.signal(signum, before)  # type: ignore[arg-type]  # what signal returned

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and not self.is_set():
            self.set()
            os.write(2, b"\nstopping after the running trials; Ctrl-C again stops immediately\n")
            return
        self._requested = self._is_immediate = True
        before = self._before[signal.Signals(signum)]
        if callable(before):
            before(signum, frame)
        # The signal was ignored, or would have ended the process before the study is updated.
        sys.exit(128 + signum)
