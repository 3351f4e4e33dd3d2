"""How much of the variance of accuracy each parameter of a grid explains (fANOVA)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bn_lightning.sweeps.analysis.memory_study import memory_study
from bn_lightning.sweeps.analysis.tolerance import FULL_ENOUGH, GridTrial, coverage

MOST_FOR_IMPORTANCES = 1000  # the time of the forest grows with the square of the trials


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
    if len({trial.accuracy for trial in trials}) < 2:
        return {}
    if len(trials) > MOST_FOR_IMPORTANCES:
        picks = np.random.default_rng(0).choice(len(trials), MOST_FOR_IMPORTANCES, replace=False)
        trials = [trials[i] for i in sorted(picks)]
    params = [{"lr": t.lr, "init": t.init, "seed": t.seed} for t in trials]
    distributions = {
        name: _distribution(name, [point[name] for point in params]) for name in params[0]
    }
    study = memory_study(["maximize"])
    for trial, point in zip(trials, params, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=point, distributions=distributions, value=trial.accuracy
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    varied = [name for name in distributions if not distributions[name].single()]
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied))


def _distribution(name: str, values: list[Any]) -> BaseDistribution:
    if name == "seed" or any(isinstance(value, str) for value in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    return FloatDistribution(min(values), max(values), log=True)
