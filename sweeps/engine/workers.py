"""The loop of a worker, and the worker processes of a sweep on one machine.

A worker process runs the command of the sweep again. It imports what trials need once, and runs one
trial after another. It leads its own session, so Ctrl-C in the terminal reaches the main process
only, which closes the standard input of the workers: they stop after their running trial. The same
happens if the main process dies.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bn_lightning.sweeps.engine.claim import ClaimedTrial
from bn_lightning.sweeps.engine.environment import WORKER_VARIABLE
from bn_lightning.sweeps.engine.heartbeat import ProcessIdentity
from bn_lightning.sweeps.engine.outcome import Outcome, interrupted, outcome_of_error
from bn_lightning.sweeps.engine.processes import end_session, same_command
from bn_lightning.sweeps.engine.stop_request import StopRequest
from bn_lightning.sweeps.engine.stored_names import WORKER, WORKER_LOGS
from bn_lightning.sweeps.engine.study import SweepStudy
from bn_lightning.sweeps.engine.sweep_error import SweepError

# Workers that may die in a row while no trial ends; after more, the trials are not the cause.
DEATHS_ALLOWED = 3


def run_trials(
    study: SweepStudy,
    run: Callable[[list[ClaimedTrial]], list[Outcome]],
    stop: StopRequest,
    on_refresh: Callable[[], None] = lambda: None,
    *,
    batch_size: int = 1,
    pause: float = 0.5,
) -> None:
    """Claim, run and finish trials until the sweep is over, is given up, or is asked to stop.

    Args:
        study: whose trials to run.
        run: runs a batch of trials. An `Exception` is the outcome of all of them. Any other
            `BaseException` interrupts them and is raised again.
        stop: checked between two batches.
        on_refresh: called each time the study was read.
        batch_size: most trials in a batch.
        pause: seconds to wait if no trial waits.
    """
    while not (stop.is_set() or study.is_given_up()):
        batch = study.claim(batch_size)
        on_refresh()
        if not batch:
            if study.slots.is_over():
                return
            study.recover()
            if not study.slots.waiting:
                time.sleep(pause)
            continue
        try:
            outcomes = run(batch)
        except Exception as error:
            outcomes = [outcome_of_error(error)] * len(batch)
        except BaseException:
            study.finish({trial.number: interrupted() for trial in batch})
            raise
        ended = zip(batch, outcomes, strict=True)
        study.finish({trial.number: stop.corrected(outcome) for trial, outcome in ended})


class Workers:
    """The worker processes of a sweep.

    Args:
        study: whose trials they run.
        variables: environment variables of each worker.
    """

    def __init__(self, study: SweepStudy, variables: Sequence[Mapping[str, str]]) -> None:
        self._study = study
        self._variables = variables
        self._places: dict[int, int] = {}  # by PID: the index of the worker
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._deaths = 0
        self._ended_before = -1
        self._logs: dict[int, Path] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """End the running processes immediately; their trials are interrupted."""
        if not self._running:
            return
        ended = {str(ProcessIdentity.of(pid)) for pid in self._running}
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            end_session(process)
        self._study.refresh()
        running = self._study.slots.running
        numbers = [trial.number for trial in running if trial.system_attrs.get(WORKER) in ended]
        self._study.finish(dict.fromkeys(numbers, interrupted()))

    def check(self, stop: StopRequest) -> bool:
        """Read the study, replace dead workers, and recover their trials; call it repeatedly.

        Args:
            stop: if it is set, the workers are told to stop after their running trials.

        Returns:
            Whether the sweep goes on.

        Raises:
            SweepError: several workers in a row died and no trial ended.
        """
        counts = self._study.refresh()
        self._remove_ended()
        if stop.is_set() or self._study.slots.is_over() or self._study.is_given_up():
            for process in self._running.values():
                if process.stdin is not None:
                    process.stdin.close()
            return bool(self._running)
        self._study.recover()
        wanted = min(len(self._variables), counts.total - counts.settled)
        while len(self._running) < wanted:
            self._start()
        return True

    def _start(self) -> None:
        logs = self._study.directory / WORKER_LOGS
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{len(self._logs)}.log"
        # A worker that replaces another one has its devices.
        place = min(set(range(len(self._variables))) - {self._places[pid] for pid in self._running})
        with open(log, "ab") as output:
            process = subprocess.Popen(
                same_command(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    **self._variables[place],
                    WORKER_VARIABLE: str(self._study.directory),
                },
            )
        self._places[process.pid] = place
        self._running[process.pid] = process
        self._logs[process.pid] = log

    def _remove_ended(self) -> None:
        ended = self._study.slots.n_ended
        if ended != self._ended_before:
            self._ended_before, self._deaths = ended, 0
        for pid, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[pid]
            self._deaths += process.returncode != 0
            if self._deaths > DEATHS_ALLOWED:
                lines = self._logs[pid].read_text(errors="replace").strip().splitlines()
                raise SweepError(
                    f"expected workers to finish trials, got {self._deaths} in a row that did not, "
                    f"the last with exit code {process.returncode}: "
                    f"{lines[-1] if lines else 'no output'}; see {self._logs[pid]}"
                )


def stop_with_parent(stop: StopRequest) -> None:
    """In a worker process: set `stop` when the main process closes its standard input, or dies."""

    def wait() -> None:
        # Not sys.stdin: this thread would hold its lock while the interpreter shuts down.
        while os.read(0, 1):
            continue
        stop.set()

    threading.Thread(target=wait, name="parent", daemon=True).start()
