"""Where training begins and ends along the learning rate, from a sweep that searched its edges.

`EdgeSearch` tries a grid, and further rates in the intervals that contain an edge. The numbers of
tolerance.py are of the grid alone. Those here are of all rates.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from optuna.distributions import json_to_distribution

from bn_lightning.sweeps.analysis import intervals
from bn_lightning.sweeps.analysis.intervals import Estimate
from bn_lightning.sweeps.analysis.summary import Summary, decades, in_arm
from bn_lightning.sweeps.analysis.tolerance import GridTrial
from bn_lightning.sweeps.engine.space import Space


@dataclass(frozen=True)
class MemberEdges:
    """Where training begins and ends for one arm, initialization and seed.

    An edge is in the middle, in log10, of the interval between a rate that trains and the next one
    that does not.

    Attributes:
        begins: smallest learning rate that trains, NaN if none does.
        ends: largest learning rate that trains, NaN if none does.
        width: decades that train between the edges, without holes.
        resolution: decades, the widest interval that contains an edge; 0 without an edge.
        holes: number of ranges that do not train, between rates that do.
        begins_below: whether the smallest rate of all trains, so that training begins below it.
        ends_above: whether the largest rate of all trains, so that training ends above it.
    """

    begins: float
    ends: float
    width: float
    resolution: float
    holes: int
    begins_below: bool = False
    ends_above: bool = False

    @classmethod
    def of(cls, accuracies: Mapping[float, float], trained: float) -> "MemberEdges":
        """Return the edges.

        Args:
            accuracies: learning rate -> accuracy, at least one.
            trained: a rate with this accuracy or more trains.
        """
        rates = sorted(accuracies)
        trains = [accuracies[rate] >= trained for rate in rates]
        if not any(trains):
            return cls(math.nan, math.nan, 0.0, 0.0, 0)
        logs = [math.log10(rate) for rate in rates]
        steps = zip(itertools.pairwise(logs), itertools.pairwise(trains), strict=True)
        edges = [interval for interval, (before, after) in steps if before != after]
        bounds = [(low + high) / 2 for low, high in edges]
        if trains[0]:
            bounds.insert(0, logs[0])
        if trains[-1]:
            bounds.append(logs[-1])
        return cls(
            10 ** bounds[0],
            10 ** bounds[-1],
            sum(bounds[1::2]) - sum(bounds[::2]),
            max((high - low for low, high in edges), default=0.0),
            len(bounds) // 2 - 1,
            trains[0],
            trains[-1],
        )


@dataclass(frozen=True)
class InitEdges:
    """The edges of one arm at one initialization, over its seeds.

    Attributes:
        width: decades that train, without holes.
        begins: the geometric mean over the seeds that train.
        ends: the same, a lower bound if some end above the largest rate.
        begins_below: whether some begin below the smallest rate, so that `begins` is too large.
        resolution: decades, the widest interval that contains an edge.
        holes: number of seeds for which the rates that train are no interval.
    """

    width: Estimate
    begins: Estimate
    ends: Estimate
    begins_below: bool
    resolution: float
    holes: int


@dataclass(frozen=True)
class ArmEdges:
    """The edges of one arm.

    Attributes:
        width: decades that train, without holes, the mean over initializations.
        resolution: decades, the widest interval that contains an edge.
        holes: number of pairs of initialization and seed whose rates that train are no interval.
        members: number of all such pairs.
        inits: in the order of the grid.
    """

    width: Estimate
    resolution: float
    holes: int
    members: int
    inits: tuple[InitEdges, ...]


@dataclass(frozen=True)
class EdgeSummary:
    """The edges of a sweep.

    Attributes:
        trials: number of trials, those of the grid among them.
        arms: name -> edges, in the order of the report.
        differences: of the mean width, one for each comparison of the grid.
    """

    trials: int
    arms: dict[str, ArmEdges]
    differences: tuple[Estimate, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the edges as plain values."""
        return asdict(self)


def searched_rates(about: Mapping[str, Any], lr: str) -> list[float] | None:
    """Return the rates of the grid whose edges a sweep searched; None if it searched none.

    Args:
        about: of the sweep's `TrialTable`.
        lr: the parameter that is the learning rate.
    """
    space = (about.get("sweep") or {}).get("space") or {}
    if not lr or space.get("sampler.axis") != lr:
        return None
    grid = Space({lr: json_to_distribution(space[lr])}).grid()
    return [float(str(params[lr])) for params in grid]


def searched_threshold(about: Mapping[str, Any]) -> float | None:
    """Return the accuracy whose edges a sweep searched; None for the usual one."""
    text = ((about.get("sweep") or {}).get("space") or {}).get("sampler.threshold", "None")
    return None if text == "None" else float(text)


def summarize_edges(trials: Iterable[GridTrial], found: Summary) -> EdgeSummary:
    """Compute the edges of a sweep.

    Args:
        trials: all of them, with the rates between those of the grid.
        found: the numbers of the grid.
    """
    grid = found.grid
    trials = list(trials)
    accuracies: dict[tuple[str, str | float, int | str], dict[float, float]] = {}
    for trial in trials:
        key = (trial.arm, trial.init, trial.seed)
        accuracies.setdefault(key, {})[trial.lr] = trial.accuracy
    edges = {key: MemberEdges.of(of, grid.levels.trained) for key, of in accuracies.items()}
    arms, widths = {}, {}
    for name in found.arms:
        by_init = [[edges.get((name, init, seed)) for seed in grid.seeds] for init in grid.inits]
        by_seed = zip(*by_init, strict=True)
        widths[name] = np.array([_mean([m.width for m in of if m is not None]) for of in by_seed])
        inits = tuple(_of_init([m for m in of if m is not None]) for of in by_init)
        arms[name] = ArmEdges(
            intervals.estimate(widths[name], any(init.width.at_least for init in inits)),
            max(init.resolution for init in inits),
            sum(init.holes for init in inits),
            sum(m is not None for of in by_init for m in of),
            inits,
        )
    differences = []
    for pair in found.comparisons:
        one, other = arms[pair.first].width, arms[pair.second].width
        compare = intervals.paired_difference if pair.is_paired else intervals.unpaired_difference
        differences.append(
            compare(
                widths[pair.first],
                widths[pair.second],
                at_least=one.at_least and not other.at_least,
            )
        )
    return EdgeSummary(len(trials), arms, tuple(differences))


def edge_sentences(found: Summary, edges: EdgeSummary) -> list[str]:
    """Return the edges of a sweep in sentences."""
    resolution = max(arm.resolution for arm in edges.arms.values())
    over = f", mean over {len(found.grid.inits)} initializations" * (len(found.grid.inits) > 1)
    widths = [
        f"{decades(arm.width)} {in_arm(found.arms[name])}" for name, arm in edges.arms.items()
    ]
    texts = [
        f"With each edge searched to {resolution:.3f} decades, the learning rates that train cover "
        f"{', '.join(widths)}{over}."
    ]
    for pair, difference in zip(found.comparisons, edges.differences, strict=True):
        arms = f"{found.arms[pair.first].label} minus {found.arms[pair.second].label}"
        texts.append(f"That is a difference of {decades(difference)}, {arms}.")
    for name, arm in edges.arms.items():
        if arm.holes:
            texts.append(
                f"The learning rates that train are not an interval for {arm.holes} of "
                f"{arm.members} pairs of initialization and seed {in_arm(found.arms[name])}: "
                "some rates between them do not train. Widths leave these holes out."
            )
    if not any(arm.holes for arm in edges.arms.values()):
        texts.append(
            "No hole was found between them; one that lies between two neighboring rates of the "
            "grid would not be."
        )
    return texts


def _of_init(members: Sequence[MemberEdges]) -> InitEdges:
    begin_below, end_above = (
        any(getattr(member, name) for member in members) for name in ("begins_below", "ends_above")
    )
    return InitEdges(
        intervals.estimate(np.array([m.width for m in members]), begin_below or end_above),
        intervals.estimate_rate(np.array([m.begins for m in members])),
        intervals.estimate_rate(np.array([m.ends for m in members]), end_above),
        begin_below,
        max((m.resolution for m in members), default=0.0),
        sum(m.holes > 0 for m in members),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
