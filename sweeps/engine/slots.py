"""Which points of a sweep have a result, which are under way, and which are lost.

A sweep of n trials has the slots 0 to n - 1, one for each point. A trial belongs to a slot; one
that failed is followed by another of the same slot, until the slot has a result or is lost.
"""

from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from bn_lightning.sweeps.engine.outcome import DIVERGED, HOPELESS, INTERRUPTED

SLOT = "sweep:slot"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Counts:
    """How far a sweep is: slots by what became of them."""

    total: int
    complete: int
    pruned: int
    diverged: int  # of the complete ones
    lost: int
    running: int

    @property
    def settled(self) -> int:
        """Slots with a result, and lost ones: no trial of theirs is to come."""
        return self.complete + self.pruned + self.lost


@dataclass
class _Slot:
    result: FrozenTrial | None = None
    last_failed: FrozenTrial | None = None
    failures: int = 0
    is_lost: bool = False

    @property
    def is_settled(self) -> bool:
        return self.result is not None or self.is_lost


class Ledger:
    """The slots of a sweep, kept up from its trials; what has ended is read once.

    Args:
        n_slots: how many there are.
        max_retries: how often a failed trial is followed by another.
    """

    def __init__(self, n_slots: int, max_retries: int) -> None:
        self.n_slots = n_slots
        self._max_retries = max_retries
        self._slots: dict[int, _Slot] = {}
        self._all_read = 0  # trials before this number have ended and are read
        self._read: set[int] = set()  # those after it that have, too
        self._live: dict[int, int] = {}  # slot: number of its first trial that waits or runs
        self._complete = self._pruned = self._diverged = self._lost = 0
        self.waiting: list[FrozenTrial] = []
        self.running: list[FrozenTrial] = []
        self._new: list[tuple[FrozenTrial, Counts]] = []

    def update(self, trials: list[FrozenTrial]) -> None:
        """Take in all trials of the study, in the order of their numbers."""
        self.waiting, self.running, self._live = [], [], {}
        for trial in trials[self._all_read :]:
            slot = trial.system_attrs.get(SLOT)
            if slot is None or slot >= self.n_slots:
                continue
            if trial.state.is_finished():
                if trial.number not in self._read:
                    self._read.add(trial.number)
                    self._take(slot, trial)
                    if trial.user_attrs.get(DUPLICATE) is None:
                        self._new.append((trial, self.counts()))
                continue
            (self.waiting if trial.state == TrialState.WAITING else self.running).append(trial)
            self._live.setdefault(slot, trial.number)
        while self._all_read < len(trials) and trials[self._all_read].state.is_finished():
            self._read.discard(self._all_read)
            self._all_read += 1

    @property
    def n_ended(self) -> int:
        """How many trials have ended, failed ones among them."""
        return self._all_read + len(self._read)

    def take_new(self) -> list[tuple[FrozenTrial, Counts]]:
        """The trials read as ended since this was called last, each with how far the sweep was."""
        new, self._new = self._new, []
        return new

    def open_slots(self) -> list[int]:
        """Slots that still need a trial, and have none that waits or runs."""
        return [slot for slot in range(self.n_slots) if self.is_open(slot)]

    def is_open(self, slot: int) -> bool:
        """Whether a slot still needs a trial, and has none that waits or runs."""
        found = self._slots.get(slot)
        return slot not in self._live and (found is None or not found.is_settled)

    def is_over(self) -> bool:
        """Whether every slot has a result or is lost."""
        return self.counts().settled == self.n_slots

    def is_duplicate(self, trial: FrozenTrial) -> bool:
        """Whether an earlier trial of the same slot waits, runs, or has a result.

        So it is after two processes filled the same slots at the same moment.
        """
        slot = trial.system_attrs[SLOT]
        found = self._slots.get(slot)
        return self._live.get(slot, trial.number) < trial.number or (
            found is not None and found.result is not None
        )

    def last_failed(self, slot: int) -> FrozenTrial | None:
        """The last trial of a slot that failed or was interrupted."""
        found = self._slots.get(slot)
        return found.last_failed if found else None

    def results(self) -> list[FrozenTrial]:
        """The trials with a result, in the order of their numbers."""
        found = [slot.result for slot in self._slots.values() if slot.result is not None]
        return sorted(found, key=lambda trial: trial.number)

    def lost(self) -> list[FrozenTrial]:
        """The last trial of every slot that is lost."""
        slots = [slot for _, slot in sorted(self._slots.items()) if slot.result is None]
        return [slot.last_failed for slot in slots if slot.is_lost and slot.last_failed]

    def counts(self) -> Counts:
        """How far the sweep is, as of the last `update`."""
        return Counts(
            total=self.n_slots,
            complete=self._complete,
            pruned=self._pruned,
            diverged=self._diverged,
            lost=self._lost,
            running=len(self.running),
        )

    def _take(self, slot: int, trial: FrozenTrial) -> None:
        if trial.user_attrs.get(DUPLICATE) is not None:
            return
        found = self._slots.setdefault(slot, _Slot())
        if trial.state != TrialState.FAIL:
            if found.result is None:
                found.result = trial
                self._lost -= found.is_lost
                self._complete += trial.state == TrialState.COMPLETE
                self._pruned += trial.state == TrialState.PRUNED
                self._diverged += bool(trial.user_attrs.get(DIVERGED))
            return
        found.last_failed = trial
        if not trial.user_attrs.get(INTERRUPTED) and not found.is_settled:
            found.failures += 1
            found.is_lost = found.failures > self._max_retries or bool(
                trial.user_attrs.get(HOPELESS)
            )
            self._lost += found.is_lost
