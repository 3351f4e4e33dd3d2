"""The rule of a verdict: from one number for each seed and arm to holds, or does not hold.

    holds             the whole 95% interval of the effect lies between `least` and `most`
    does not hold     the whole interval lies outside
    not decided       anything else, and always with fewer than three seeds, which have no interval

A claim holds if all its conditions do, holds if ... where some do, does not hold if none can, and
is not decided otherwise. Controls are judged likewise, and do not count.

Everything is computed from the content of summary.json.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_lightning.sweeps.analysis.intervals import Estimate, estimate, estimate_rate

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided by this"
HOLDS_IF = "holds if"

LEAST_SEEDS = 3
"""With fewer seeds the bootstrap has no interval that means anything."""

Numbers = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""Arm -> name of a number -> seed -> value, None for NaN and infinity."""


class Verdict(NamedTuple):
    """The verdict on a claim.

    Attributes:
        outcome: `HOLDS`, `HOLDS_IF`, `FAILS` or `OPEN`.
        holds: names of the conditions that hold, controls left out.
        fails: names of those that do not.
    """

    outcome: str
    holds: tuple[str, ...]
    fails: tuple[str, ...]

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.outcome != HOLDS_IF:
            return self.outcome
        return f"{HOLDS_IF}: {'; '.join(self.holds)}"


def effect_of(condition: Mapping[str, Any], numbers: Numbers) -> Estimate:
    """Return the mean effect over seeds with its interval.

    It is a lower bound where the first arm reaches the limit of the condition.

    Args:
        condition: as `Condition.as_json` returns it.
        numbers: of the claim.
    """
    effects, at_least = _effects(condition, numbers)
    is_ratio = condition["kind"] == "ratio"
    return estimate_rate(effects, at_least) if is_ratio else estimate(effects, at_least)


def seeds_inside(condition: Mapping[str, Any], numbers: Numbers) -> int:
    """Return the number of seeds whose own effect is between `least` and `most`."""
    effects, _ = _effects(condition, numbers)
    least, most = _bounds(condition)
    return int(((effects >= least) & (effects <= most)).sum())


def _effects(condition: Mapping[str, Any], numbers: Numbers) -> tuple[np.ndarray, bool]:
    """Return the effect of each seed that has one, and whether the mean is a lower bound."""
    first = _by_seed(numbers, condition["arm"], condition["number"])
    if not condition["against"]:
        return np.array(list(first.values()), dtype=float), False
    second = _by_seed(numbers, condition["against"], condition["number"])
    seeds = [seed for seed in first if seed in second]
    at_least = False
    if condition["limit"]:
        tops = _by_seed(numbers, condition["arm"], condition["limit"])
        seeds = [s for s in seeds if first[s] < tops[s] or second[s] < tops[s]]
        at_least = any(first[s] >= tops[s] for s in seeds)
    one, other = (np.array([arm[s] for s in seeds], dtype=float) for arm in (first, second))
    if condition["kind"] != "ratio":
        return one - other, at_least
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = one / other
    return ratios[np.isfinite(ratios) & (ratios > 0)], at_least


def condition_outcome(condition: Mapping[str, Any], effect: Estimate) -> str:
    """Return `HOLDS`, `FAILS` or `OPEN` for a condition and its effect."""
    if effect.seeds < LEAST_SEEDS or math.isnan(effect.low):
        return OPEN
    least, most = _bounds(condition)
    if least <= effect.low and effect.high <= most:
        return HOLDS
    is_outside = (effect.high < least and not effect.at_least) or effect.low > most
    return FAILS if is_outside else OPEN


def verdict_of(conditions: Sequence[Mapping[str, Any]], numbers: Numbers) -> Verdict:
    """Return the verdict on a claim.

    Args:
        conditions: as `Condition.as_json` returns them.
        numbers: of the claim.
    """
    found = {
        condition["name"]: condition_outcome(condition, effect_of(condition, numbers))
        for condition in conditions
        if not condition["is_control"]
    }
    holds = tuple(name for name, outcome in found.items() if outcome == HOLDS)
    fails = tuple(name for name, outcome in found.items() if outcome == FAILS)
    if holds:
        return Verdict(HOLDS if len(holds) == len(found) else HOLDS_IF, holds, fails)
    return Verdict(FAILS if len(fails) == len(found) else OPEN, holds, fails)


def _bounds(condition: Mapping[str, Any]) -> tuple[float, float]:
    least, most = condition["least"], condition["most"]
    return -math.inf if least is None else least, math.inf if most is None else most


def _by_seed(numbers: Numbers, arm: str, name: str) -> dict[str, float]:
    values = numbers.get(arm, {}).get(name, {})
    return {seed: math.nan if value is None else value for seed, value in values.items()}
