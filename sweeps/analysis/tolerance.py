"""How much a network tolerates: pure functions from accuracies over a grid to numbers.

A grid has the axes I (initialisations), R (learning rates) and S (seeds); its two arms, with and
without BatchNorm, share them, and with them the weights and batches that a seed stands for. A trial
that diverged has the accuracy of a guess; one that is missing is NaN.

Everything is computed for each seed by itself first. The number that is reported is the mean over
seeds, and its interval comes from resampling them.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

TRAINED = 0.90  # accuracy from which on a cell has trained
AT_CHANCE = 0.20  # accuracy below which it has not learnt, for ten classes of equal size
NEAR_CHANCE = 0.10  # how far above a guess's accuracy a cell may be at chance, at most

FULL_ENOUGH = 0.5  # share of its places from which on points count as a grid with gaps
MOST_FOR_IMPORTANCES = 1000  # the forest's time grows with the square of the trials

_CONFIDENCE = 0.95
_DRAWS = 20_000


class Outcome(StrEnum):
    """What became of a trial."""

    TRAINED = "trained"  # accuracy >= Levels.trained
    SLOW = "slow"  # between the two: better than a guess when the budget ended
    CHANCE = "chance"  # accuracy < Levels.at_chance, with a finite loss
    DIVERGED = "diverged"  # the run ended early: its loss was no number, or too high for too long
    MISSING = "missing"  # not run, failed, pruned


@dataclass(frozen=True)
class Trial:
    """One finished trial.

    Args:
        arm: which network, for instance "batch" or "none".
        init: name of the initialisation, or its standard deviation.
        lr: learning rate, above 0.
        seed: of weights and batches.
        accuracy: on the test set, in [0, 1]; a guess's where the trial diverged.
        loss: on the test set, in nats; a guess's where the trial diverged.
        diverged: whether its run did.
    """

    arm: str
    init: str | float
    lr: float
    seed: int
    accuracy: float
    loss: float
    diverged: bool = False


@dataclass(frozen=True)
class Levels:
    """Which accuracies tell apart what became of a cell.

    Args:
        trained: from it on a cell has trained, in (at_chance, 1].
        at_chance: below it a cell has not learnt.

    Raises:
        ValueError: not at_chance < trained <= 1.
    """

    trained: float = TRAINED
    at_chance: float = AT_CHANCE

    def __post_init__(self) -> None:
        if not self.at_chance < self.trained <= 1:
            raise ValueError(
                f"`--threshold` expected an accuracy above {self.at_chance:.3g}, below which a "
                f"cell is at chance, and at most 1, got {self.trained:.3g}"
            )

    @classmethod
    def of(cls, classes: int, trained: float = TRAINED) -> "Levels":
        """The levels for a number of classes of equal size.

            at_chance = min(2 / classes, 1 / classes + NEAR_CHANCE)

        Twice a guess's accuracy, but for few classes not far above it: .20 for ten, .60 for two.
        """
        return cls(trained, min(2 / classes, 1 / classes + NEAR_CHANCE))


TEN_CLASSES = Levels()


@dataclass(frozen=True)
class Arm:
    """One arm of a grid.

    Args:
        accuracy: (I, R, S), NaN where a trial is missing.
        loss: (I, R, S), in nats, NaN where a trial is missing.
        diverged: (I, R, S).
        levels: what accuracies mean.
    """

    accuracy: Float[np.ndarray, "I R S"]
    loss: Float[np.ndarray, "I R S"]
    diverged: Bool[np.ndarray, "I R S"]
    levels: Levels = TEN_CLASSES

    @property
    def missing(self) -> int:
        """The number of trials that are not there."""
        return int(np.isnan(self.accuracy).sum())

    def outcomes(self) -> np.ndarray:
        """An `Outcome` for each trial, (I, R, S)."""
        names = np.full(self.accuracy.shape, Outcome.SLOW, dtype=object)
        names[self.accuracy >= self.levels.trained] = Outcome.TRAINED
        names[self.accuracy < self.levels.at_chance] = Outcome.CHANCE
        names[self.diverged] = Outcome.DIVERGED
        names[np.isnan(self.accuracy)] = Outcome.MISSING
        return names


@dataclass(frozen=True)
class Grid:
    """Arms over the same initialisations, learning rates and seeds.

    Args:
        inits: (I,), standard deviations in ascending order, or names.
        rates: (R,), ascending.
        seeds: (S,), ascending.
        arms: name -> results.
        levels: what accuracies mean, those of all arms.
    """

    inits: tuple[str | float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: Mapping[str, Arm]
    levels: Levels = TEN_CLASSES

    @classmethod
    def of(cls, trials: Iterable[Trial], levels: Levels = TEN_CLASSES) -> "Grid":
        """Arranges trials; what some arm has and another lacks is missing there.

        Raises:
            ValueError: there is no trial, or there are two for one place.
        """
        trials = list(trials)
        if not trials:
            raise ValueError("expected at least one finished trial, got none")
        inits = _sorted({trial.init for trial in trials})
        rates = tuple(sorted({trial.lr for trial in trials}))
        seeds = tuple(sorted({trial.seed for trial in trials}))
        shape = (len(inits), len(rates), len(seeds))
        arms = {
            name: Arm(np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, bool), levels)
            for name in sorted({trial.arm for trial in trials})
        }
        for trial in trials:
            arm = arms[trial.arm]
            place = inits.index(trial.init), rates.index(trial.lr), seeds.index(trial.seed)
            if not np.isnan(arm.accuracy[place]):
                raise ValueError(f"expected one trial for each place of the grid, got two: {trial}")
            arm.accuracy[place] = trial.accuracy
            arm.loss[place] = trial.loss
            arm.diverged[place] = trial.diverged
        return cls(inits, rates, seeds, arms, levels)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Args:
        value: the mean.
        low: lower end of the interval, NaN for a single seed.
        high: upper end of the interval, NaN for a single seed.
        seeds: how many there were.
        at_least: whether the grid's edge cut it off, so that the true value may be larger.
    """

    value: float
    low: float
    high: float
    seeds: int
    at_least: bool = False


def share_trained(
    accuracy: Float[np.ndarray, "I R S"], trained: float = TRAINED
) -> Float[np.ndarray, "S"]:
    """Share of cells with accuracy >= `trained`, for each seed; missing ones do not count."""
    return _share(accuracy >= trained, accuracy)


def share_diverged(
    diverged: Bool[np.ndarray, "I R S"], accuracy: Float[np.ndarray, "I R S"]
) -> Float[np.ndarray, "S"]:
    """Share of cells that diverged, for each seed, of those not missing."""
    return _share(diverged, accuracy)


def share_at_chance(
    accuracy: Float[np.ndarray, "I R S"], at_chance: float = AT_CHANCE
) -> Float[np.ndarray, "S"]:
    """Share of cells with accuracy < `at_chance`, for each seed; missing ones do not count."""
    return _share(accuracy < at_chance, accuracy)


def widths(
    accuracy: Float[np.ndarray, "I R S"], rates: Sequence[float], trained: float = TRAINED
) -> tuple[Float[np.ndarray, "I S"], Bool[np.ndarray, "I S"]]:
    """How many decades of learning rate train, for each initialisation and seed.

        width = sum over the trained rates of the decades that each stands for

    A rate stands for all up to the half-way points, in log10, to its neighbours, the outer ones for
    as much on the far side as on the near one; on a grid of half decades each stands for 0.5.

    Args:
        accuracy: NaN, a missing trial, has not trained.
        rates: (R,), ascending, at least two.
        trained: accuracy from which on a rate has trained.

    Returns:
        The widths in decades, NaN where all rates are missing, and whether the lowest or highest
        rate trains, so that the width is a lower bound.

    Raises:
        ValueError: fewer than two rates, or not in ascending order.
    """
    if len(rates) < 2 or any(a >= b for a, b in itertools.pairwise(rates)):
        raise ValueError(f"expected at least two `rates` in ascending order, got {list(rates)}")
    logs_R = np.log10(rates)
    middle_R = (logs_R[1:] + logs_R[:-1]) / 2
    edges_R = [2 * logs_R[0] - middle_R[0], *middle_R, 2 * logs_R[-1] - middle_R[-1]]
    trained_IRS = accuracy >= trained
    width_IS = np.einsum("irs,r->is", trained_IRS, np.diff(edges_R))
    width_IS[np.isnan(accuracy).all(axis=1)] = np.nan
    return width_IS, trained_IRS[:, 0] | trained_IRS[:, -1]


def mean_width(
    accuracy: Float[np.ndarray, "I R S"], rates: Sequence[float], trained: float = TRAINED
) -> Float[np.ndarray, "S"]:
    """The mean of `widths` over the initialisations that were tried, in decades, for each seed."""
    width_IS = widths(accuracy, rates, trained)[0]
    there = ~np.isnan(width_IS)
    with np.errstate(invalid="ignore"):
        return np.where(there, width_IS, 0).sum(axis=0) / there.sum(axis=0)


def inits_that_train(
    accuracy: Float[np.ndarray, "I R S"], trained: float = TRAINED
) -> Float[np.ndarray, "S"]:
    """The number of initialisations with a rate that trains, for each seed; NaN without trials."""
    count_S = (accuracy >= trained).any(axis=1).sum(axis=0).astype(float)
    return np.where(np.isnan(accuracy).all(axis=(0, 1)), np.nan, count_S)


def largest_rate(
    accuracy: Float[np.ndarray, "I R S"], rates: Sequence[float], trained: float = TRAINED
) -> Float[np.ndarray, "I S"]:
    """The largest rate that trains, for each initialisation and seed; NaN where none does."""
    rates_R = np.asarray(rates, dtype=float)
    best_IS = np.where(accuracy >= trained, rates_R[None, :, None], -np.inf).max(axis=1)
    return np.where(np.isfinite(best_IS), best_IS, np.nan)


def rate_sensitivity(
    loss: Float[np.ndarray, "I R S"], chance_loss: float
) -> Float[np.ndarray, "I S"]:
    """How much is lost by not knowing the best rate, for each initialisation and seed, in nats.

        sensitivity = mean over rates of min(loss, chance_loss) - min over rates of the same

    Missing trials do not count.

    Args:
        loss: of the trained network, in nats.
        chance_loss: of a guess, ln(number of classes).

    Source: Wortsman et al. 2023, arXiv 2309.14322, section 2.2.
    """
    bounded = np.minimum(loss, chance_loss)  # of NaN and a number, numpy's is NaN
    with np.errstate(invalid="ignore"):
        found = ~np.isnan(bounded)
        best = np.where(found, bounded, np.inf).min(axis=1, keepdims=True)
        return np.where(found, bounded - best, 0).sum(axis=1) / found.sum(axis=1)


def estimate(values: Float[np.ndarray, "S"], at_least: bool = False) -> Estimate:
    """The mean over seeds, with the percentile bootstrap's 95% interval.

    All S^S resamples are taken where there are at most 20,000, else that many at random, the same
    in every call. With few seeds the interval is too narrow: of three, at best the smallest and the
    largest value.

    Args:
        values: one for each seed; NaN, a seed without a value, is left out.
        at_least: passed on.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, at_least)
    low, high = _interval(_resampled_means(values))
    return Estimate(float(values.mean()), low, high, values.size, at_least)


def estimate_rate(rates: Float[np.ndarray, "S"], at_least: bool = False) -> Estimate:
    """As `estimate`, of learning rates: their geometric mean, exp(mean(ln(rate))).

    A grid's rates lie evenly in decades, and so must their mean.
    """
    found = estimate(np.log(rates), at_least)
    value, low, high = (math.exp(x) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.seeds, at_least)


def paired_difference(
    first: Float[np.ndarray, "S"], second: Float[np.ndarray, "S"], at_least: bool = False
) -> Estimate:
    """The mean of first - second over the seeds that both arms have, as `estimate` gives it.

    Args:
        first: one value for each seed, NaN where this arm lacks it.
        second: of the other arm, in the same order of seeds.
        at_least: passed on.

    Raises:
        ValueError: not as many values, or a seed that only one arm has: such arms are not paired.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise ValueError(
            "expected both arms to have the same seeds for a paired difference, got "
            f"{_count(first)} and {_count(second)}; use unpaired_difference"
        )
    return estimate(first - second, at_least)


def unpaired_difference(
    first: Float[np.ndarray, "S"], second: Float[np.ndarray, "T"], at_least: bool = False
) -> Estimate:
    """The difference of the means of two arms whose seeds differ, each resampled by itself.

    The count of seeds is the smaller one.
    """
    first, second = (np.asarray(v, dtype=float) for v in (first, second))
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    if first.size == 0 or second.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, at_least)
    # Every resample of the one against every resample of the other would be too many.
    generator = np.random.default_rng(0)
    means = [generator.choice(_resampled_means(values), _DRAWS) for values in (first, second)]
    low, high = (
        (math.nan, math.nan) if min(first.size, second.size) < 2 else _interval(means[0] - means[1])
    )
    value = float(first.mean() - second.mean())
    return Estimate(value, low, high, min(first.size, second.size), at_least)


def ratio(first: Float[np.ndarray, "S"], second: Float[np.ndarray, "S"]) -> Estimate:
    """The ratio of the means over seeds, both resampled with the same seeds.

    Infinite where the second mean is 0 and the first is not, NaN where both are.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    if first.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = _resampled_means(first) / _resampled_means(second)
        value = float(np.divide(first.mean(), second.mean()))
    low, high = _interval(means)
    return Estimate(value, low, high, first.size)


def coverage(trials: Iterable[Trial]) -> float:
    """Share of the places of an arm's grid that are filled, over its initialisations, rates, seeds.

    1 for a full grid; far below 1 for points drawn from intervals, of which no two share a rate.
    """
    trials = list(trials)
    places = {(trial.arm, trial.init, trial.lr, trial.seed) for trial in trials}
    axes = [{getattr(trial, name) for trial in trials} for name in ("arm", "init", "lr", "seed")]
    return len(places) / max(math.prod(len(values) for values in axes), 1)


def importances(trials: Iterable[Trial], random_sample: bool = False) -> dict[str, float]:
    """How much of the variance of accuracy each parameter explains in one arm, by fANOVA.

    Learning rates, and standard deviations where initialisations are numbers, count on a log scale.
    Only for grids and random samples: a sampler that looks where it is good has hidden the rest.
    Of more than `MOST_FOR_IMPORTANCES` trials, that many drawn at random count.

    Args:
        trials: of one arm, at least two that differ in accuracy.
        random_sample: the points were drawn at random, not by a sampler that learns.

    Returns:
        Parameter -> its share, summing to 1; empty where accuracy does not vary.

    Raises:
        ValueError: the trials are of more than one arm, or neither a grid nor a random sample.

    Source: Hutter, Hoos & Leyton-Brown 2014, An Efficient Approach for Assessing Hyperparameter
    Importance, as implemented in Optuna.
    """
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )

    from bn_lightning.sweeps.report.memory_study import memory_study

    trials = list(trials)
    arms = {trial.arm for trial in trials}
    if len(arms) > 1:
        raise ValueError(f"expected trials of one arm, got {', '.join(sorted(arms))}")
    if not random_sample and coverage(trials) < FULL_ENOUGH:
        raise ValueError(
            "expected trials on a grid, or `random_sample=True`, got points that share no rates "
            "and initialisations; where a sampler chose them by their results, importances mislead"
        )
    if len({trial.accuracy for trial in trials}) < 2:
        return {}
    if len(trials) > MOST_FOR_IMPORTANCES:
        picks = np.random.default_rng(0).choice(len(trials), MOST_FOR_IMPORTANCES, replace=False)
        trials = [trials[i] for i in sorted(picks)]
    study = memory_study(["maximize"])
    values: dict[str, list[Any]] = {
        "lr": [trial.lr for trial in trials],
        "init": [trial.init for trial in trials],
        "seed": [trial.seed for trial in trials],
    }
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted(set(several), key=str))
        if name == "seed" or any(isinstance(value, str) for value in several)
        else FloatDistribution(min(several), max(several), log=True)
        for name, several in values.items()
    }
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                params={"lr": trial.lr, "init": trial.init, "seed": trial.seed},
                distributions=distributions,
                value=trial.accuracy,
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    varied = [name for name in distributions if not distributions[name].single()]
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied))


def _share(of_them: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    there = (~np.isnan(accuracy)).sum(axis=(0, 1))
    with np.errstate(invalid="ignore"):
        return of_them.sum(axis=(0, 1)) / np.where(there, there, np.nan)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    size = values.size
    if size**size <= _DRAWS:
        picks = np.array(list(itertools.product(range(size), repeat=size)))
    else:
        picks = np.random.default_rng(0).integers(size, size=(_DRAWS, size))
    return values[picks].mean(axis=1)


def _interval(means: np.ndarray) -> tuple[float, float]:
    if len(means) < 2:
        return math.nan, math.nan
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _count(values: np.ndarray) -> str:
    return f"{int((~np.isnan(values)).sum())} of {values.size}"


def _sorted(inits: set[str | float]) -> tuple[str | float, ...]:
    """Numbers first, ascending; then names."""
    numbers = sorted(i for i in inits if not isinstance(i, str))
    return (*numbers, *sorted(i for i in inits if isinstance(i, str)))
