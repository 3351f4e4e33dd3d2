"""The tolerance of a network to learning rate and initialization, from accuracies over a grid.

A grid has the axes I (initializations), R (learning rates) and S (seeds). Its arms, for instance
with and without BatchNorm, share all three, so trials with the same seed start from the same
weights and see the same batches. A trial that diverged has the accuracy of a guess. A missing trial
is NaN.

All functions return one number for each seed; intervals.py averages over seeds.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

TRAINED = 0.90  # a cell with this accuracy or more has trained
AT_CHANCE = 0.20  # a cell below this accuracy has learnt nothing, for ten classes of equal size
NEAR_CHANCE = 0.10  # upper bound on AT_CHANCE minus the accuracy of a guess

FULL_ENOUGH = 0.5  # points that fill this share of their grid or more count as a grid


class GridOutcome(StrEnum):
    """The result of a trial in words."""

    TRAINED = "trained"  # accuracy >= Levels.trained
    SLOW = "slow"  # between the two levels when the budget ended
    CHANCE = "chance"  # accuracy < Levels.at_chance, with a finite loss
    DIVERGED = "diverged"  # the run ended early: its loss was NaN, or too high for too long
    MISSING = "missing"  # not run, failed or pruned


@dataclass(frozen=True)
class GridTrial:
    """One finished trial of a grid.

    Attributes:
        arm: name of the network, for instance "batch" or "none".
        init: name of the initialization, or its standard deviation.
        lr: learning rate, above 0.
        seed: seed of weights and batches, or a text if it is unknown.
        accuracy: on the test set, in [0, 1]; that of a guess if the trial diverged. Another metric
            in a grid of which only its values are shown.
        loss: on the test set, in nats; that of a guess if the trial diverged.
        diverged: whether the run diverged.
    """

    arm: str
    init: str | float
    lr: float
    seed: int | str
    accuracy: float
    loss: float
    diverged: bool = False


@dataclass(frozen=True)
class Levels:
    """The accuracies between the outcomes of a trial.

    Attributes:
        trained: a cell with this accuracy or more has trained, in (at_chance, 1].
        at_chance: a cell below this accuracy has learnt nothing; 0 if the number of classes is
            unknown, so that no cell counts as such.

    Raises:
        ValueError: not at_chance < trained <= 1.
    """

    trained: float = TRAINED
    at_chance: float = AT_CHANCE

    def __post_init__(self) -> None:
        if not self.at_chance < self.trained <= 1:
            raise ValueError(
                f"expected `--threshold` to be above {self.at_chance:.3g}, the accuracy of a cell "
                f"at chance, and at most 1, got {self.trained:.3g}"
            )

    @classmethod
    def of(cls, classes: int | None, trained: float = TRAINED) -> "Levels":
        """Return the levels for a number of classes of equal size.

            at_chance = min(2 / classes, 1 / classes + NEAR_CHANCE)

        This is .20 for ten classes and .60 for two. None is an unknown number of classes.
        """
        if classes is None:
            return cls(trained, 0.0)
        return cls(trained, min(2 / classes, 1 / classes + NEAR_CHANCE))


TEN_CLASSES = Levels()


@dataclass(frozen=True)
class Arm:
    """One arm of a grid.

    Attributes:
        accuracy: (I, R, S), NaN for a missing trial.
        loss: (I, R, S), in nats, NaN for a missing trial.
        diverged: (I, R, S).
        levels: the accuracies between outcomes.
    """

    accuracy: Float[np.ndarray, "I R S"]
    loss: Float[np.ndarray, "I R S"]
    diverged: Bool[np.ndarray, "I R S"]
    levels: Levels = TEN_CLASSES

    @property
    def missing(self) -> int:
        """The number of missing trials."""
        return int(np.isnan(self.accuracy).sum())

    def outcomes(self) -> np.ndarray:
        """Return a `GridOutcome` for each trial, (I, R, S)."""
        names = np.full(self.accuracy.shape, GridOutcome.SLOW, dtype=object)
        names[self.accuracy >= self.levels.trained] = GridOutcome.TRAINED
        names[self.accuracy < self.levels.at_chance] = GridOutcome.CHANCE
        names[self.diverged] = GridOutcome.DIVERGED
        names[np.isnan(self.accuracy)] = GridOutcome.MISSING
        return names


@dataclass(frozen=True)
class Grid:
    """Arms over the same initializations, learning rates and seeds.

    Attributes:
        inits: (I,), ascending standard deviations, then names.
        rates: (R,), ascending.
        seeds: (S,), ascending.
        arms: name -> results.
        levels: the accuracies between outcomes, the same for all arms.
    """

    inits: tuple[str | float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int | str, ...]
    arms: Mapping[str, Arm]
    levels: Levels = TEN_CLASSES

    @classmethod
    def of(cls, trials: Iterable[GridTrial], levels: Levels = TEN_CLASSES) -> "Grid":
        """Return the grid of these trials; a place without a trial is missing.

        Raises:
            ValueError: there is no trial, or there are two for one place.
        """
        trials = list(trials)
        if not trials:
            raise ValueError("expected `trials` to have at least one finished trial, got none")
        inits = _sorted({trial.init for trial in trials})
        rates = tuple(sorted({trial.lr for trial in trials}))
        seeds = _sorted({trial.seed for trial in trials})
        shape = (len(inits), len(rates), len(seeds))
        arms = {
            name: Arm(np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, bool), levels)
            for name in sorted({trial.arm for trial in trials})
        }
        for trial in trials:
            arm = arms[trial.arm]
            place = inits.index(trial.init), rates.index(trial.lr), seeds.index(trial.seed)
            if not np.isnan(arm.accuracy[place]):
                raise ValueError(
                    f"expected `trials` to have one trial for each place, got a second: {trial}"
                )
            arm.accuracy[place] = trial.accuracy
            arm.loss[place] = trial.loss
            arm.diverged[place] = trial.diverged
        return cls(inits, rates, seeds, arms, levels)


def share_trained(
    accuracy: Float[np.ndarray, "I R S"], trained: float = TRAINED
) -> Float[np.ndarray, "S"]:
    """Return the share of cells with accuracy >= `trained` for each seed, without missing ones."""
    return _share(accuracy >= trained, accuracy)


def share_diverged(
    diverged: Bool[np.ndarray, "I R S"], accuracy: Float[np.ndarray, "I R S"]
) -> Float[np.ndarray, "S"]:
    """Return the share of cells that diverged for each seed, without missing ones."""
    return _share(diverged, accuracy)


def share_at_chance(
    accuracy: Float[np.ndarray, "I R S"], at_chance: float = AT_CHANCE
) -> Float[np.ndarray, "S"]:
    """Return the share of cells with accuracy < `at_chance` for each seed, without missing ones."""
    return _share(accuracy < at_chance, accuracy)


def widths(
    accuracy: Float[np.ndarray, "I R S"], rates: Sequence[float], trained: float = TRAINED
) -> tuple[Float[np.ndarray, "I S"], Bool[np.ndarray, "I S"]]:
    """Return the decades of learning rate that train, for each initialization and seed.

        width = sum of the decades of all trained rates

    The decades of a rate reach, in log10, half-way to its neighbors; the first and the last rate
    reach equally far on both sides. On a grid of half decades each rate has 0.5.

    Args:
        accuracy: a missing trial, NaN, counts as not trained.
        rates: (R,), ascending, at least two.
        trained: a rate with this accuracy or more has trained.

    Returns:
        The widths in decades, NaN where all rates are missing; and whether the first or the last
        rate trains, so that the width is a lower bound.

    Raises:
        ValueError: there are fewer than two rates, or they are not ascending.
    """
    if len(rates) < 2 or any(a >= b for a, b in itertools.pairwise(rates)):
        raise ValueError(
            f"expected `rates` to be at least two in ascending order, got {list(rates)}"
        )
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
    """Return the mean of `widths` over initializations that have trials, for each seed."""
    width_IS = widths(accuracy, rates, trained)[0]
    there = ~np.isnan(width_IS)
    with np.errstate(invalid="ignore"):
        return np.where(there, width_IS, 0).sum(axis=0) / there.sum(axis=0)


def inits_that_train(
    accuracy: Float[np.ndarray, "I R S"], trained: float = TRAINED
) -> Float[np.ndarray, "S"]:
    """Return how many initializations train at some rate, for each seed; NaN without trials."""
    count_S = (accuracy >= trained).any(axis=1).sum(axis=0).astype(float)
    return np.where(np.isnan(accuracy).all(axis=(0, 1)), np.nan, count_S)


def largest_rate(
    accuracy: Float[np.ndarray, "I R S"], rates: Sequence[float], trained: float = TRAINED
) -> Float[np.ndarray, "I S"]:
    """Return the largest rate that trains for each initialization and seed, NaN if none does."""
    rates_R = np.asarray(rates, dtype=float)
    best_IS = np.where(accuracy >= trained, rates_R[None, :, None], -np.inf).max(axis=1)
    return np.where(np.isfinite(best_IS), best_IS, np.nan)


def rate_sensitivity(
    loss: Float[np.ndarray, "I R S"], chance_loss: float
) -> Float[np.ndarray, "I S"]:
    """Return the mean loss over rates minus the loss at the best rate, in nats.

        sensitivity = mean over rates of min(loss, chance_loss) - min over rates of the same

    Missing trials are ignored.

    Args:
        loss: of the trained network, in nats.
        chance_loss: of a guess, ln(number of classes).

    Source: Wortsman et al. 2023, arXiv 2309.14322, section 2.2.
    """
    bounded = np.minimum(loss, chance_loss)  # keeps NaN
    with np.errstate(invalid="ignore"):
        found = ~np.isnan(bounded)
        best = np.where(found, bounded, np.inf).min(axis=1, keepdims=True)
        return np.where(found, bounded - best, 0).sum(axis=1) / found.sum(axis=1)


def coverage(trials: Iterable[GridTrial]) -> float:
    """Return the share of places of arm, initialization, rate and seed that have a trial.

    It is 1 for a full grid, and far below 1 for random points of intervals.
    """
    trials = list(trials)
    places = {(trial.arm, trial.init, trial.lr, trial.seed) for trial in trials}
    axes = [{getattr(trial, name) for trial in trials} for name in ("arm", "init", "lr", "seed")]
    return len(places) / max(math.prod(len(values) for values in axes), 1)


def _share(of_them: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    there = (~np.isnan(accuracy)).sum(axis=(0, 1))
    with np.errstate(invalid="ignore"):
        return of_them.sum(axis=(0, 1)) / np.where(there, there, np.nan)


def _sorted(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return ascending numbers, then names."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))
