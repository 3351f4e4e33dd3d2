"""Where training begins and ends, and the sentences that report it."""

import json
import math

import pytest
from optuna.distributions import CategoricalDistribution, distribution_to_json

from bn_lightning.sweeps.analysis.edges import (
    EdgeSummary,
    MemberEdges,
    edge_sentences,
    searched_rates,
    searched_threshold,
    summarize_edges,
)
from bn_lightning.sweeps.analysis.summary import Summary, summarize
from bn_lightning.sweeps.analysis.tolerance import GridTrial

GRID = (0.01, 0.1, 1.0, 10.0)


def edges_of(*trains: float, rates: tuple[float, ...] = GRID) -> MemberEdges:
    return MemberEdges.of({rate: float(rate in trains) for rate in reversed(rates)}, 0.9)


class TestMemberEdges:
    def test_an_interval(self) -> None:
        found = edges_of(0.1, 1.0, rates=(0.01, 0.0316, 0.1, 1.0, 3.16, 10.0))
        assert found.begins == pytest.approx(math.sqrt(0.0316 * 0.1))
        assert found.ends == pytest.approx(math.sqrt(3.16))
        assert found.width == pytest.approx(1.5, abs=0.001)
        assert found.resolution == pytest.approx(0.5, abs=0.001)
        assert (found.holes, found.begins_below, found.ends_above) == (0, False, False)

    @pytest.mark.parametrize(
        ("trains", "below", "above", "width"),
        [
            ((0.01, 0.1), True, False, 1.5),
            ((1.0, 10.0), False, True, 1.5),
            (GRID, True, True, 3.0),
        ],
        ids=["below", "above", "both"],
    )
    def test_the_first_and_the_last_rate_cut_it_off(
        self, trains: tuple[float, ...], below: bool, above: bool, width: float
    ) -> None:
        found = edges_of(*trains)
        assert (found.begins_below, found.ends_above) == (below, above)
        assert found.width == pytest.approx(width)

    def test_a_hole_is_counted_and_left_out(self) -> None:
        found = edges_of(0.01, 1.0, 10.0)
        assert found.holes == 1
        assert found.width == pytest.approx(0.5 + 1.5)
        assert (found.begins, found.ends) == pytest.approx((0.01, 10.0))

    def test_nothing_trains(self) -> None:
        found = edges_of()
        assert (found.width, found.holes, found.resolution) == (0, 0, 0)
        assert math.isnan(found.begins) and math.isnan(found.ends)


def trials(hole: bool = False) -> list[GridTrial]:
    """Two initializations and seeds; with BatchNorm a decade more trains, 0.1 to 3.16 or beyond."""
    rates = (*GRID, 0.0316, 3.16)
    found = []
    for init in (0.1, 1.0):
        for seed in (1, 2):
            for arm, most in (("batch", 3.16 if seed == 1 else 10), ("none", 0.5)):
                for lr in rates:
                    trains = 0.1 <= lr <= most and not (hole and arm == "batch" and lr == 1.0)
                    found.append(GridTrial(arm, init, lr, seed, 0.95 if trains else 0.1, 0.5))
    return found


def summarized(of: list[GridTrial]) -> tuple[Summary, EdgeSummary]:
    # False, because importances take time.
    found = summarize([trial for trial in of if trial.lr in GRID], math.log(10), False)
    return found, summarize_edges(of, found)


def test_numbers_of_a_sweep() -> None:
    _, edges = summarized(trials())
    half = math.log10(3.16 / 1)
    batch, none = edges.arms["batch"], edges.arms["none"]
    # From between 0.0316 and 0.1 to between 3.16 and 10, or to 10, where the grid ends.
    begins = (math.log10(0.0316) - 1) / 2
    ends = [(math.log10(3.16) + 1) / 2, 1]
    assert batch.width.value == pytest.approx(sum(ends) / 2 - begins)
    assert (batch.width.low, batch.width.high) == pytest.approx([end - begins for end in ends])
    assert batch.width.at_least and not none.width.at_least
    assert none.width.value == pytest.approx(-0.5 - begins)
    assert none.resolution == pytest.approx(1) and batch.resolution == pytest.approx(1 - half, 0.01)
    assert (batch.members, batch.holes, edges.trials) == (4, 0, 48)
    assert edges.differences[0].value == pytest.approx(batch.width.value - none.width.value)
    assert edges.differences[0].at_least
    of_init = batch.inits[0]
    assert of_init.begins.value == pytest.approx(10**begins)
    assert of_init.ends.at_least and not of_init.begins_below
    assert json.dumps(edges.as_json())


def test_sentences() -> None:
    text = " ".join(edge_sentences(*summarized(trials())))
    assert "cover ≥ 2.13 decades [2.00, 2.25] with BatchNorm, 0.75 decades" in text
    assert "searched to 1.000 decades" in text and "No hole" in text


def test_sentences_tell_of_holes() -> None:
    text = " ".join(edge_sentences(*summarized(trials(hole=True))))
    assert "not an interval for 4 of 4" in text and "with BatchNorm" in text
    assert "No hole" not in text


def test_what_a_sweep_searched() -> None:
    choices = distribution_to_json(CategoricalDistribution([1, 0.1]))
    space = {"lr": choices, "sampler.axis": "lr", "sampler.threshold": "0.8"}
    assert searched_rates({"sweep": {"space": space}}, "lr") == [1.0, 0.1]
    assert searched_threshold({"sweep": {"space": space}}) == 0.8
    assert searched_threshold({"sweep": {"space": {"sampler.threshold": "None"}}}) is None
    assert searched_rates({"sweep": {"space": {"lr": choices}}}, "lr") is None
    assert searched_rates({}, "lr") is None
