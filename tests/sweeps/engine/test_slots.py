"""The state of the slots of a sweep."""

import pytest
from optuna.trial import TrialState, create_trial

from bn_lightning.sweeps.engine.slots import Slots
from bn_lightning.sweeps.engine.stored_names import DUPLICATE, HOPELESS, INTERRUPTED, SLOT

DONE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
WAITING, RUNNING = TrialState.WAITING, TrialState.RUNNING


def trials(*content):
    """Return trials from (slot, state) or (slot, state, user attributes)."""
    made = []
    for number, (slot, state, *attributes) in enumerate(content):
        trial = create_trial(
            state=state,
            value=0.0 if state == DONE else None,
            system_attrs={} if slot is None else {SLOT: slot},
            user_attrs=attributes[0] if attributes else {},
        )
        trial.number = number
        made.append(trial)
    return made


def slots_of(*content, n_slots=3, max_retries=1):
    slots = Slots(n_slots, max_retries)
    slots.update(trials(*content))
    return slots


class TestSlots:
    def test_an_empty_study(self):
        slots = slots_of()
        assert slots.open_slots() == [0, 1, 2]
        assert not slots.is_over()

    def test_what_waits_or_runs_is_not_open(self):
        slots = slots_of((0, WAITING), (2, RUNNING))
        assert slots.open_slots() == [1]
        assert [trial.number for trial in slots.waiting] == [0]
        assert [trial.number for trial in slots.running] == [1]

    def test_the_end(self):
        slots = slots_of((0, DONE), (1, PRUNED), (2, FAIL), (2, DONE, {"diverged": True}))
        counts = slots.counts()
        assert (counts.complete, counts.pruned, counts.diverged, counts.lost) == (2, 1, 1, 0)
        assert slots.is_over()
        assert [trial.number for trial in slots.results()] == [0, 1, 3]

    @pytest.mark.parametrize(("retries", "is_open"), [(0, False), (1, False), (2, True)])
    def test_retries(self, retries, is_open):
        slots = slots_of((0, FAIL), (0, FAIL), n_slots=1, max_retries=retries)
        assert slots.is_open(0) is is_open
        assert slots.is_over() is not is_open
        assert slots.last_failed(0).number == 1
        assert [trial.number for trial in slots.failed(lost=True)] == ([] if is_open else [1])

    def test_an_interruption_is_no_failure(self):
        interrupted = {INTERRUPTED: True}
        slots = slots_of(*[(0, FAIL, interrupted)] * 3, n_slots=1, max_retries=0)
        assert slots.open_slots() == [0]
        assert slots.counts().failures == 0 and slots.failed() == []

    def test_failures_are_counted_with_their_retries(self):
        slots = slots_of((0, FAIL), (1, FAIL), (0, FAIL), (2, DONE))
        assert slots.counts().failures == 3
        assert [trial.number for trial in slots.failed()] == [2, 1]
        assert [trial.number for trial in slots.failed(lost=True)] == [2]

    def test_a_lost_slot_stays_lost_if_another_trial_of_it_is_interrupted(self):
        slots = slots_of((0, FAIL), (0, FAIL, {INTERRUPTED: True}), n_slots=1, max_retries=0)
        assert slots.counts().lost == len(slots.failed(lost=True)) == 1

    def test_a_hopeless_failure_is_not_repeated(self):
        assert slots_of((0, FAIL, {HOPELESS: True}), n_slots=1).is_over()

    def test_trials_of_others_and_beyond_the_end_do_not_count(self):
        slots = slots_of((None, DONE), (5, DONE), (0, DONE), (7, WAITING))
        assert slots.counts().settled == 1
        assert slots.waiting == []


class TestDuplicates:
    def test_the_earlier_trial_of_a_slot_is_the_one(self):
        slots = slots_of((0, WAITING), (0, WAITING), (1, RUNNING), (1, WAITING))
        first, second, third = slots.waiting
        assert not slots.is_duplicate(first)
        assert slots.is_duplicate(second)
        assert slots.is_duplicate(third)

    def test_a_slot_with_a_result_needs_no_other(self):
        slots = slots_of((0, DONE), (0, WAITING))
        assert slots.is_duplicate(slots.waiting[0])

    def test_a_retry_is_none(self):
        slots = slots_of((0, FAIL), (0, WAITING))
        assert not slots.is_duplicate(slots.waiting[0])

    def test_a_duplicate_that_was_closed_is_no_failure(self):
        slots = slots_of((0, FAIL, {DUPLICATE: True}), (0, RUNNING), max_retries=0)
        assert slots.counts().lost == 0


class TestUpdates:
    def test_step_by_step_as_at_once(self):
        """Updates give the same state as reading all trials at once."""
        steps = [
            [(0, WAITING), (1, WAITING), (2, WAITING)],
            [(0, RUNNING), (1, RUNNING), (2, WAITING)],
            [(0, RUNNING), (1, FAIL), (2, DONE), (1, WAITING)],
            [(0, DONE), (1, FAIL), (2, DONE), (1, RUNNING)],
            [(0, DONE), (1, FAIL), (2, DONE), (1, FAIL)],
        ]
        slots, new = Slots(3, 1), []
        for step in steps:
            slots.update(trials(*step))
            fresh = slots_of(*step)
            assert slots.counts() == fresh.counts()
            assert slots.open_slots() == fresh.open_slots()
            assert slots.n_ended == fresh.n_ended
            new.append([trial.number for trial, _ in slots.take_new()])
        assert new == [[], [], [1, 2], [0], [3]]
        assert slots.is_over()


class TestRounds:
    """Two slots; if both have a result, 2 and 3 follow, and if 2 has one, 4."""

    def slots_of(self, *content):
        self.calls = []

        def following(results):
            self.calls.append({slot: trial and trial.number for slot, trial in results.items()})
            complete = [slot for slot, trial in results.items() if trial is not None]
            return [*([2, 3] if {0, 1} <= {*complete} else []), *([4] if 2 in complete else [])]

        slots = Slots(2, 0, following)
        slots.update(trials(*content))
        return slots

    def test_a_round_follows_when_all_slots_have_ended(self):
        assert self.slots_of((0, DONE), (1, RUNNING)).open_slots() == []
        assert self.calls == []
        slots = self.slots_of((1, DONE), (0, DONE))
        assert slots.open_slots() == [2, 3]
        assert self.calls == [{0: 1, 1: 0}]
        assert (slots.counts().total, slots.counts().settled, slots.is_over()) == (4, 2, False)

    @pytest.mark.parametrize("state", [FAIL, PRUNED])
    def test_what_has_no_result_is_passed_on_as_none(self, state):
        slots = self.slots_of((0, DONE), (1, state))
        assert self.calls == [{0: 0, 1: None}]
        assert slots.is_over() and slots.counts().total == 2

    def test_the_end_is_a_round_that_asks_for_nothing_new(self):
        slots = self.slots_of(*[(slot, DONE) for slot in range(5)])
        assert slots.is_over()
        assert [counts.total for _, counts in slots.take_new()] == [2, 4, 4, 5, 5]

    def test_a_lost_slot_that_is_repeated_holds_up_the_next_round(self):
        """As when max_retries was 0 before: slots of the next round have trials already."""
        again = Slots(2, 1, lambda results: [2, 3])
        again.update(trials((0, DONE), (1, FAIL), (2, DONE), (3, WAITING)))
        assert again.open_slots() == [1]
        again.update(trials((0, DONE), (1, FAIL), (2, DONE), (3, WAITING), (1, DONE)))
        assert (again.open_slots(), again.is_over()) == ([], False)
        assert [trial.system_attrs[SLOT] for trial in again.waiting] == [3]
        again.update(trials((0, DONE), (1, FAIL), (2, DONE), (3, DONE), (1, DONE)))
        assert again.is_over() and again.counts().total == 4
