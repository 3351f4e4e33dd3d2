"""The best trials, of Optuna's and of a table's rows."""

import math

import pytest
from optuna.study import StudyDirection
from optuna.trial import create_trial

from bn_lightning.sweeps.analysis.trials import TrialRow
from bn_lightning.sweeps.engine.best import best_trials

MIN, MAX = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE


def optunas(number, values):
    made = create_trial(values=values)
    made.number = number
    return made


def row(number, values):
    return TrialRow(number, "COMPLETE", tuple(values))


@pytest.mark.parametrize("make", [optunas, row])
@pytest.mark.parametrize(
    ("values", "directions", "numbers"),
    [
        ([[2], [1], [3], [1]], [MIN], [1]),
        ([[2], [1], [3], [1]], [MAX], [2]),
        ([[1, 1], [1, 2], [0, 0], [2, 1]], [MIN, MAX], [1, 2]),
        ([[1, 1], [1, 1], [2, 1]], [MIN, MIN], [0, 1]),
        ([[math.inf, 0], [math.inf, 1]], [MIN, MIN], [0]),
        ([], [MIN], []),
        ([], [MIN, MAX], []),
    ],
    ids=["smallest", "largest", "front", "equal", "infinite", "none", "none of several"],
)
def test_best_trials(make, values, directions, numbers):
    trials = [make(number, of_trial) for number, of_trial in enumerate(values)]
    assert [trial.number for trial in best_trials(trials, directions)] == numbers
