"""The study of a sweep, whose trials any number of workers claim, run and finish.

Each slot of a sweep (slots.py) has a waiting trial in the study. A worker claims one (claim.py),
runs it, writes its outcome into its directory, and then updates the study. If a worker dies,
another one finishes its trial with the outcome that it left, or lets a new trial of the slot wait.
A sweep can therefore be stopped at any time and resumed by the same command.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bn_lightning.sweeps.engine.claim import ClaimedTrial, claim_trial
from bn_lightning.sweeps.engine.heartbeat import (
    Heartbeat,
    ProcessIdentity,
    StaleTrialDetector,
    filler_mark,
    filler_process,
)
from bn_lightning.sweeps.engine.outcome import (
    Outcome,
    failed,
    interrupted,
    outcome_of_error,
    read_outcome,
)
from bn_lightning.sweeps.engine.sampling import Point, SamplingPlan
from bn_lightning.sweeps.engine.slots import SlotCounts, Slots
from bn_lightning.sweeps.engine.space import Parameter
from bn_lightning.sweeps.engine.storage import RetryingStorage
from bn_lightning.sweeps.engine.stored_names import (
    COMMAND,
    DIRECTORY,
    DUPLICATE,
    FILLER,
    IN_BATCH,
    INTERRUPTED,
    OUTCOME_FILE,
    SLOT,
    WORKER,
)
from bn_lightning.sweeps.engine.sweep_error import SweepError

# Seconds from marking the study as being filled to checking that no other process did so later.
SETTLE = 1.0
# Seconds without a new trial after which another process takes over filling the study.
FILL_PATIENCE = 20.0
# Trials that are enqueued in one write.
FILLED_AT_ONCE = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FailurePolicy:
    """How a sweep treats failed trials and dead workers.

    Attributes:
        max_retries: how many failed trials of a slot are repeated, at least 0.
        heartbeat: seconds between two beats of a worker, above 0.
        stale_after: seconds without a beat after which a worker on another machine counts as dead,
            at least twice `heartbeat`.
        first_failures: how many trials may fail before one has a result; None for any number.

    Raises:
        SweepError: a value is out of range.
    """

    max_retries: int
    heartbeat: float
    stale_after: float
    first_failures: int | None = None

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise SweepError(f"expected `max_retries` to be 0 or more, got {self.max_retries}")
        if not 0 < 2 * self.heartbeat <= self.stale_after:
            raise SweepError(
                "expected `stale_after` to be at least twice `heartbeat`, both above 0 s, got "
                f"{self.stale_after} and {self.heartbeat}"
            )


class SweepStudy:
    """A study that the workers of a sweep share.

    Args:
        storage: the storage of the study.
        name: of the study.
        directory: of the sweep.
        plan: the points of the slots, and the sampler.
        pruner: of the study.
        policy: how failures are treated.
        subdirectory: returns the directory of a trial below that of the sweep, from its number and
            its parameters; None for its number.

    Attributes:
        slots: the state of the sweep as of the last `refresh`.
    """

    def __init__(
        self,
        storage: RetryingStorage,
        name: str,
        directory: Path,
        plan: SamplingPlan,
        pruner: BasePruner,
        policy: FailurePolicy,
        subdirectory: Callable[[int, dict[str, Parameter]], str] | None = None,
    ) -> None:
        self.storage = storage
        self.name = name
        self.directory = directory
        self._plan = plan
        self._subdirectory = subdirectory
        self._study = optuna.load_study(
            study_name=name, storage=storage, sampler=RandomSampler(), pruner=pruner
        )
        self._study_id = storage.get_study_id_from_name(name)
        self._has_sampler = plan.is_planned
        self._heartbeat = Heartbeat(storage, policy.heartbeat)
        self._detector = StaleTrialDetector(policy.heartbeat, policy.stale_after)
        self._n_open: int | None = None
        self._n_open_since = 0.0
        self._first_failures = policy.first_failures
        self._failures_before: int | None = None  # when this process read the study first
        self.slots = Slots(plan.n_trials, policy.max_retries, plan.following)

    @property
    def directions(self) -> list[StudyDirection]:
        """The direction of each value of a trial."""
        return self._study.directions

    def record_command(self, command: str) -> None:
        """Store the command that works on the study, which a report shows.

        Args:
            command: as typed, without a password.
        """
        if self._study.user_attrs.get(COMMAND) != command:
            self._study.set_user_attr(COMMAND, command)

    def refresh(self) -> SlotCounts:
        """Read all trials of the study, and return the counts of its slots."""
        self.slots.update(self._study.get_trials(deepcopy=False))
        counts = self.slots.counts()
        if self._failures_before is None:
            self._failures_before = counts.failures
        return counts

    def is_given_up(self) -> bool:
        """Return whether no further trial should start, because the first ones have all failed.

        A sweep of no more trials than `FailurePolicy.first_failures` is never given up. Failures
        from before this process do not count, so that the same command tries again.
        """
        counts, limit = self.slots.counts(), self._first_failures
        if limit is None or counts.total <= limit or counts.complete or counts.pruned:
            return False
        return counts.failures - (self._failures_before or 0) >= limit

    def fill(self, *, take_over: bool = False) -> None:
        """Enqueue a trial for each slot that has none, unless another process is doing it.

        Args:
            take_over: ignore the other process, which may be alive.
        """
        self.refresh()
        if not self.slots.open_slots():
            return
        mark = self._study.user_attrs.get(FILLER)
        filler = filler_process(mark) if mark else None
        if filler != ProcessIdentity.of(os.getpid()):
            if not (take_over or filler is None or filler.is_known_dead()):
                return
            # If several processes get here at the same time, the last one fills the study.
            mark = filler_mark()
            self._study.set_user_attr(FILLER, mark)
            time.sleep(SETTLE)
            if self._study.user_attrs.get(FILLER) != mark:
                return
            self.refresh()
        slots = self.slots.open_slots()
        for first in range(0, len(slots), FILLED_AT_ONCE):
            some = slots[first : first + FILLED_AT_ONCE]
            self.storage.together(lambda: self._enqueue(some))  # noqa: B023
        self._study.set_user_attr(FILLER, None)

    def _enqueue(self, slots: Sequence[int]) -> None:
        """Add a waiting trial to each slot, at the same point as its last failed trial."""
        for slot in slots:
            before = self.slots.last_failed(slot)
            point = Point(before.params, before.distributions) if before else self._plan.point(slot)
            self._study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=point.params,
                    distributions=point.distributions,
                    system_attrs={SLOT: slot},
                )
            )

    def claim(self, size: int = 1) -> list[ClaimedTrial]:
        """Claim the next waiting trials and draw their parameters.

        Args:
            size: most trials to claim. If a process that runs several dies, nobody knows which of
                them was the cause, so none is counted as failed.
        """
        numbers: list[int] = []
        try:
            self.storage.together(lambda: self._claim(size, numbers))
            # A sampler may take longer than a journal is to be locked.
            if self._plan.is_planned:
                return self.storage.together(lambda: self._drawn(numbers))
            return self._drawn(numbers)
        except BaseException:
            self.finish(dict.fromkeys(numbers, interrupted()))
            raise

    def _claim(self, size: int, numbers: list[int]) -> None:
        """Claim waiting trials, and write their numbers to `numbers`."""
        numbers.clear()
        self.refresh()
        for waiting in self.slots.waiting:
            if len(numbers) == size:
                break
            trial_id = self._id(waiting.number)
            if not claim_trial(self.storage, trial_id):
                continue
            if self.slots.is_duplicate(waiting):
                duplicate = failed("another trial has the same slot", **{DUPLICATE: True})
                self._tell(waiting.number, duplicate)
                continue
            self._heartbeat.add(trial_id)
            if size > 1:
                self.storage.set_trial_system_attr(trial_id, IN_BATCH, True)
            numbers.append(waiting.number)

    def _drawn(self, numbers: list[int]) -> list[ClaimedTrial]:
        """Draw the parameters of claimed trials, and finish those for which that fails."""
        claimed = []
        for number in numbers:
            try:
                claimed.append(self._claimed(number))
            except Exception as error:
                self.finish({number: outcome_of_error(error)})
        return claimed

    def _claimed(self, number: int) -> ClaimedTrial:
        params = self._draw(number)
        subdirectory = str(number)
        if self._subdirectory is not None:
            subdirectory = self._subdirectory(number, params)
            # For the process that finishes the trial if this one dies.
            directory = str(self.directory / subdirectory)
            self.storage.set_trial_user_attr(self._id(number), DIRECTORY, directory)
        (self.directory / subdirectory / OUTCOME_FILE).unlink(missing_ok=True)
        return ClaimedTrial(number, params, subdirectory)

    def _draw(self, number: int) -> dict[str, Parameter]:
        if not self._has_sampler:
            self._study.sampler = self._plan.sampler(first_trial=number)
            self._has_sampler = True
        return self._plan.space.suggest(Trial(self._study, self._id(number)))

    def finish(self, outcomes: Mapping[int, Outcome]) -> None:
        """Store the outcomes of trials; enqueue those that failed again while retries are left.

        Args:
            outcomes: number of a trial -> its outcome.
        """
        self.storage.together(lambda: self._finish(outcomes))

    def _finish(self, outcomes: Mapping[int, Outcome]) -> None:
        for number, outcome in outcomes.items():
            is_told = self._tell(number, outcome)
            self._heartbeat.remove(self._id(number))
            if is_told and outcome.state == "FAIL":
                self.refresh()
                slot = self.storage.get_trial_system_attrs(self._id(number))[SLOT]
                if self.slots.is_open(slot):
                    self._enqueue([slot])

    def _tell(self, number: int, outcome: Outcome) -> bool:
        """Store an outcome, and return whether this call has ended the trial."""
        trial_id = self._id(number)
        attributes = outcome.attributes | {DIRECTORY: str(self._trial_directory(number))}
        try:
            for key, value in attributes.items():
                self.storage.set_trial_user_attr(trial_id, key, value)
            self._study.tell(number, outcome.values, outcome.trial_state)
        except (UpdateFinishedTrialError, ValueError):
            # Already ended: by this process, if the storage answered too late and the call was
            # repeated; or by another one, which took this process for dead.
            state = self.storage.get_trial(trial_id).state
            if not state.is_finished():
                raise
            if state != outcome.trial_state:
                _log.warning(
                    "another process has ended trial %d; the outcome of this one is in %s",
                    number,
                    self._trial_directory(number) / OUTCOME_FILE,
                )
            return False
        return True

    def recover(self) -> None:
        """Finish the trials of dead workers, and enqueue missing trials.

        A process without another task calls this repeatedly.
        """
        for trial in self._detector.stale_trials(self.slots.running):
            outcome = read_outcome(self._trial_directory(trial.number))
            self.finish({trial.number: outcome or _worker_died(trial)})
        n_open = len(self.slots.open_slots())
        if n_open != self._n_open:
            self._n_open, self._n_open_since = n_open, time.monotonic()
        if n_open:
            self.fill(take_over=time.monotonic() - self._n_open_since > FILL_PATIENCE)

    def close(self) -> None:
        """Stop the heartbeat and close the storage."""
        self._heartbeat.stop()
        self.storage.close()

    def _trial_directory(self, number: int) -> Path:
        directory = self.directory / str(number)
        if self._subdirectory is None:
            return directory
        return Path(self.storage.get_trial(self._id(number)).user_attrs.get(DIRECTORY, directory))

    def _id(self, number: int) -> int:
        return int(self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number))


def _worker_died(trial: FrozenTrial) -> Outcome:
    text = trial.system_attrs.get(WORKER)
    if text is None:
        return failed("the process that claimed this trial ended before it ran the trial")
    worker = ProcessIdentity.parse(text)
    attributes = {INTERRUPTED: True} if trial.system_attrs.get(IN_BATCH) else {}
    return failed(
        f"the process {worker.pid} on {worker.place.partition('/')[0]} ended without a result, or "
        "was silent for too long",
        **attributes,
    )
