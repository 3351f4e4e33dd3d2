"""Trials that train together, with made-up curves: whom the rungs prune, in any order."""

import errno
import random

import optuna
import pytest
from optuna.pruners import BasePruner, MedianPruner, PercentilePruner, WilcoxonPruner
from optuna.trial import TrialState, create_trial

from bn_lightning.sweeps.engine.journal_file import JournalFile
from bn_lightning.sweeps.engine.rungs import Hyperband, Rungs, SuccessiveHalving
from bn_lightning.sweeps.engine.storage import open_storage, storage_url

STEPS = [100, 200, 300, 400, 500, 600, 700, 800, 900]

# Trial k is at 0.1 * k from the beginning, but trial 0 overtakes all at step 300.
CURVES = [[0.0, 0.0] + [1.0] * 7, *([0.1 * k] * 9 for k in range(1, 9))]

PRUNERS = {
    "median": lambda: MedianPruner(n_startup_trials=5),
    "late_median": lambda: MedianPruner(n_startup_trials=5, n_warmup_steps=300),
    "upper_quarter": lambda: PercentilePruner(25.0, n_startup_trials=0),
    "halving": lambda: SuccessiveHalving(min_resource=100, reduction_factor=3),
    "late_halving": lambda: SuccessiveHalving(
        min_resource=100, reduction_factor=3, min_early_stopping_rate=1
    ),
    "halving_auto": lambda: SuccessiveHalving(reduction_factor=3),
    "bootstrap": lambda: SuccessiveHalving(100, 3, bootstrap_count=9),
    "hyperband": lambda: Hyperband(min_resource=100, max_resource=900, reduction_factor=3),
    "nothing": optuna.pruners.NopPruner,
}

# Trial -> the step at which it is pruned. Of nine trials, successive halving keeps three at step
# 100 and one at 300. "auto" begins at step 9, so that 9, 27 and 81 are one rung, at 100.
PRUNED = {
    "median": {0: 100, 1: 100, 2: 100, 3: 100},
    # Trial 0 is the best now, so the median is trial 4's 0.5.
    "late_median": {1: 300, 2: 300, 3: 300, 4: 300},
    "upper_quarter": {k: 100 for k in range(6)},
    "halving": {**{k: 100 for k in range(6)}, 6: 300, 7: 300},
    "late_halving": {k: 300 for k in range(1, 7)},
    "halving_auto": {**{k: 100 for k in range(6)}, 6: 300, 7: 300},
    "bootstrap": {k: 100 for k in range(9)},
    "nothing": {},
}


def study_with(pruner, direction="maximize"):
    return optuna.create_study(direction=direction, pruner=pruner, study_name="made_up")


def train(study, curves, shuffled=None):
    """Train a batch, reporting in a shuffled order; return the step at which trials are pruned."""
    trials = [study.ask() for _ in curves]
    rungs = Rungs(trials)
    alive, pruned = list(range(len(curves))), {}
    for place, step in enumerate(STEPS):
        if shuffled is not None:
            shuffled.shuffle(alive)
        values = {trials[k].number: curves[k][place] for k in alive}
        lost = rungs.report(values, step, STEPS[-1])
        assert lost <= values.keys()
        pruned |= {k: step for k in alive if trials[k].number in lost}
        alive = [k for k in alive if k not in pruned]
    for k, trial in enumerate(trials):
        state = TrialState.PRUNED if k in pruned else TrialState.COMPLETE
        study.tell(trial, curves[k][-1] if k in alive else None, state)
    return pruned


@pytest.mark.parametrize("name", PRUNED)
def test_members_are_ranked_after_all_have_reported(name):
    assert train(study_with(PRUNERS[name]()), CURVES) == PRUNED[name]


@pytest.mark.parametrize("name", PRUNERS)
def test_the_order_of_the_members_changes_nothing(name):
    verdicts = set()
    for seed in range(8):
        pruned = train(study_with(PRUNERS[name]()), CURVES * 2, random.Random(seed))
        verdicts.add(tuple(sorted(pruned.items())))
    assert len(verdicts) == 1


@pytest.mark.parametrize("name", ["median", "halving", "hyperband"])
def test_a_study_that_minimizes_prunes_the_mirror_image(name):
    mirrored = [[-value for value in curve] for curve in CURVES]
    pruned = train(study_with(PRUNERS[name](), "minimize"), mirrored)
    assert pruned == train(study_with(PRUNERS[name]()), CURVES)
    assert name == "hyperband" or pruned == PRUNED[name]


def test_values_are_in_the_study():
    study = study_with(PRUNERS["halving"]())
    train(study, CURVES)
    assert study.trials[1].intermediate_values == {100: 0.1}
    assert study.trials[8].intermediate_values == dict(zip(STEPS, CURVES[8], strict=True))
    assert study.trials[6].state == TrialState.PRUNED and len(study.trials) == 9


@pytest.mark.parametrize("name", ["median", "halving"])
def test_earlier_trials_are_compared_too(name):
    study = study_with(PRUNERS[name]())
    for _ in range(9):
        study.add_trial(create_trial(value=2.0, intermediate_values=dict.fromkeys(STEPS, 2.0)))
    # Neither waiting nor failed trials are.
    for state in (TrialState.FAIL, TrialState.RUNNING):
        study.add_trial(create_trial(state=state, intermediate_values={100: 3.0}))
    assert train(study, CURVES) == dict.fromkeys(range(9), 100)


def test_trials_of_an_earlier_stack_of_the_batch_are_compared_too():
    study = study_with(MedianPruner(n_startup_trials=1))
    rungs = Rungs([study.ask() for _ in range(5)])
    first, second = rungs.part([0, 1, 2]), rungs.part([4, 3])
    assert (first.numbers, second.numbers) == ([0, 1, 2], [4, 3])
    assert first.report({0: 0.1, 1: 0.6, 2: 0.7}, 100, 900) == {0}
    first.report({1: 0.6, 2: 0.7}, 900, 900)
    # Of these two, trial 3 is below the median. Of all five it is the median.
    assert second.report({3: 0.6, 4: 0.61}, 100, 900) == set()
    assert second.report({3: 0.59, 4: 0.61}, 200, 900) == set()  # its best counts


def test_a_rung_is_written_at_once_and_again_if_the_disk_had_no_room(tmp_path, monkeypatch):
    url = storage_url("journal", tmp_path)
    pruner = SuccessiveHalving(min_resource=100, reduction_factor=3)
    storage = open_storage(url, 5)
    study = optuna.create_study(
        storage=storage, direction="maximize", pruner=pruner, study_name="made_up"
    )
    rungs = Rungs([study.ask() for _ in range(3)])
    writes = []
    write = JournalFile._write

    def counted(self, logs):
        writes.append(len(logs))
        if len(writes) == 1:
            raise OSError(errno.ENOSPC, "no room")
        write(self, logs)

    monkeypatch.setattr(JournalFile, "_write", counted)
    assert rungs.report({0: 0.1, 1: 0.2, 2: 0.3}, 100, 900) == {0, 1}
    assert writes == [3, 3]
    again = optuna.load_study(study_name="made_up", storage=open_storage(url, 5))
    assert [t.intermediate_values for t in again.trials] == [{100: 0.1}, {100: 0.2}, {100: 0.3}]


def test_nobody_is_pruned_at_the_end():
    study = study_with(PRUNERS["halving"]())
    rungs = Rungs([study.ask() for _ in range(3)])
    assert rungs.report({0: 0.1, 1: 0.2, 2: 0.3}, 900, 900) == set()


@pytest.mark.parametrize("name", ["median", "halving"])
def test_nan_is_worst(name):
    study = study_with(PRUNERS[name]())
    rungs = Rungs([study.ask() for _ in range(6)])
    values = {0: float("nan"), 1: float("nan")} | dict.fromkeys(range(2, 6), 0.5)
    assert rungs.report(values, 100, 900) == {0, 1}
    everything = dict.fromkeys(range(2, 6), float("nan"))
    assert rungs.report(everything, 300, 900) == (set() if name == "median" else {2, 3, 4, 5})


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_wilcoxon_compares_with_the_best_of_the_batch():
    study = study_with(WilcoxonPruner(p_threshold=0.1))
    rungs = Rungs([study.ask() for _ in range(2)])
    lost = [rungs.report({0: 0.1 * step, 1: 0.2 * step}, step, 99) for step in range(1, 6)]
    assert lost[0] == set() and {0} in lost and {1} not in lost


def test_a_bracket_is_that_of_optuna():
    """Its samplers look at the trials of one bracket."""
    pruner = Hyperband(min_resource=100, max_resource=900, reduction_factor=3)
    study = study_with(pruner)
    train(study, CURVES)
    train(study, CURVES)
    pruner._try_initialization(study)
    brackets = [pruner._get_bracket_id(study, trial) for trial in study.trials]
    assert set(brackets) == {0, 1, 2}
    first_rung = [100, 300, 900]
    for trial, bracket in zip(study.trials, brackets, strict=True):
        assert trial.last_step >= first_rung[bracket]
    for bracket in range(2):
        last = [
            t.last_step for t, own in zip(study.trials, brackets, strict=True) if own == bracket
        ]
        assert first_rung[bracket] in last


def test_a_trial_alone_is_judged_as_by_optuna():
    ours, theirs = (
        study_with(pruner)
        for pruner in (
            SuccessiveHalving(100, 3),
            optuna.pruners.SuccessiveHalvingPruner(100, 3),
        )
    )
    verdicts = []
    for study in (ours, theirs):
        verdicts.append([])
        for curve in reversed(CURVES):
            trial = study.ask()
            trial.report(curve[0], 100)
            verdicts[-1].append(trial.should_prune())
            study.tell(trial, curve[0])
    assert verdicts[0] == verdicts[1] and any(verdicts[0])


class OwnPruner(BasePruner):
    def prune(self, study, trial):
        return True


@pytest.mark.parametrize(
    ("pruner", "directions", "named"),
    [
        (optuna.pruners.SuccessiveHalvingPruner(), ["maximize"], "SuccessiveHalvingPruner"),
        (OwnPruner(), ["maximize"], "OwnPruner"),
        (MedianPruner(), ["maximize", "minimize"], "one direction"),
    ],
    ids=["of_optuna", "unknown", "two_directions"],
)
def test_what_cannot_judge_a_batch_is_refused(pruner, directions, named):
    study = optuna.create_study(directions=directions, pruner=pruner)
    with pytest.raises(ValueError, match=named):
        Rungs([study.ask()])
