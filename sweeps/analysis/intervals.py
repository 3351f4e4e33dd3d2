"""Means over seeds, with percentile-bootstrap intervals."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_CONFIDENCE = 0.95
_MOST_RESAMPLES = 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval.

    Attributes:
        value: the mean.
        low: lower end of the interval, NaN for a single seed.
        high: upper end of the interval, NaN for a single seed.
        seeds: number of seeds.
        at_least: whether the edge of the grid cuts the value off, so that it is a lower bound.
    """

    value: float
    low: float
    high: float
    seeds: int
    at_least: bool = False


def estimate(values: Float[np.ndarray, "S"], at_least: bool = False) -> Estimate:
    """Return the mean over seeds with its percentile-bootstrap interval.

    If there are at most 20,000 resamples (S^S), all of them are used, otherwise 20,000 random ones
    from a fixed seed. With few seeds the interval is too narrow: with three it reaches at most from
    the smallest to the largest value.

    Args:
        values: one for each seed; NaN values are ignored.
        at_least: copied to the result.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, at_least)
    low, high = _interval(_resampled_means(values))
    return Estimate(float(values.mean()), low, high, values.size, at_least)


def estimate_rate(rates: Float[np.ndarray, "S"], at_least: bool = False) -> Estimate:
    """Return the geometric mean of learning rates, exp(mean(ln(rate))), with its interval."""
    found = estimate(np.log(rates), at_least)
    value, low, high = (math.exp(x) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.seeds, at_least)


def paired_difference(
    first: Float[np.ndarray, "S"], second: Float[np.ndarray, "S"], at_least: bool = False
) -> Estimate:
    """Return the mean of first - second over the seeds of both arms, with its interval.

    Args:
        first: one value for each seed, NaN for a seed that the arm lacks.
        second: the values of the other arm for the same seeds.
        at_least: copied to the result.

    Raises:
        ValueError: the arms do not have the same seeds.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise ValueError(
            "expected `first` and `second` to have values for the same seeds, got "
            f"{_count(first)} and {_count(second)}; use unpaired_difference"
        )
    return estimate(first - second, at_least)


def unpaired_difference(
    first: Float[np.ndarray, "S"], second: Float[np.ndarray, "T"], at_least: bool = False
) -> Estimate:
    """Return the difference of the means of two arms with different seeds, with its interval.

    Each arm is resampled by itself. `seeds` is the smaller of the two counts.
    """
    first, second = (np.asarray(v, dtype=float) for v in (first, second))
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    if first.size == 0 or second.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, at_least)
    # All pairs of resamples would be too many.
    generator = np.random.default_rng(0)
    means = [
        generator.choice(_resampled_means(values), _MOST_RESAMPLES) for values in (first, second)
    ]
    seeds = min(first.size, second.size)
    low, high = _interval(means[0] - means[1]) if seeds > 1 else (math.nan, math.nan)
    return Estimate(float(first.mean() - second.mean()), low, high, seeds, at_least)


def ratio(first: Float[np.ndarray, "S"], second: Float[np.ndarray, "S"]) -> Estimate:
    """Return the ratio of two means over the same seeds, with its interval.

    The value is infinite if only the second mean is 0, and NaN if both are 0.
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


def _resampled_means(values: np.ndarray) -> np.ndarray:
    size = values.size
    if size**size <= _MOST_RESAMPLES:
        picks = np.array(list(itertools.product(range(size), repeat=size)))
    else:
        picks = np.random.default_rng(0).integers(size, size=(_MOST_RESAMPLES, size))
    return values[picks].mean(axis=1)


def _interval(means: np.ndarray) -> tuple[float, float]:
    if len(means) < 2:
        return math.nan, math.nan
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _count(values: np.ndarray) -> str:
    return f"{int((~np.isnan(values)).sum())} of {values.size}"
