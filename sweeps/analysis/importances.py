"""How much of the variance of a result each parameter of a study explains (fANOVA)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from bn_lightning.sweeps.analysis.memory_study import memory_study
from bn_lightning.sweeps.analysis.tolerance import FULL_ENOUGH, GridTrial, coverage
from bn_lightning.sweeps.analysis.trials import Cell, TrialTable

MOST_FOR_IMPORTANCES = 1000  # the time of the forest grows with the trials
# Shares of 990 trials are within .01 of those of Optuna's 64 trees, in a quarter of the time.
_TREES = 16


def importances(trials: Iterable[GridTrial], random_sample: bool = False) -> dict[str, float]:
    """Return the share of the variance of accuracy that each parameter explains in one arm.

    Learning rates and numeric initializations are on a log scale. Only grids and random samples
    give meaningful shares: an adaptive sampler tries mostly good points. Of more than
    `MOST_FOR_IMPORTANCES` trials a random subset of that size is used.

    Args:
        trials: the trials of one arm.
        random_sample: whether the points are a random sample.

    Returns:
        Parameter -> its share, summing to 1; empty if accuracy does not vary.

    Raises:
        ValueError: the trials have several arms, or are neither a grid nor a random sample.

    Source: Hutter, Hoos & Leyton-Brown 2014, An Efficient Approach for Assessing Hyperparameter
    Importance, as implemented in Optuna.
    """
    trials = list(trials)
    arms = {trial.arm for trial in trials}
    if len(arms) > 1:
        raise ValueError(
            f"expected `trials` to be of one arm, got {', '.join(sorted(arms))}; pass one at a time"
        )
    if not random_sample and coverage(trials) < FULL_ENOUGH:
        raise ValueError(
            "expected trials on a grid, or `random_sample=True`, got points that share no rates "
            "and initializations; where a sampler chose them by their results, importances mislead"
        )
    trials = at_most(trials, MOST_FOR_IMPORTANCES)
    params = [{"lr": t.lr, "init": t.init, "seed": t.seed} for t in trials]
    distributions = {
        name: _distribution(name, [point[name] for point in params]) for name in params[0]
    }
    return _shares(params, [trial.accuracy for trial in trials], distributions)


def study_importances(table: TrialTable) -> tuple[dict[str, float], int]:
    """Return the share of the variance of a study's value that each parameter explains.

    Of a study whose sampler chose points by their results, the shares describe the region that it
    searched, not the whole space.

    Returns:
        Parameter -> its share, the largest first; empty if there are several values, or fewer than
        two different ones. And the number of trials that the shares rest on.
    """
    if len(table.directions) != 1:
        return {}, 0
    rows = [row for row in table.complete if math.isfinite(row.values[0])]
    rows = at_most(rows, MOST_FOR_IMPORTANCES)
    if not rows:
        return {}, 0
    names = [name for name in rows[0].params if all(name in row.params for row in rows)]
    points = [{name: row.params[name] for name in names} for row in rows]
    distributions = {
        name: distribution_of([point[name] for point in points], is_log_scale(table, name))
        for name in names
    }
    return _shares(points, [row.values[0] for row in rows], distributions), len(rows)


def at_most(items: Sequence[Any], count: int) -> list[Any]:
    """Return the items, or a random subset of `count` in their order, the same each time."""
    if len(items) <= count:
        return list(items)
    picks = np.random.default_rng(0).choice(len(items), count, replace=False)
    return [items[i] for i in sorted(picks)]


def is_log_scale(table: TrialTable, name: str) -> bool:
    """Return whether a parameter is better seen on a logarithmic scale.

    It is if the study drew it on one. Values that are all above 0 are also if neighbors differ more
    equally by ratios than by differences, and two values if their ratio is 10 or more.
    """
    if name in (table.about.get("log") or ()):
        return True
    values = {row.params[name] for row in table.complete if name in row.params}
    numbers = sorted(v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    if len(numbers) < max(len(values), 2) or numbers[0] <= 0 or not math.isfinite(numbers[-1]):
        return False
    if len(numbers) == 2:
        return numbers[1] / numbers[0] >= 10
    of_ratios, of_differences = (
        np.std(steps) / np.mean(steps) for steps in (np.diff(np.log(numbers)), np.diff(numbers))
    )
    return bool(of_ratios < of_differences)


def distribution_of(values: Sequence[Cell], is_log: bool) -> BaseDistribution:
    """Return a distribution that could have drawn these values."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not all(math.isfinite(number) for number in numbers):
        return CategoricalDistribution(list(dict.fromkeys(values)))
    low, high = min(numbers), max(numbers)
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _shares(
    points: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    distributions: Mapping[str, BaseDistribution],
) -> dict[str, float]:
    varied = [name for name in distributions if not distributions[name].single()]
    if len(set(values)) < 2 or not varied:
        return {}
    study = memory_study(["maximize"])
    for point, value in zip(points, values, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(point), distributions=dict(distributions), value=value
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied))


def _distribution(name: str, values: list[Any]) -> BaseDistribution:
    if name == "seed" or any(isinstance(value, str) for value in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    return FloatDistribution(min(values), max(values), log=True)
