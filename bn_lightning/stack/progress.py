"""How far the training of a stack is: a line that is rewritten in a terminal, else one at times."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO

# Seconds between two lines.
IN_TERMINAL, IN_LOG = 0.5, 30.0


class StackProgress:
    """Shows the members that run, the steps per second of all of them together, and the time left.

    Args:
        last_step: of the budget.
        is_live: whether a terminal may have a line that is rewritten; a sweep has a display of its
            own there.
        clock: returns seconds.
        output: where the lines go; standard output by default.
    """

    def __init__(
        self,
        last_step: int,
        *,
        is_live: bool,
        clock: Callable[[], float] = time.monotonic,
        output: TextIO | None = None,
    ) -> None:
        self._last_step = last_step
        self._clock = clock
        self._output = output or sys.stdout
        self._is_live = is_live and self._output.isatty()
        self._interval = IN_TERMINAL if self._is_live else IN_LOG
        self._shown_at = clock()
        self._shown_step = 0
        self._member_steps = 0  # since the last line

    def update(self, step: int, running: int) -> None:
        """Count a step, and show a line if the last one is old.

        Args:
            step: of all members, from 1.
            running: members that took it.
        """
        self._member_steps += running
        now = self._clock()
        seconds = now - self._shown_at
        if seconds < self._interval:
            return
        left = seconds / (step - self._shown_step) * (self._last_step - step)
        text = (
            f"{running} member{'s' * (running != 1)} at step {step:,} of {self._last_step:,}, "
            f"{self._member_steps / seconds:,.0f} steps/s together, "
            f"{timedelta(seconds=round(left))} left"
        )
        self._write(f"\r{text}\x1b[K" if self._is_live else f"{text}\n")
        self._shown_at, self._shown_step, self._member_steps = now, step, 0

    def end(self) -> None:
        """Remove the line of a terminal."""
        if self._is_live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()
