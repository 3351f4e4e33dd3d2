"""The engine of a sweep: a study whose trials are claimed, run and told, by any number of workers.

Every slot of a sweep (ledger.py) has a trial that waits in the study. A worker claims one, which
every storage grants to one worker only, runs it, writes its outcome beside its files, and tells the
study. Whoever finds a trial whose worker is dead tells what that worker left, and lets the slot
wait again. So a sweep may be stopped at any moment and gone on with by the same command.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bn_lightning.sweeps.engine.creation import FILLER, filler_mark
from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.heartbeat import (
    SIGNATURE,
    DeathWatch,
    Heartbeat,
    Signature,
    is_known_dead,
    signature,
)
from bn_lightning.sweeps.engine.names import COMMAND
from bn_lightning.sweeps.engine.outcome import (
    DIRECTORY,
    FILE_NAME,
    Outcome,
    failed,
    interrupted,
    outcome_of_error,
    read_outcome,
)
from bn_lightning.sweeps.engine.sampling import Points, Suggest, make_sampler
from bn_lightning.sweeps.engine.slots import DUPLICATE, SLOT, Counts, Ledger
from bn_lightning.sweeps.engine.space import Parameter
from bn_lightning.sweeps.engine.stopping import Stopping
from bn_lightning.sweeps.engine.storage import PatientStorage

# Seconds: between a claim to fill the study and the look whether it was the last one, and without a
# new trial until the one who fills is given up.
SETTLE, FILL_PATIENCE = 1.0, 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """How a sweep meets failures.

    Args:
        max_retries: how often a failed trial is tried again.
        heartbeat: seconds between two signs of life of a worker.
        stale_after: seconds without one, after which a worker on another machine is given up.

    Raises:
        SweepError: retries below 0, or not 0 < 2 heartbeat <= stale_after.
    """

    max_retries: int
    heartbeat: float
    stale_after: float

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise SweepError(f"`max_retries` expected 0 or more, got {self.max_retries}")
        if not 0 < 2 * self.heartbeat <= self.stale_after:
            raise SweepError(
                "`stale_after` expected at least twice `heartbeat`, both in seconds above 0, got "
                f"{self.stale_after} and {self.heartbeat}"
            )


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that this process runs: its number and its point."""

    number: int
    params: dict[str, Parameter]


class SweepStudy:
    """A study as the workers of a sweep share it.

    Args:
        storage: where the study is.
        name: of the study.
        directory: of the sweep; a trial's files lie in the directory of its number.
        points: what the slots hold.
        suggest: draws a point by a trial.
        sampler: the configuration of the sampler.
        pruner: of the study.
        policy: how failures are met.
    """

    def __init__(
        self,
        storage: PatientStorage,
        name: str,
        directory: Path,
        points: Points,
        suggest: Suggest,
        sampler: dict[str, Any],
        pruner: BasePruner,
        policy: Policy,
    ) -> None:
        self.storage = storage
        self.name = name
        self.directory = directory
        self._points = points
        self._suggest = suggest
        self._sampler = sampler
        self._study = optuna.load_study(
            study_name=name, storage=storage, sampler=RandomSampler(), pruner=pruner
        )
        self._study_id = storage.get_study_id_from_name(name)
        self._has_sampler = points.are_planned
        self._heartbeat = Heartbeat(storage.inner, policy.heartbeat)
        self._watch = DeathWatch(policy.heartbeat, policy.stale_after)
        self._n_open: int | None = None
        self._n_open_since = 0.0
        self.ledger = Ledger(points.n_trials, policy.max_retries)

    @property
    def directions(self) -> list[optuna.study.StudyDirection]:
        """Whether to minimise or to maximise, for each value of a trial."""
        return self._study.directions

    def keep_command(self, command: str) -> None:
        """Keep in the study the command that works on it, for whoever reports it.

        Args:
            command: as it was typed, without a password.
        """
        if self._study.user_attrs.get(COMMAND) != command:
            self._study.set_user_attr(COMMAND, command)

    def refresh(self) -> Counts:
        """Read the study, and return how far it is."""
        self.ledger.update(self._study.get_trials(deepcopy=False))
        return self.ledger.counts()

    def fill(self) -> None:
        """Let every slot have its trial, unless another process is about it."""
        self.refresh()
        if self.ledger.open_slots() and self._nobody_fills():
            self._fill_if_last()

    def fill_first(self) -> None:
        """Fill a study that this process has just made: the others wait (`create_study`)."""
        self._fill()

    def _nobody_fills(self) -> bool:
        text = self._study.user_attrs.get(FILLER)
        return not text or is_known_dead(Signature.parse(text.rpartition(" ")[0]))

    def _fill_if_last(self) -> None:
        """Fill, if of several processes that begin to at once this one is the last."""
        mine = filler_mark()
        self._study.set_user_attr(FILLER, mine)
        time.sleep(SETTLE)
        if self._study.user_attrs.get(FILLER) == mine:
            self._fill()

    def _fill(self) -> None:
        self.refresh()
        for slot in self.ledger.open_slots():
            self._enqueue(slot)
        self._study.set_user_attr(FILLER, None)

    def _enqueue(self, slot: int) -> None:
        """Let a trial of this slot wait, at the point of the one that failed if there is one."""
        before = self.ledger.last_failed(slot)
        point = self._points[slot] if before is None else (before.params, before.distributions)
        params, distributions = point or ({}, {})
        self._study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions=distributions,
                system_attrs={SLOT: slot},
            )
        )

    def claim(self) -> ClaimedTrial | None:
        """Take the next trial that waits; None if there is none."""
        self.refresh()
        for waiting in self.ledger.waiting:
            trial_id = self._id(waiting.number)
            try:
                is_mine = self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if not is_mine:
                continue
            self.storage.set_trial_system_attr(trial_id, SIGNATURE, str(signature()))
            if self.ledger.is_duplicate(waiting):
                note = failed("another trial has the same slot").with_attributes(
                    **{DUPLICATE: True}
                )
                self._tell(waiting.number, note)
                continue
            self._heartbeat.add(trial_id)
            (self._trial_directory(waiting.number) / FILE_NAME).unlink(missing_ok=True)
            try:
                return ClaimedTrial(waiting.number, self._draw(waiting.number))
            except Exception as error:
                self.finish(waiting.number, outcome_of_error(error))
            except BaseException:
                self.interrupt(waiting.number)
                raise
        return None

    def _draw(self, number: int) -> dict[str, Parameter]:
        if not self._has_sampler:
            self._study.sampler = make_sampler(self._sampler, first_trial=number)
            self._has_sampler = True
        return self._suggest(Trial(self._study, self._id(number)))

    def finish(self, number: int, outcome: Outcome) -> None:
        """Tell the study how a trial ended; a failed one is tried again while retries are left."""
        is_told = self._tell(number, outcome)
        self._heartbeat.remove(self._id(number))
        if is_told and outcome.state == "FAIL":
            self.refresh()
            slot = self.storage.get_trial_system_attrs(self._id(number))[SLOT]
            if self.ledger.is_open(slot):
                self._enqueue(slot)

    def _tell(self, number: int, outcome: Outcome) -> bool:
        """Whether this call ended the trial."""
        trial_id = self._id(number)
        attributes = outcome.attributes | {DIRECTORY: str(self._trial_directory(number))}
        try:
            for key, value in attributes.items():
                self.storage.set_trial_user_attr(trial_id, key, value)
            self._study.tell(number, outcome.values, outcome.trial_state)
        except (UpdateFinishedTrialError, ValueError):
            # Told before: by us, if the storage went away just then, or by one who gave us up.
            state = self.storage.get_trial(trial_id).state
            if not state.is_finished():
                raise
            if state != outcome.trial_state:
                log.warning(
                    "trial %d was given up by another process meanwhile; its outcome is kept in %s",
                    number,
                    self._trial_directory(number) / FILE_NAME,
                )
            return False
        return True

    def tidy(self) -> None:
        """Look after trials whose worker is dead, and slots without a trial.

        For one who has nothing else to do; to be called again and again.
        """
        for trial in self._watch.abandoned(self.ledger.running):
            outcome = read_outcome(self._trial_directory(trial.number))
            self.finish(trial.number, outcome or _lost_process(trial))
        n_open = len(self.ledger.open_slots())
        if n_open != self._n_open:
            self._n_open, self._n_open_since = n_open, time.monotonic()
        is_stuck = time.monotonic() - self._n_open_since > FILL_PATIENCE
        if n_open and (is_stuck or self._nobody_fills()):
            self._fill_if_last()

    def interrupt(self, number: int) -> None:
        """Tell that a trial was stopped: it will be tried again, and it is no failure."""
        self.finish(number, interrupted())

    def close(self) -> None:
        """End the heartbeat, and let the storage go."""
        self._heartbeat.stop()
        self.storage.close()

    def _trial_directory(self, number: int) -> Path:
        return self.directory / str(number)

    def _id(self, number: int) -> int:
        return int(self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number))


def work(
    sweep: SweepStudy,
    run: Callable[[ClaimedTrial], Outcome],
    stopping: Stopping,
    watch: Callable[[], None] = lambda: None,
    pause: float = 0.5,
) -> None:
    """Claim, run and tell trials until the sweep is over or stopped.

    Args:
        run: runs a trial; an exception that is no `Exception` interrupts the trial and comes out.
        stopping: asked between two trials.
        watch: called whenever the study was read.
        pause: seconds to wait when nothing waits.
    """
    while not stopping():
        claimed = sweep.claim()
        watch()
        if claimed is None:
            if sweep.ledger.is_over():
                return
            sweep.tidy()
            if not sweep.ledger.waiting:
                time.sleep(pause)
            continue
        try:
            outcome = run(claimed)
        except Exception as error:
            outcome = outcome_of_error(error)
        except BaseException:
            sweep.interrupt(claimed.number)
            raise
        sweep.finish(claimed.number, stopping.excused(outcome))


def _lost_process(trial: FrozenTrial) -> Outcome:
    signed = trial.system_attrs.get(SIGNATURE)
    if signed is None:
        return failed("the process that claimed this trial ended before it began")
    worker = Signature.parse(signed)
    return failed(
        f"the process {worker.pid} on {worker.place.partition('/')[0]} ended, or was silent for "
        "too long, without a result"
    )
