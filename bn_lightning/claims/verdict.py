"""The rule of a verdict: from one number for each seed and arm to holds, or does not hold.

    holds             the whole 95% interval of the effect lies between `least` and `most`
    does not hold     the whole interval lies outside
    not decided       anything else, and always with fewer than three seeds, which have no interval;
                      the reason is given

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
        holds: statements of the conditions that hold, controls left out.
        fails: statements of those that do not.
        undecided: statement -> reason, of those that are not decided.
    """

    outcome: str
    holds: tuple[str, ...]
    fails: tuple[str, ...]
    undecided: Mapping[str, str]

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.outcome == HOLDS_IF:
            return f"{HOLDS_IF}: {'; '.join(self.holds)}"
        if self.outcome != OPEN:
            return self.outcome
        reasons = set(self.undecided.values())
        if len(reasons) == 1 and not self.fails:  # all conditions have the same
            return f"{OPEN}: {reasons.pop()}"
        parts = [f"{statement} ({reason})" for statement, reason in self.undecided.items()]
        return f"{OPEN}: {'; '.join(parts)}"


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


def open_reason(condition: Mapping[str, Any], effect: Estimate) -> str:
    """Return why a condition is not decided, "" if it is."""
    if condition_outcome(condition, effect) != OPEN:
        return ""
    if effect.seeds == 0:
        return "nothing measured within the budget" if condition["limit"] else "nothing measured"
    if effect.seeds < LEAST_SEEDS:
        return f"{effect.seeds} seed{'s' * (effect.seeds > 1)}, fewer than {LEAST_SEEDS}"
    least, most = _bounds(condition)
    crossed = [f"{least:.3g}"] if effect.low < least <= effect.high else []
    crossed += [f"{most:.3g}"] if effect.low <= most < effect.high else []
    if crossed:
        return f"the interval crosses {' and '.join(crossed)}"
    return "only a lower bound is known" if effect.at_least else "no interval"


def verdict_of(conditions: Sequence[Mapping[str, Any]], numbers: Numbers) -> Verdict:
    """Return the verdict on a claim.

    Args:
        conditions: as `Condition.as_json` returns them.
        numbers: of the claim.
    """
    tested = [condition for condition in conditions if not condition["is_control"]]
    effects = [effect_of(condition, numbers) for condition in tested]
    found: dict[str, list[str]] = {HOLDS: [], FAILS: [], OPEN: []}
    undecided = {}
    for condition, effect in zip(tested, effects, strict=True):
        found[condition_outcome(condition, effect)].append(condition["statement"])
        if reason := open_reason(condition, effect):
            undecided[condition["statement"]] = reason
    holds, fails = tuple(found[HOLDS]), tuple(found[FAILS])
    if holds:
        outcome = HOLDS if len(holds) == len(tested) else HOLDS_IF
    else:
        outcome = FAILS if len(fails) == len(tested) else OPEN
    return Verdict(outcome, holds, fails, undecided)


def _bounds(condition: Mapping[str, Any]) -> tuple[float, float]:
    least, most = condition["least"], condition["most"]
    return -math.inf if least is None else least, math.inf if most is None else most


def _by_seed(numbers: Numbers, arm: str, name: str) -> dict[str, float]:
    values = numbers.get(arm, {}).get(name, {})
    return {seed: math.nan if value is None else value for seed, value in values.items()}
