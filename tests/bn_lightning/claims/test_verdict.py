"""The rule of a verdict, on made-up numbers."""

import json

import numpy as np
import pytest

from bn_lightning.claims.design import Condition
from bn_lightning.claims.verdict import (
    FAILS,
    HOLDS,
    HOLDS_IF,
    OPEN,
    condition_outcome,
    effect_of,
    open_reason,
    seeds_inside,
    verdict_of,
)

SEEDS = [str(seed) for seed in range(1, 11)]


def numbers(**arms):
    """Of one number, `steps`: a value for each seed of each arm."""
    return {arm: {"steps": dict(zip(SEEDS, values, strict=False))} for arm, values in arms.items()}


def condition(**changes):
    given = {"name": "here", "number": "steps", "arm": "a", "against": "b", "least": 1.0}
    return Condition(**(given | changes)).as_json()


@pytest.mark.parametrize(
    ("changes", "differences", "outcome"),
    [
        ({}, [1.5, 2.0, 2.5], HOLDS),
        ({}, [0.1, 0.2, 0.3], FAILS),
        ({}, [-3.0, -2.0, -4.0], FAILS),
        ({}, [0.5, 2.0, 2.5], OPEN),
        ({"most": 2.0}, [1.5, 1.6, 1.7], HOLDS),
        ({"most": 2.0}, [2.5, 2.6, 2.7], FAILS),
        ({"least": None, "most": 1.0}, [0.0, 0.0, 0.0], HOLDS),
        ({}, [1.5, 2.0], OPEN),
        ({}, [], OPEN),
        ({}, [float("nan")] * 3 + [1.5, 2.0], OPEN),
    ],
    ids=[
        "inside",
        "below",
        "opposite",
        "across",
        "between",
        "above",
        "upper",
        "two",
        "none",
        "nan",
    ],
)
def test_the_interval_decides(changes, differences, outcome):
    rule = condition(**changes)
    found = numbers(a=[10 + d for d in differences], b=[10.0] * len(differences))
    assert condition_outcome(rule, effect_of(rule, json.loads(json.dumps(found)))) == outcome


def test_seeds_are_paired():
    """The seeds differ by more than the arms, and each pair by the same."""
    rule = condition()
    effect = effect_of(rule, numbers(a=[2.0, 102.0, 902.0], b=[0.0, 100.0, 900.0]))
    assert (effect.value, effect.low, effect.high, effect.seeds) == (2.0, 2.0, 2.0, 3)
    one_missing = numbers(a=[2.0, 102.0, 902.0], b=[0.0, 100.0])
    assert effect_of(rule, one_missing).seeds == 2


def test_seeds_are_counted_one_by_one():
    found = numbers(a=[1.0, 12.0, 10.0, float("nan")], b=[0.0] * 4)
    assert seeds_inside(condition(least=10.0), found) == 2
    assert seeds_inside(condition(least=None, most=10.0), found) == 2
    assert seeds_inside(condition(kind="value", against="", least=1.0, most=10.0), found) == 2
    ratios = numbers(a=[1.0, 12.0, 10.0], b=[1.0, 2.0, 0.0])
    assert seeds_inside(condition(kind="ratio", least=2.0), ratios) == 1


def test_a_ratio_is_geometric():
    effect = effect_of(condition(kind="ratio"), numbers(a=[2.0, 8.0], b=[1.0, 1.0]))
    assert effect.value == pytest.approx(4.0)


def test_seeds_where_both_arms_reach_the_limit_say_nothing():
    rule = condition(kind="ratio", limit="budget")
    found = numbers(a=[100.0, 100.0, 50.0], b=[100.0, 20.0, 25.0])
    found["a"]["budget"] = dict.fromkeys(SEEDS[:3], 100.0)
    effect = effect_of(rule, found)
    assert effect.seeds == 2
    assert effect.value == pytest.approx((5 * 2) ** 0.5)


def test_a_lower_bound_does_not_refute():
    """The first arm used up its budget, so that its ratio may be larger."""
    rule = condition(kind="ratio", limit="budget", least=1.5)
    found = numbers(a=[130.0, 131.0, 132.0], b=[100.0] * 3)
    for budget, outcome in ((1000.0, FAILS), (130.0, OPEN)):
        found["a"]["budget"] = dict.fromkeys(SEEDS[:3], budget)
        assert condition_outcome(rule, effect_of(rule, found)) == outcome


def test_a_claim_holds_where_its_conditions_do():
    rules = [
        condition(name="relu", arm="a"),
        condition(name="sigmoid", arm="c"),
        condition(name="control", arm="d", is_control=True),
    ]
    far, near = [5.0, 5.1, 5.2], [0.0, 0.1, -0.1]

    def verdict(relu, sigmoid, control):
        found = verdict_of(rules, numbers(a=relu, c=sigmoid, d=control, b=[0.0] * 3))
        return found.outcome, found.text

    assert verdict(far, far, near) == (HOLDS, HOLDS)
    assert verdict(far, near, far) == (HOLDS_IF, "holds if: relu")
    assert verdict(near, near, far) == (FAILS, FAILS)
    across = [0.0, 1.0, 2.0]
    reason = "the interval crosses 1"
    assert verdict(near, across, far) == (OPEN, f"{OPEN}: sigmoid ({reason})")
    # One reason for all conditions is said once.
    assert verdict(across, across, far) == (OPEN, f"{OPEN}: {reason}")


def reason(changes, differences, budget=100.0):
    rule = condition(**changes)
    found = numbers(a=[10 + d for d in differences], b=[10.0] * len(differences))
    found["a"]["budget"] = dict.fromkeys(SEEDS, budget)
    return open_reason(rule, effect_of(rule, found))


def test_what_is_not_decided_has_a_reason():
    assert reason({}, [1.5, 2.0, 2.5]) == reason({}, [0.1, 0.2, 0.3]) == ""
    assert reason({}, []) == "nothing measured"
    assert "2 seeds" in reason({}, [1.5, 2.0])
    assert reason({}, [0.5, 2.0, 2.5]) == "the interval crosses 1"
    assert reason({"least": None, "most": 2.0}, [1.0, 2.0, 2.5]) == "the interval crosses 2"
    assert reason({"most": 2.0}, [0.5, 1.5, 2.5]) == "the interval crosses 1 and 2"
    ratio = {"kind": "ratio", "limit": "budget", "least": 1.5}
    assert "lower bound" in reason(ratio, [3.0, 3.0, 3.0], budget=13.0)
    assert "budget" in reason(ratio, [0.0, 0.0, 0.0], budget=10.0)


# Test accuracies of the network with BatchNorm after 300 steps, seeds 1 to 3, at the learning rate
# 1e-2 of its weights in the claim scale_invariance: the largest spread of the rates that train.
SEEN = np.array([0.897, 0.8943, 0.8903])


@pytest.mark.parametrize("least", [0.002, 0.5 * SEEN.std(ddof=1)], ids=["points", "half_a_sd"])
def test_a_planted_null_does_not_hold(least):
    """Both arms are the same network with seeds of their own, ten of each."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        first, second = generator.normal(SEEN.mean(), SEEN.std(ddof=1), (2, 10))
        rule = condition(least=least)
        held += verdict_of([rule], numbers(a=first.tolist(), b=second.tolist())).outcome == HOLDS
    assert held <= 5
