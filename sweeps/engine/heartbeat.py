"""Which process runs a trial, and whether that process is alive.

A worker stores its identity with each trial that it runs, and increments a beat. On the same
machine the identity shows whether the process exists. On another machine only the beat is visible:
a trial is stale when its beat has not changed for a given time of the observer's clock, so clocks
need not agree. Time in which the storage cannot be reached is not counted.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from bn_lightning.sweeps.engine.storage import RetryingStorage
from bn_lightning.sweeps.engine.stored_names import BEAT, WORKER


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told from a later process with the same number.

    Attributes:
        place: host name, boot and PID namespace; equal for processes that see each other's PIDs.
        pid: process number.
        started: start time in the kernel's clock ticks; "unknown" where /proc does not have it.
    """

    place: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.place} {self.pid} {self.started}"

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process on this machine."""
        return cls(_place(), pid, _start_time(pid) or "unknown")

    @classmethod
    def parse(cls, text: str) -> "ProcessIdentity":
        """Return the identity that was stored as `str(identity)`.

        Raises:
            ValueError: the text is not an identity.
        """
        place, pid, started = text.split(" ")
        return cls(place, int(pid), started)

    def is_known_alive(self) -> bool:
        """Return whether the process runs on this machine."""
        return self.place == _place() and self.started == _start_time(self.pid)

    def is_known_dead(self) -> bool:
        """Return whether the process ran on this machine and has ended; False if unknown."""
        if self.place != _place() or self.started == "unknown":
            return False
        return _start_time(self.pid) != self.started


def filler_mark() -> str:
    """Return a unique value of the study attribute FILLER that names this process."""
    return f"{ProcessIdentity.of(os.getpid())} {uuid.uuid4()}"


def filler_process(mark: str) -> ProcessIdentity:
    """Return the process that a `filler_mark` names."""
    return ProcessIdentity.parse(mark.rpartition(" ")[0])


class Heartbeat:
    """Increments the beat of the trials that this process runs, in a separate thread.

    Args:
        storage: of the study. A call that fails is repeated at the next beat.
        interval: seconds between two beats.
    """

    def __init__(self, storage: RetryingStorage, interval: float) -> None:
        self._storage = storage
        self._interval = interval
        self._trials: set[int] = set()
        self._changed = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0

    def add(self, trial_id: int) -> None:
        """Start the beat of a trial.

        Args:
            trial_id: the ID in the storage, which is not the number in the study.
        """
        with self._changed:
            self._trials.add(trial_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
                self._thread.start()

    def remove(self, trial_id: int) -> None:
        """Stop the beat of a trial; do nothing if it was not started."""
        with self._changed:
            self._trials.discard(trial_id)

    def stop(self) -> None:
        """Stop all beats; one that is being written is finished."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beats += 1
            with self._changed:
                trials = sorted(self._trials)
            # The storage may be away, for which the worker waits.
            with suppress(Exception):
                self._storage.together(lambda: self._beat(trials), patience=0)  # noqa: B023

    def _beat(self, trials: list[int]) -> None:
        for trial_id in trials:
            with suppress(UpdateFinishedTrialError):  # it has just ended
                self._storage.inner.set_trial_system_attr(trial_id, BEAT, self._beats)


class _Seen(NamedTuple):
    beat: tuple[object, object]  # worker and count
    at: float  # when the trial was checked last, in seconds of the monotonic clock
    unchanged_for: float  # seconds


class StaleTrialDetector:
    """Finds running trials whose worker is dead.

    Args:
        interval: seconds between two beats of a worker.
        stale_after: seconds without a beat after which a worker counts as dead.
    """

    def __init__(self, interval: float, stale_after: float) -> None:
        self._longest_gap = 2 * interval
        self._stale_after = stale_after
        self._seen: dict[int, _Seen] = {}  # by trial number

    def stale_trials(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return those of the running trials whose worker is dead; call it repeatedly."""
        seen: dict[int, _Seen] = {}
        stale, now = [], time.monotonic()
        for trial in running:
            text = trial.system_attrs.get(WORKER)
            worker = None if text is None else ProcessIdentity.parse(text)
            if worker is not None and worker.is_known_dead():
                stale.append(trial)
                continue
            beat = (text, trial.system_attrs.get(BEAT))
            before = self._seen.get(trial.number, _Seen(beat, now, 0.0))
            gap = min(now - before.at, self._longest_gap)
            unchanged_for = before.unchanged_for + gap if beat == before.beat else 0.0
            seen[trial.number] = _Seen(beat, now, unchanged_for)
            is_alive = worker is not None and worker.is_known_alive()
            if unchanged_for >= self._stale_after and not is_alive:
                stale.append(trial)
        self._seen = seen
        return stale


def _place() -> str:
    # Containers may share the host name or the boot, but never a PID namespace.
    parts = [socket.gethostname().replace(" ", "_")]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "/ns/" in path else Path(path).read_text().strip())
        except OSError:
            parts.append("unknown")
    return "/".join(parts)


def _start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; None if it does not exist."""
    try:
        # The name in parentheses may contain spaces. A zombie has ended.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else fields[18]
