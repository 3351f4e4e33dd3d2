"""Which points of a sweep have a result, are being tried, or are lost.

A sweep of n trials has slots 0 to n - 1, one for each point. Each trial belongs to a slot. A trial
that failed is followed by another one in the same slot, until the slot has a result or is lost.

A sweep in rounds asks for further slots when all slots so far have ended. Which ones depends on
their results only, so each process that reads the study finds the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from bn_lightning.sweeps.engine.sampling import Following
from bn_lightning.sweeps.engine.stored_names import (
    DIVERGED,
    DUPLICATE,
    HOPELESS,
    INTERRUPTED,
    SLOT,
)


@dataclass(frozen=True)
class SlotCounts:
    """Number of slots by state.

    Attributes:
        total: all slots that were asked for.
        complete: slots with a value; `diverged` of them are from runs that diverged.
        pruned: slots whose trial was pruned.
        lost: slots without a result whose retries are used up.
        running: running trials.
        failures: failed trials of slots without a result before, each retry counted.
    """

    total: int
    complete: int
    diverged: int
    pruned: int
    lost: int
    running: int
    failures: int

    @property
    def settled(self) -> int:
        """Slots that need no further trial."""
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


class Slots:
    """The state of every slot, updated from the trials of the study.

    Args:
        n_slots: how many slots there are, in the first round.
        max_retries: how many failed trials of a slot are repeated.
        following: chooses the slots of further rounds; None without them.

    Attributes:
        waiting: trials that no worker has claimed, as of the last update.
        running: trials that a worker runs, as of the last update.
    """

    def __init__(self, n_slots: int, max_retries: int, following: Following | None = None) -> None:
        self._n_slots = n_slots
        self._max_retries = max_retries
        self._following = following
        # Dictionaries, because they keep the order. A slot leaves the second when it has ended.
        self._asked: dict[int, None] = dict.fromkeys(range(n_slots))
        self._unsettled = dict(self._asked)
        self._slots: dict[int, _Slot] = {}
        self._all_read = 0  # trials before this number have ended and are read
        self._read: set[int] = set()  # later trials that have ended and are read
        self._live: dict[int, int] = {}  # slot: number of its first trial that waits or runs
        self._complete = self._pruned = self._diverged = self._lost = self._failures = 0
        self.waiting: list[FrozenTrial] = []
        self.running: list[FrozenTrial] = []
        self._new: list[tuple[FrozenTrial, SlotCounts]] = []

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Read all trials of the study, in the order of their numbers."""
        self.waiting, self.running, self._live = [], [], {}
        for trial in trials[self._all_read :]:
            slot = trial.system_attrs.get(SLOT)
            if slot is None or (slot >= self._n_slots and self._following is None):
                continue
            if trial.state.is_finished():
                if trial.number not in self._read:
                    self._read.add(trial.number)
                    self._take(slot, trial)
                continue
            (self.waiting if trial.state == TrialState.WAITING else self.running).append(trial)
            self._live.setdefault(slot, trial.number)
        while self._all_read < len(trials) and trials[self._all_read].state.is_finished():
            self._read.discard(self._all_read)
            self._all_read += 1

    @property
    def n_ended(self) -> int:
        """Number of trials that have ended, including failed ones."""
        return self._all_read + len(self._read)

    def take_new(self) -> list[tuple[FrozenTrial, SlotCounts]]:
        """Return the trials that ended since the last call, each with the counts after it."""
        new, self._new = self._new, []
        return new

    def open_slots(self) -> list[int]:
        """Return the slots that need another trial and have none that waits or runs."""
        return [slot for slot in self._unsettled if slot not in self._live]

    def is_open(self, slot: int) -> bool:
        """Return whether a slot needs another trial and has none that waits or runs."""
        return slot in self._unsettled and slot not in self._live

    def is_over(self) -> bool:
        """Return whether every slot has a result or is lost, and no further round follows."""
        return not self._unsettled

    def is_duplicate(self, trial: FrozenTrial) -> bool:
        """Return whether an earlier trial of the same slot waits, runs or has a result.

        Duplicates exist when two processes fill the same slots at the same time.
        """
        slot = trial.system_attrs[SLOT]
        found = self._slots.get(slot)
        return self._live.get(slot, trial.number) < trial.number or (
            found is not None and found.result is not None
        )

    def last_failed(self, slot: int) -> FrozenTrial | None:
        """Return the last failed or interrupted trial of a slot."""
        found = self._slots.get(slot)
        return found.last_failed if found else None

    def results(self) -> list[FrozenTrial]:
        """Return the trials with a result, in the order of their numbers."""
        found = [slot.result for slot in self._slots.values() if slot.result is not None]
        return sorted(found, key=lambda trial: trial.number)

    def failed(self, *, lost: bool = False) -> list[FrozenTrial]:
        """Return the last trial of each slot whose last trial failed, or of each lost slot."""
        slots = [slot for _, slot in sorted(self._slots.items()) if slot.result is None]
        return [
            slot.last_failed
            for slot in slots
            if slot.last_failed
            and (slot.is_lost or not (lost or slot.last_failed.user_attrs.get(INTERRUPTED)))
        ]

    def counts(self) -> SlotCounts:
        """Return the counts as of the last update."""
        return SlotCounts(
            total=self._complete + self._pruned + self._lost + len(self._unsettled),
            complete=self._complete,
            diverged=self._diverged,
            pruned=self._pruned,
            lost=self._lost,
            running=len(self.running),
            failures=self._failures,
        )

    def _take(self, slot: int, trial: FrozenTrial) -> None:
        if trial.user_attrs.get(DUPLICATE) is not None:
            return
        found = self._slots.setdefault(slot, _Slot())
        if trial.state == TrialState.FAIL:
            found.last_failed = trial
            if not trial.user_attrs.get(INTERRUPTED) and not found.is_settled:
                found.failures += 1
                self._failures += 1
                is_hopeless = bool(trial.user_attrs.get(HOPELESS))
                found.is_lost = is_hopeless or found.failures > self._max_retries
                self._lost += found.is_lost
        elif found.result is None:
            found.result = trial
            self._lost -= found.is_lost
            self._complete += trial.state == TrialState.COMPLETE
            self._pruned += trial.state == TrialState.PRUNED
            self._diverged += bool(trial.user_attrs.get(DIVERGED))
        if found.is_settled and slot in self._unsettled:
            del self._unsettled[slot]
            self._begin_round()
        self._new.append((trial, self.counts()))

    def _begin_round(self) -> None:
        """If all slots have ended, ask for those of the next round; skip one that has ended, too.

        A round can have ended before this process reads the study.
        """
        while self._following is not None and not self._unsettled:
            chosen = self._following({slot: self._complete_trial(slot) for slot in self._asked})
            new = [slot for slot in chosen if slot not in self._asked]
            if not new:
                return
            self._asked |= dict.fromkeys(new)
            slots = self._slots
            self._unsettled = {
                slot: None for slot in new if slot not in slots or not slots[slot].is_settled
            }

    def _complete_trial(self, slot: int) -> FrozenTrial | None:
        result = self._slots[slot].result
        return result if result is not None and result.state == TrialState.COMPLETE else None
