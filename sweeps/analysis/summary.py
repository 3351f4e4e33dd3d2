"""The numbers of a tolerance grid, each with its interval, and the sentences that report them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from bn_lightning.sweeps.analysis import intervals, tolerance
from bn_lightning.sweeps.analysis.arms import AS_CONFIGURED, BASELINE, label_of, ordered
from bn_lightning.sweeps.analysis.importances import importances
from bn_lightning.sweeps.analysis.intervals import Estimate
from bn_lightning.sweeps.analysis.tolerance import (
    TEN_CLASSES,
    TRAINED,
    Arm,
    Grid,
    GridOutcome,
    GridTrial,
    Levels,
)

SHARE, WIDTH, INITS = "share_trained", "mean_width", "inits_that_train"
CHANCE_SHARE = "share_at_chance"


def measures_of(levels: Levels) -> dict[str, str]:
    """Return measure -> its description; functions of tolerance.py compute them.

    Where the number of classes is unknown, there is no share of cells at chance.
    """
    texts = {
        SHARE: f"share of cells with accuracy ≥ {levels.trained:.2f}",
        CHANCE_SHARE: f"share of cells that fail, accuracy < {levels.at_chance:.2f}",
        "share_diverged": "share of cells that diverged",
        WIDTH: "decades of learning rate that train, mean over initializations",
        INITS: "initializations that train at some learning rate",
    }
    if not levels.at_chance:
        del texts[CHANCE_SHARE]
    return texts


@dataclass(frozen=True)
class InitSummary:
    """The numbers of one arm at one initialization.

    Attributes:
        init: name or standard deviation.
        width: of the learning rates that train, in decades.
        largest_rate: that trains, the geometric mean over seeds.
        rate_sensitivity: in nats.
    """

    init: str | float
    width: Estimate
    largest_rate: Estimate
    rate_sensitivity: Estimate


@dataclass(frozen=True)
class ArmSummary:
    """The numbers of one arm.

    Attributes:
        label: its name in sentences.
        trials: number of its trials.
        outcomes: outcome -> number of trials.
        measures: those of `measures_of`, without the width if there is one rate only.
        inits: in the order of the grid.
        importances: parameter -> share of the variance of accuracy.
    """

    label: str
    trials: int
    outcomes: dict[str, int]
    measures: dict[str, Estimate]
    inits: tuple[InitSummary, ...]
    importances: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The differences between two arms.

    Attributes:
        first: name of an arm.
        second: name of the arm that is subtracted, the one without normalization if there is one.
        is_paired: whether both arms have the same seeds, which are then compared one by one.
        cells: number of (initialization, rate) pairs with trials of both arms.
        differences: of the measures.
        ratio: of the shares that train.
        headroom: (initialization, ratio of the largest rates), at the initialization where the most
            rates train `second`.
    """

    first: str
    second: str
    is_paired: bool
    cells: int
    differences: dict[str, Estimate]
    ratio: Estimate
    headroom: tuple[str | float, float] | None


@dataclass(frozen=True)
class Summary:
    """All numbers of a grid.

    Attributes:
        grid: the accuracies.
        arms: name -> numbers, in the order of the report.
        comparisons: each arm with the one without normalization, or else with the last.
        notes: caveats, in sentences.
    """

    grid: Grid
    arms: dict[str, ArmSummary]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the part of summary.json that depends on the grid."""
        return {
            "grid": {
                "inits": list(self.grid.inits),
                "rates": list(self.grid.rates),
                "seeds": list(self.grid.seeds),
            },
            "arms": {name: asdict(found) for name, found in self.arms.items()},
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "notes": list(self.notes),
            "sentences": sentences(self),
        }


def summarize(
    trials: Iterable[GridTrial],
    chance_loss: float,
    is_planned: bool | None = None,
    levels: Levels = TEN_CLASSES,
) -> Summary:
    """Compute all numbers of a grid.

    Args:
        trials: one for each place.
        chance_loss: the loss of a guess, in nats; NaN if unknown, so that there are no
            sensitivities.
        is_planned: whether the points were chosen before any result; None if unknown, so that
            importances are computed for full grids only.
        levels: the accuracies between outcomes.

    Raises:
        ValueError: there is no trial.
    """
    trials = list(trials)
    grid = Grid.of(trials, levels)
    names = ordered(grid.arms)
    grid = replace(grid, arms={name: grid.arms[name] for name in names})
    notes = []
    if levels.trained != TRAINED:
        notes.append(f"A cell trains here from accuracy {levels.trained:.2f} on.")
    arms = {}
    for name in names:
        shares: dict[str, float] = {}
        try:
            if is_planned is False:
                raise ValueError("an adaptive sampler chose the points")
            of_arm = [trial for trial in trials if trial.arm == name]
            found = importances(of_arm, random_sample=is_planned is True)
            shares = {key: float(value) for key, value in sorted(found.items())}
        except ValueError as error:
            notes.append(f"No importances of {label_of(name)}: {error}.")
        arms[name] = _of_arm(grid, name, chance_loss, shares)
    baseline = BASELINE if BASELINE in names else names[-1]
    comparisons = tuple(_compare(grid, name, baseline) for name in names if name != baseline)
    return Summary(grid, arms, comparisons, (*_notes(grid, comparisons), *notes))


def measure(grid: Grid, arm: Arm) -> tuple[dict[str, Float[np.ndarray, "S"]], bool]:
    """Return the measures for each seed, and whether the edge of the grid cuts off a width."""
    accuracy, trained = arm.accuracy, grid.levels.trained
    values = {SHARE: tolerance.share_trained(accuracy, trained)}
    if grid.levels.at_chance:
        values[CHANCE_SHARE] = tolerance.share_at_chance(accuracy, grid.levels.at_chance)
    values["share_diverged"] = tolerance.share_diverged(arm.diverged, accuracy)
    censored = False
    if len(grid.rates) > 1:
        values[WIDTH] = tolerance.mean_width(accuracy, grid.rates, trained)
        censored = bool(tolerance.widths(accuracy, grid.rates, trained)[1].any())
    values[INITS] = tolerance.inits_that_train(accuracy, trained)
    return values, censored


def sentences(found: Summary) -> list[str]:
    """Return the results of a grid in sentences."""
    texts = []
    for pair in found.comparisons:
        first, second = found.arms[pair.first], found.arms[pair.second]
        texts += _comparison_sentences(found.grid, pair, first, second)
    if not found.comparisons:
        (arm,) = found.arms.values()
        share = arm.measures[SHARE]
        texts.append(f"{percent(share)} of the cells train {in_arm(arm)}.")
        if WIDTH in arm.measures:
            width = decades(arm.measures[WIDTH])
            texts.append(f"The learning rates that train cover {width}{_mean_over(found.grid)}.")
    return texts


def percent(found: Estimate) -> str:
    """Return a share as text: 46% [44, 48]."""
    return _with_interval(found, lambda value: f"{100 * value:.0f}", "%")


def points(found: Estimate) -> str:
    """Return a difference of shares as text: 35 points [32, 37]."""
    return _with_interval(found, lambda value: f"{100 * value:.0f}", " points")


def decades(found: Estimate, unit: str = " decades") -> str:
    """Return a width as text: ≥ 2.50 decades [2.40, 2.60]."""
    return _with_interval(found, lambda value: f"{value:.2f}", unit)


def plain(found: Estimate) -> str:
    """Return a number as text: 4.1 [3.9, 4.4]."""
    return _with_interval(found, lambda value: f"{value:.3g}", "")


def shown(name: str, found: Estimate, is_difference: bool = False) -> str:
    """Return an estimate of one of `measures_of` as text."""
    if name.startswith("share"):
        return points(found) if is_difference else percent(found)
    return decades(found) if name == WIDTH else plain(found)


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _with_interval(found: Estimate, number: Callable[[float], str], unit: str) -> str:
    if math.isnan(found.value):
        return "not known"
    if math.isinf(found.value):
        return "infinitely many"
    text = f"{'≥ ' if found.at_least else ''}{number(found.value)}{unit}"
    if math.isnan(found.low) or math.isnan(found.high):
        return text
    return f"{text} [{number(found.low)}, {number(found.high)}]"


def _of_arm(grid: Grid, name: str, chance_loss: float, shares: dict[str, float]) -> ArmSummary:
    arm = grid.arms[name]
    values, censored = measure(grid, arm)
    outcomes = arm.outcomes()
    return ArmSummary(
        label_of(name),
        int((~np.isnan(arm.accuracy)).sum()),
        {str(outcome): int((outcomes == outcome).sum()) for outcome in GridOutcome},
        {
            key: intervals.estimate(value_S, at_least=censored and key == WIDTH)
            for key, value_S in values.items()
        },
        _of_inits(grid, arm, chance_loss),
        shares,
    )


def _of_inits(grid: Grid, arm: Arm, chance_loss: float) -> tuple[InitSummary, ...]:
    nothing = np.full((len(grid.inits), len(grid.seeds)), np.nan)
    width_IS, censored_IS = nothing, np.zeros(nothing.shape, bool)
    if len(grid.rates) > 1:
        width_IS, censored_IS = tolerance.widths(arm.accuracy, grid.rates, grid.levels.trained)
    rate_IS = tolerance.largest_rate(arm.accuracy, grid.rates, grid.levels.trained)
    at_edge_I = (rate_IS == grid.rates[-1]).any(axis=1)
    sensitivity_IS = tolerance.rate_sensitivity(arm.loss, chance_loss)
    return tuple(
        InitSummary(
            init,
            intervals.estimate(width_IS[i], at_least=bool(censored_IS[i].any())),
            intervals.estimate_rate(rate_IS[i], at_least=bool(at_edge_I[i])),
            intervals.estimate(sensitivity_IS[i]),
        )
        for i, init in enumerate(grid.inits)
    )


def _compare(grid: Grid, first: str, second: str) -> Comparison:
    one, other = grid.arms[first], grid.arms[second]
    has_seed = [~np.isnan(arm.accuracy).all(axis=(0, 1)) for arm in (one, other)]
    is_paired = bool((has_seed[0] == has_seed[1]).all())
    if is_paired:
        # A trial that only one arm has is left out of both.
        lacking = np.isnan(one.accuracy) | np.isnan(other.accuracy)
        one, other = (
            replace(arm, accuracy=np.where(lacking, np.nan, arm.accuracy)) for arm in (one, other)
        )
    (values, censored), (other_values, other_censored) = measure(grid, one), measure(grid, other)
    difference = intervals.paired_difference if is_paired else intervals.unpaired_difference
    there = ~np.isnan(one.accuracy).all(axis=2) & ~np.isnan(other.accuracy).all(axis=2)
    return Comparison(
        first,
        second,
        is_paired,
        int(there.sum()),
        {
            key: difference(
                values[key],
                other_values[key],
                # The difference is a lower bound if only the first width is cut off.
                at_least=key == WIDTH and censored and not other_censored,
            )
            for key in values
        },
        intervals.ratio(values[SHARE], other_values[SHARE]),
        _headroom(grid, one, other),
    )


def _headroom(grid: Grid, one: Arm, other: Arm) -> tuple[str | float, float] | None:
    if len(grid.rates) < 2:
        return None
    trained = grid.levels.trained
    width_I = np.nan_to_num(tolerance.widths(other.accuracy, grid.rates, trained)[0]).mean(axis=1)
    best = int(width_I.argmax())
    # A rate trains if all of its seeds train.
    largest = []
    for arm in (one, other):
        accuracy_RS = arm.accuracy[best]
        tried = ~np.isnan(accuracy_RS)
        trained_R = ((accuracy_RS >= trained) | ~tried).all(axis=1) & tried.any(axis=1)
        if not trained_R.any():
            return None
        largest.append(grid.rates[int(np.flatnonzero(trained_R)[-1])])
    return grid.inits[best], largest[0] / largest[1]


def _notes(grid: Grid, comparisons: tuple[Comparison, ...]) -> list[str]:
    notes = []
    seeds = len(grid.seeds)
    if seeds == 1:
        notes.append("One seed only: there are no intervals, and one seed proves nothing.")
    elif seeds < 5:
        notes.append(
            f"Intervals are of the bootstrap over {seeds} seeds, too narrow with so few: at best "
            "they reach from the smallest to the largest value."
        )
    accuracies = np.stack([arm.accuracy for arm in grid.arms.values()])
    best = float(np.nanmax(accuracies))
    if best < grid.levels.trained:
        notes.append(
            f"No cell trains: the best accuracy is {best:.3f}, and {grid.levels.trained:.2f} is "
            "asked for. `--threshold` asks for another."
        )
    for name, arm in grid.arms.items():
        if arm.missing:
            notes.append(
                f"{capital(label_of(name))} {arm.missing:,} of {arm.accuracy.size:,} trials are "
                "missing; shares leave them out, widths count them as not trained."
            )
    for pair in comparisons:
        if not pair.is_paired:
            notes.append(
                f"The arms {label_of(pair.first)} and {label_of(pair.second)} do not have the same "
                "seeds: their differences are not paired."
            )
    return notes


def _comparison_sentences(
    grid: Grid, pair: Comparison, first: ArmSummary, second: ArmSummary
) -> list[str]:
    one, other = in_arm(first), in_arm(second)
    share = pair.differences[SHARE]
    times = f", a ratio of {plain(pair.ratio)}" if math.isfinite(pair.ratio.value) else ""
    texts = [
        f"{percent(first.measures[SHARE])} of the cells train {one}, "
        f"{percent(second.measures[SHARE])} {other}: a difference of {points(share)}{times}.",
    ]
    if CHANCE_SHARE in first.measures:
        texts.append(
            f"{percent(first.measures[CHANCE_SHARE])} of the cells fail {one}, "
            f"{percent(second.measures[CHANCE_SHARE])} {other}: at the end of the budget their "
            f"accuracy is below {grid.levels.at_chance:.2f}, hardly better than a guess."
        )
    if WIDTH in pair.differences:
        texts.append(
            f"The learning rates that train cover {decades(first.measures[WIDTH])} {one}, "
            f"{decades(second.measures[WIDTH])} {other}{_mean_over(grid)}: a difference of "
            f"{decades(pair.differences[WIDTH])}."
        )
    if len(grid.inits) > 1:
        texts.append(
            f"{plain(first.measures[INITS])} of {len(grid.inits)} initializations train at some "
            f"learning rate {one}, {plain(second.measures[INITS])} {other}."
        )
    if pair.headroom is not None:
        init, factor = pair.headroom
        name = f"initialization {init}"
        if not isinstance(init, str):
            name = f"initial standard deviation {init:.3g}"
        how = f"{factor:.3g} times as large" if factor != 1 else "the same"
        where = f"At {name}, where the most learning rates train {other}, the"
        if len(grid.inits) == 1:
            where = "The"
        texts.append(f"{where} largest learning rate that trains is {how} {one}.")
    if not (share.low > 0 or share.high < 0) and not math.isnan(share.low):
        texts.append(
            "The interval of the difference of shares reaches zero: these seeds do not tell the "
            "arms apart."
        )
    return texts


def in_arm(arm: ArmSummary) -> str:
    """Return the words that say in a sentence which arm it is about: with BatchNorm."""
    is_phrase = arm.label.startswith(("with ", "without ")) or arm.label == AS_CONFIGURED
    return arm.label if is_phrase else f"in arm {arm.label}"


def _mean_over(grid: Grid) -> str:
    return f" (mean over {len(grid.inits)} initializations)" if len(grid.inits) > 1 else ""
