"""Find where training begins and ends along the learning rate: a coarse grid, then halvings.

Each combination of the other parameters, for instance of arm, initialization and seed, is a member
and is searched by itself. Of two neighboring rates one may train and the other not: an edge lies
between them. The next round tries the middle, in log10, of each such interval of all members, until
each interval is narrow enough.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from bn_lightning.sweeps.analysis.columns import accuracy_of, split_of
from bn_lightning.sweeps.analysis.tolerance import TRAINED
from bn_lightning.sweeps.analysis.trials import row_of
from bn_lightning.sweeps.engine.sampling import GridRefinement, Point, RefinedGrid
from bn_lightning.sweeps.engine.space import Parameter, Space
from bn_lightning.sweeps.engine.sweep_error import SweepError

# Half a decade is typed as 0.001, 0.00316, 0.01, and is halved as often as half a decade.
ROUNDING = 1.01
DIGITS = 5  # significant digits of a rate that the grid does not have
FINEST = 0.001  # decades, in which rates of so many digits differ


@dataclass(frozen=True)
class EdgeSearch(GridRefinement):
    """Tries a grid, then halves each interval between a rate that trains and one that does not.

    A trial trains if its accuracy reaches the threshold: on the test set, otherwise on the
    validation set, otherwise the trial's value, as in a report. Rates that train, or a hole in
    them, are not found if they lie between two neighboring rates of the grid.

    Attributes:
        axis: key of the learning rate, whose choices are the rates of the grid.
        resolution: decades, at least `FINEST`; an interval of this width is not halved.
        threshold: a trial with this accuracy or more trains; None for `tolerance.TRAINED`.

    Raises:
        SweepError: `resolution` or `threshold` is no such number.
    """

    axis: str
    resolution: float
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.resolution) and self.resolution >= FINEST):
            raise SweepError(
                f"expected `sampler.resolution` to be decades, {FINEST} or more, got "
                f"{self.resolution}; set hydra.sweeper.sampler.resolution=0.0625"
            )
        if self.threshold is not None and not _is_number(self.threshold):
            raise SweepError(
                "expected `sampler.threshold` to be an accuracy or null, got "
                f"{self.threshold}; set hydra.sweeper.sampler.threshold=0.9"
            )

    def refine(self, space: Space) -> RefinedGrid:
        """Return the points of the grid, and all points that halving can lead to.

        Raises:
            SweepError: the axis is not swept, or has fewer than two choices that are numbers above
                0.
        """
        first = space.grid()
        rates = self._rates(first)
        ladder = rates[:1]
        for low, high in itertools.pairwise(rates):
            ladder += [*_between(low, high, self.resolution), high]
        every = self._with_axis(space, CategoricalDistribution(ladder)).grid()
        between = [params for params in every if params[self.axis] not in rates]
        # One distribution for all rates, because the choices of a study cannot change.
        refined = self._with_axis(space, FloatDistribution(ladder[0], ladder[-1], log=True))
        points, places = [], []
        for params in [*first, *between]:
            rate = float(str(params[self.axis]))
            points.append(Point({**params, self.axis: rate}, refined.distributions))
            member = repr({key: value for key, value in params.items() if key != self.axis})
            places.append((member, ladder.index(rate)))
        trained = TRAINED if self.threshold is None else self.threshold
        return RefinedGrid(refined, points, len(first), _Halving(places, trained))

    def _rates(self, grid: Sequence[Mapping[str, Parameter]]) -> list[float]:
        values = dict.fromkeys(params[self.axis] for params in grid if self.axis in params)
        rates = sorted({float(v) for v in values if isinstance(v, int | float) and v > 0})
        if len(rates) < max(2, len(values)):
            shown = ", ".join(map(str, values)) or "nothing"
            raise SweepError(
                f"expected `{self.axis}`, the `sampler.axis`, to be swept over two or more numbers "
                f"above 0, got {shown}; give {self.axis}=A,B or set hydra.sweeper.sampler.axis=KEY"
            )
        return rates

    def _with_axis(self, space: Space, distribution: BaseDistribution) -> Space:
        return replace(space, distributions={**space.distributions, self.axis: distribution})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


class _Halving:
    """Chooses the slots of the next round, see `Following`.

    Args:
        places: the member of each slot, and its rate's place in the ascending order of all rates.
        trained: a trial with this accuracy or more trains.
    """

    def __init__(self, places: Sequence[tuple[str, int]], trained: float) -> None:
        self._places = places
        self._trained = trained
        self._slots = {place: slot for slot, place in enumerate(places)}

    def __call__(self, results: Mapping[int, FrozenTrial | None]) -> list[int]:
        rows = {slot: row_of(trial) for slot, trial in results.items() if trial is not None}
        split = split_of(rows.values())
        trains: dict[str, dict[int, bool]] = defaultdict(dict)
        for slot, row in rows.items():
            member, rung = self._places[slot]
            trains[member][rung] = (accuracy_of(row, split) or 0.0) >= self._trained
        chosen = []
        for member, known in trains.items():
            for low, high in itertools.pairwise(sorted(known)):
                if known[low] == known[high]:
                    continue
                # A slot without a result, for instance a lost one, is not tried again.
                untried = [
                    self._slots[member, rung]
                    for rung in sorted(range(low + 1, high), key=lambda r: abs(2 * r - low - high))
                    if self._slots[member, rung] not in results
                ]
                chosen += untried[:1]
        return sorted(chosen)


def _between(low: float, high: float, resolution: float) -> list[float]:
    """Return the rates that halvings of an interval lead to, in ascending order."""
    decades = math.log10(high / low)
    parts = 1
    while decades / parts > resolution * ROUNDING:
        parts *= 2
    rates = (low * (high / low) ** (part / parts) for part in range(1, parts))
    return [float(f"{rate:.{DIGITS}g}") for rate in rates]
