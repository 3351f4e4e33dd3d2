"""Worker processes on one machine: the same command again, each of which works on the study.

A worker imports what a trial needs once, and runs one trial after the other. It is in a session of
its own, so that Ctrl-C in the terminal reaches the sweep alone, which tells the workers: its end of
their standard input closed, they stop after the running trial, as they do when the sweep dies.
"""

import os
import signal
import subprocess
import threading
from pathlib import Path

from bn_lightning.sweeps.engine.environment import WORKER
from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.heartbeat import SIGNATURE, signature
from bn_lightning.sweeps.engine.processes import end_session
from bn_lightning.sweeps.engine.program import same_command
from bn_lightning.sweeps.engine.stopping import Stopping
from bn_lightning.sweeps.engine.study import SweepStudy

LOGS = "workers"

# Deaths of workers in a row without a trial that ended: then something else than a trial is wrong.
DEATHS_ALLOWED = 3


class Workers:
    """The worker processes of a sweep.

    Args:
        study: what they work on.
        count: how many.
    """

    def __init__(self, study: SweepStudy, count: int) -> None:
        self._study = study
        self._count = count
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._deaths = 0
        self._ended_before = -1
        self._logs: dict[int, Path] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, at once: its trials are interrupted."""
        if not self._running:
            return
        signatures = {str(signature(pid)) for pid in self._running}
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            end_session(process)
        self._study.refresh()
        for trial in self._study.ledger.running:
            if trial.system_attrs.get(SIGNATURE) in signatures:
                self._study.interrupt(trial.number)

    def look(self, stop: bool) -> bool:
        """See to the workers and the study; to be called again and again.

        Args:
            stop: whether the workers are to end after their running trials.

        Returns:
            Whether there is more to wait for.

        Raises:
            SweepError: worker after worker dies without having ended a trial.
        """
        counts = self._study.refresh()
        self._collect()
        if stop or self._study.ledger.is_over():
            for process in self._running.values():
                if process.stdin is not None:
                    process.stdin.close()
            return bool(self._running)
        self._study.tidy()
        wanted = min(self._count, counts.total - counts.settled)
        while len(self._running) < wanted:
            self._start()
        return True

    def _start(self) -> None:
        logs = self._study.directory / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{len(self._logs)}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                same_command(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, WORKER: str(self._study.directory)},
            )
        self._running[process.pid] = process
        self._logs[process.pid] = log

    def _collect(self) -> None:
        """Forget workers that have ended; trials they left are told by `SweepStudy.tidy`."""
        ended = self._study.ledger.n_ended
        if ended != self._ended_before:
            self._ended_before, self._deaths = ended, 0
        for pid, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[pid]
            if process.returncode:
                self._deaths += 1
            if self._deaths > DEATHS_ALLOWED:
                lines = self._logs[pid].read_text(errors="replace").strip().splitlines()
                raise SweepError(
                    f"{self._deaths} workers in a row ended without having ended a trial, the last "
                    f"with exit code {process.returncode}: {lines[-1] if lines else 'no output'} "
                    f"(more in {self._logs[pid]})"
                )


def stop_when_parent_says(stopping: Stopping) -> None:
    """In a worker: stop after the running trial when standard input is closed."""

    def wait() -> None:
        # Not sys.stdin, whose lock this thread would hold while the interpreter shuts down.
        while os.read(0, 1):
            continue
        stopping.request()

    threading.Thread(target=wait, name="parent", daemon=True).start()
