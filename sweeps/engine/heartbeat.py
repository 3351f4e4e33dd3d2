"""Who works on a trial, and whether they still live.

A worker signs the trials it runs, and counts up a beat beside its signature. On one machine a
signature tells whether its process is there. From another machine one sees the beat alone: a trial
is abandoned when its beat has stood still for long enough by the observer's own clock, so that the
clocks of two machines need not agree. Time in which the storage was away does not count: nobody
could beat.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

SIGNATURE = "sweep:worker"
BEAT = "sweep:beat"


@dataclass(frozen=True)
class Signature:
    """A process: `place` is shared by all that see one another's process numbers."""

    place: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.place} {self.pid} {self.started}"

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """Read a signature back from its text.

        Raises:
            ValueError: it is no text of a signature.
        """
        place, pid, started = text.split(" ")
        return cls(place, int(pid), started)


def signature(pid: int | None = None) -> Signature:
    """The signature of a process here, of this one if none is named."""
    pid = os.getpid() if pid is None else pid
    return Signature(_place(), pid, _started(pid) or "unknown")


def is_known_dead(worker: Signature) -> bool:
    """Whether the process ran here and is there no more; False where that cannot be told."""
    if worker.place != _place() or worker.started == "unknown":
        return False
    return _started(worker.pid) != worker.started


class Heartbeat:
    """Beats for the trials that this process runs, in a thread of its own.

    Args:
        storage: of the study; a call that fails is left to the next beat.
        interval: seconds between two beats.
    """

    def __init__(self, storage: BaseStorage, interval: float) -> None:
        self._storage = storage
        self._interval = interval
        self._trials: set[int] = set()
        self._changed = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0

    def add(self, trial_id: int) -> None:
        """Beat for a trial from now on.

        Args:
            trial_id: the storage's own, not the number in the study.
        """
        with self._changed:
            self._trials.add(trial_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
                self._thread.start()

    def remove(self, trial_id: int) -> None:
        """Beat no more for a trial; nothing, if it was never added."""
        with self._changed:
            self._trials.discard(trial_id)

    def stop(self) -> None:
        """Beat no more at all, at the latest after the beat that is under way."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beats += 1
            with self._changed:
                trials = sorted(self._trials)
            for trial_id in trials:
                try:
                    self._storage.set_trial_system_attr(trial_id, BEAT, self._beats)
                except Exception:
                    # The trial has just ended, or the storage is away, which its worker waits for.
                    continue


class DeathWatch:
    """Finds running trials that nobody works on any more.

    Args:
        interval: seconds between two beats of a worker.
        stale_after: seconds without a beat, seen from here, after which a worker is given up.
    """

    def __init__(self, interval: float, stale_after: float) -> None:
        self._longest_gap = 2 * interval
        self._stale_after = stale_after
        # Trial number: its last beat, when it was looked at last, and how long it has stood still.
        self._seen: dict[int, tuple[object, float, float]] = {}

    def abandoned(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the running trials whose worker is dead; call it again and again."""
        seen: dict[int, tuple[object, float, float]] = {}
        dead, now = [], time.monotonic()
        for trial in running:
            signed = trial.system_attrs.get(SIGNATURE)
            if signed is not None and is_known_dead(Signature.parse(signed)):
                dead.append(trial)
                continue
            beat = _beat(trial.system_attrs)
            before, looked_at, still = self._seen.get(trial.number, (beat, now, 0.0))
            still = still + min(now - looked_at, self._longest_gap) if beat == before else 0.0
            seen[trial.number] = (beat, now, still)
            if still >= self._stale_after and not _is_known_alive(signed):
                dead.append(trial)
        self._seen = seen
        return dead


def _is_known_alive(signed: str | None) -> bool:
    if signed is None:
        return False
    worker = Signature.parse(signed)
    return worker.place == _place() and worker.started == _started(worker.pid)


def _beat(attributes: Mapping[str, object]) -> tuple[object, object]:
    return attributes.get(SIGNATURE), attributes.get(BEAT)


def _place() -> str:
    # Containers share a host's name or its boot, never a namespace of process numbers.
    parts = [socket.gethostname().replace(" ", "_")]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "/ns/" in path else Path(path).read_text().strip())
        except OSError:
            parts.append("unknown")
    return "/".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is no such process."""
    try:
        # The name, in parentheses, may hold spaces; a zombie has ended.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else fields[18]
