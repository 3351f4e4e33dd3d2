"""The search of edges: what it tries, what it finds, and what it costs."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, create_trial

from bn_lightning.sweeps.analysis.edges import MemberEdges
from bn_lightning.sweeps.engine.sampling import SamplingPlan
from bn_lightning.sweeps.engine.space import Space, parse_space
from bn_lightning.sweeps.engine.sweep_error import SweepError

ROOT = Path(__file__).parents[3]
RATES = "0.001,0.00316,0.01,0.0316,0.1,0.316,1,3.16,10,31.6,100"
STEP = 1 / 16
ROUNDED = 1.01  # the half decades of RATES are rounded


def plan_of(space: Space, **keys: Any) -> SamplingPlan:
    target = "bn_lightning.sweeps.analysis.edge_search.EdgeSearch"
    sampler = {"_target_": target, "axis": "optimizer.lr", "resolution": STEP, **keys}
    return SamplingPlan(sampler, space, keys.pop("n_trials", None))


def line(rates: str = RATES, **keys: Any) -> SamplingPlan:
    return plan_of(parse_space(None, [f"optimizer.lr={rates}"]), **keys)


def trial_at(plan: SamplingPlan, slot: int, accuracy: float, **attributes: float) -> FrozenTrial:
    params, distributions = plan.point(slot)
    names = {name.replace("_", "/"): value for name, value in attributes.items()}
    return create_trial(
        value=accuracy, params=params, distributions=distributions, user_attrs=names
    )


def search(
    plan: SamplingPlan, accuracy: Callable[[dict[str, Any]], float | None]
) -> tuple[dict[int, FrozenTrial | None], list[list[int]]]:
    """Return the result of each slot that is asked for, and the slots of each round."""

    def result(slot: int) -> FrozenTrial | None:
        value = accuracy(plan.point(slot).params)
        return None if value is None else trial_at(plan, slot, value)

    results: dict[int, FrozenTrial | None] = {}
    rounds = [list(range(plan.n_trials))]
    while new := [slot for slot in rounds[-1] if slot not in results]:
        results |= {slot: result(slot) for slot in new}
        assert plan.following is not None
        rounds.append(list(plan.following(results)))
    return results, rounds[:-1]


def rates_of(plan: SamplingPlan, slots: list[int]) -> list[float]:
    return [plan.point(slot).params["optimizer.lr"] for slot in slots]


def edges_found(
    plan: SamplingPlan, slots: Iterable[int], accuracy: Callable[[dict[str, Any]], float | None]
) -> dict[tuple[Any, ...], MemberEdges]:
    known: dict[tuple[Any, ...], dict[float, float]] = defaultdict(dict)
    for slot in slots:
        others = dict(plan.point(slot).params)
        value = accuracy(others)
        rate = others.pop("optimizer.lr")
        if value is not None:
            known[tuple(others.values())][rate] = value
    return {member: MemberEdges.of(accuracies, 0.9) for member, accuracies in known.items()}


class TestRounds:
    def test_each_halves_every_edge(self) -> None:
        """Rates of 0.02 to 2 train: edges in (0.01, 0.1) and (1, 10)."""
        plan = line("0.01,0.1,1,10", resolution=0.25)
        _, rounds = search(plan, lambda p: 0.95 if 0.02 <= p["optimizer.lr"] <= 2 else 0.1)
        rates = [rates_of(plan, slots) for slots in rounds]
        assert rates[0] == [0.01, 0.1, 1, 10]
        assert rates[1] == pytest.approx([10**-1.5, 10**0.5], rel=1e-4)
        assert rates[2] == pytest.approx([10**-1.75, 10**0.25], rel=1e-4)
        assert len(rates) == 3

    def test_the_trials_between_are_in_the_order_of_the_space(self) -> None:
        """A stack of one seed shares batches, so the seed changes last if it stands first."""
        plan = plan_of(parse_space(None, ["seed=1,2", f"optimizer.lr={RATES}", "norm=none,batch"]))
        _, rounds = search(plan, lambda p: float(0.02 < p["optimizer.lr"] < 2))
        seeds = [[plan.point(slot).params["seed"] for slot in slots] for slots in rounds]
        assert seeds[1:] == [[1, 1, 1, 1, 2, 2, 2, 2]] * 3

    def test_rounded_half_decades_are_halved_three_times(self) -> None:
        def accuracy(params: dict[str, Any]) -> float:
            return float(params["optimizer.lr"] > 0.005)

        results, rounds = search(line(), accuracy)
        assert [len(slots) for slots in rounds] == [11, 1, 1, 1]
        (found,) = edges_found(line(), results, accuracy).values()
        assert 0.005 / 10 ** (STEP / 2) < found.begins < 0.005 * 10 ** (STEP / 2)
        assert found.resolution <= STEP * ROUNDED

    def test_the_test_set_decides_as_in_a_report(self) -> None:
        plan = line("0.1,1", resolution=0.5)
        results = {s: trial_at(plan, s, 0.95, test_accuracy=0.85 + 0.1 * s) for s in range(2)}
        assert plan.following is not None and plan.following(results) == [2]

    def test_another_threshold(self) -> None:
        _, rounds = search(line(threshold=0.5), lambda p: 0.6 if p["optimizer.lr"] < 1 else 0)
        assert len(rounds) == 4

    @pytest.mark.parametrize("accuracy", [0.1, 0.95], ids=["nothing trains", "all train"])
    def test_without_an_edge_the_grid_is_all(self, accuracy: float) -> None:
        assert len(search(line(), lambda p: accuracy)[1]) == 1

    def test_a_lost_trial_is_gone_around(self) -> None:
        """The middle of (1, 10) has no result: its neighbors are tried instead, once each."""
        plan = line("1,10", resolution=0.125)
        lost = 10**0.5

        def accuracy(params: dict[str, Any]) -> float | None:
            rate = params["optimizer.lr"]
            return None if abs(rate - lost) < 0.01 else float(rate < 4)

        results, rounds = search(plan, accuracy)
        assert all(len(slots) == 1 for slots in rounds[1:])
        (found,) = edges_found(plan, results, accuracy).values()
        assert found.ends == pytest.approx(4, rel=10**0.125 - 1)

    def test_points_have_one_distribution(self) -> None:
        plan = line()
        assert {tuple(plan.point(slot).distributions) for slot in range(81)} == {("optimizer.lr",)}
        scale = plan.space.distributions["optimizer.lr"]
        assert all(scale._contains(rate) for rate in rates_of(plan, list(range(81))))


class TestBars:
    @pytest.mark.parametrize(("sweep", "n_trials"), [("lr_init", 816), ("lr_init_relu", 768)])
    def test_a_quarter_of_the_trials_of_a_full_grid(self, sweep: str, n_trials: int) -> None:
        """`lr_init` of 594 trials, with the committed accuracies, linear between its rates."""
        inits = "0.001,0.00316,0.01,0.0316,0.1,0.316,1,3.16,10"
        space = ["seed=1,2,3", f"init.std={inits}", f"optimizer.lr={RATES}", "norm=none,batch"]
        plan = plan_of(parse_space(None, space))
        measured: dict[Any, dict[float, float]] = defaultdict(dict)
        with open(ROOT / "docs/results" / sweep / "trials.csv", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                key = int(row["params/seed"]), float(row["params/init.std"]), row["params/norm"]
                lr = float(row["params/optimizer.lr"])
                measured[key][math.log10(lr)] = float(row["attributes/test/accuracy"])

        def accuracy(params: dict[str, Any]) -> float:
            of = measured[params["seed"], float(params["init.std"]), params["norm"]]
            return float(np.interp(math.log10(params["optimizer.lr"]), list(of), list(of.values())))

        results, rounds = search(plan, accuracy)
        assert (plan.n_trials, len(rounds)) == (594, 4)
        assert len(results) == n_trials <= 4374 / 4
        found = edges_found(plan, results, accuracy).values()
        assert max(edges.resolution for edges in found) <= STEP * ROUNDED

    def test_the_edges_of_a_full_fine_grid(self) -> None:
        """Two initializations, two arms and 25 seeds; accuracies with noise, and holes in some.

        At an edge the accuracy rises from .2 to .96 within a tenth of a decade, and a trial errs by
        .02, so that next to an edge single rates train and their neighbors do not.
        """
        generator = np.random.default_rng(0)
        seeds = ",".join(map(str, range(25)))
        space = [f"seed={seeds}", "init.std=0.1,1", f"optimizer.lr={RATES}", "norm=none,batch"]
        plan = plan_of(parse_space(None, space))
        shapes: dict[Any, Any] = {}
        known: dict[Any, float] = {}

        def accuracy(params: dict[str, Any]) -> float:
            *member, rate = (params[k] for k in ("seed", "init.std", "norm", "optimizer.lr"))
            begins, ends, hole = shapes.setdefault(
                tuple(member), generator.uniform((-2.9, 0.2, -1.3), (-2.4, 1.9, -0.7))
            )
            x = math.log10(rate)
            inside = min(x - begins, ends - x)
            if member[0] % 5 == 0:  # a hole of 0.6 decades contains a rate of the grid
                inside = min(inside, abs(x - hole) - 0.3)
            smooth = 0.1 + 0.87 / (1 + math.exp(-min(40 * inside + 2.4, 100)))
            return known.setdefault((*member, rate), smooth + 0.02 * generator.standard_normal())

        results, _ = search(plan, accuracy)
        assert len(results) <= 8100 / 4
        found = edges_found(plan, results, accuracy)
        full = edges_found(plan, range(8100), accuracy)
        apart = [
            abs(math.log10(getattr(found[member], name) / getattr(full[member], name)))
            for member in full
            for name in ("begins", "ends")
        ]
        assert len(apart) == 200
        assert np.mean(np.array(apart) <= STEP * ROUNDED) >= 0.95
        is_hollow = [seed % 5 == 0 for seed, _, _ in full]
        assert [found[member].holes >= 1 for member in full] == is_hollow


class TestBadInput:
    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"axis": "lr"}, "`lr`, the `sampler.axis`.* got nothing"),
            ({"axis": "norm"}, "`norm`.* got none, batch"),
            ({"resolution": 0}, "`sampler.resolution` .* 0.001 or more, got 0"),
            ({"resolution": -1}, "`sampler.resolution` .* got -1"),
            ({"resolution": 1e-5}, "`sampler.resolution` .* got 1e-05"),
            ({"resolution": "fine"}, "`sampler.resolution` .* got fine"),
            ({"threshold": "abc"}, "`sampler.threshold` .* got abc"),
            ({"threshold": True}, "`sampler.threshold` .* got True"),
            ({"threshold": float("nan")}, "`sampler.threshold` .* got nan"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_keys(self, keys: dict[str, Any], words: str) -> None:
        space = parse_space(None, ["optimizer.lr=0.1,1", "norm=none,batch"])
        with pytest.raises(SweepError, match=words):
            plan_of(space, **keys)

    @pytest.mark.parametrize(
        ("lr", "words"),
        [
            ("0,1", "above 0, got 0, 1"),
            ("choice(1)", "two or more"),
            ("interval(0.1,1)", "choices or a range"),
        ],
        ids=["zero", "one", "interval"],
    )
    def test_rates(self, lr: str, words: str) -> None:
        with pytest.raises(SweepError, match=words):
            line(lr)

    def test_a_number_of_trials(self) -> None:
        sampler = {"_target_": "bn_lightning.sweeps.analysis.edge_search.EdgeSearch"}
        with pytest.raises(SweepError, match="`n_trials` to be null"):
            SamplingPlan(sampler, parse_space(None, ["optimizer.lr=0.1,1"]), 20)

    def test_a_conditional_space(self) -> None:
        space = Space(
            parse_space(None, ["optimizer.lr=0.1,1"]).distributions, (), lambda trial: None
        )
        with pytest.raises(SweepError, match="`custom_search_space`"):
            plan_of(space)
