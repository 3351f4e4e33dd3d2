"""Figures of claims, and the overview."""

import dataclasses
import math

import pytest

from bn_lightning.claims.claim_figures import claim_figure, plain_log_ticks
from bn_lightning.claims.claim_overview import overview_figure
from bn_lightning.claims.design import Claim, Curves, Setting
from bn_lightning.claims.result_table import ResultTable, TrialKey, TrialResult
from bn_lightning.sweeps.report.figure import Band, Intervals, Label, Line
from bn_lightning.sweeps.report.matplotlib_renderer import draw


def one(series, kind):
    (found,) = (s for s in series if isinstance(s, kind))
    return found


@pytest.mark.parametrize(
    ("bounds", "value", "place"),
    [
        ({"least": 2.0}, 3.0, 1.5),
        ({"least": -2.0, "most": 2.0}, -1.0, 1.5),
        ({"most": 2.0}, 1.0, 1.5),
        ({"most": 2.0}, -1.0, 2.5),
        ({"most": 2.0}, 3.0, 0.5),
        ({"least": 4.0, "kind": "ratio"}, 16.0, 2.0),
        ({"least": 1.0, "kind": "ratio"}, 1.0, 1.0),
        ({"least": 1.0, "kind": "ratio"}, 2.0, 2.0),
        ({"most": 1.0, "kind": "ratio"}, 0.5, 2.0),
        ({"most": 1.0, "kind": "ratio"}, 4.0, -1.0),
    ],
    ids=[
        "least",
        "both",
        "most",
        "far_below_most",
        "above_most",
        "ratio",
        "equal",
        "doubled",
        "halved",
        "quadrupled",
    ],
)
def test_the_overview_is_in_units_of_the_bound(bounds, value, place):
    """1 is the bound, and more is on the side that holds."""
    (panel,) = overview_figure({"tiny": entry(value, value, value, **bounds)}).panels
    assert list(one(panel.series, Intervals).x) == [place]


def entry(value, low, high, **changes):
    """Of a claim with one condition."""
    effect = {"value": value, "low": low, "high": high, "seeds": 3, "at_least": False}
    condition = {"least": None, "most": None, "kind": "difference", "unit": "points"} | changes
    condition |= {"statement": "here", "outcome": "holds", "is_control": False}
    control = condition | {"statement": "a control", "is_control": True, "effect": effect}
    conditions = [condition | {"effect": effect}, control]
    return {"verdict": "holds", "conditions": conditions}


@pytest.mark.parametrize(
    ("value", "low", "high", "drawn"),
    [
        (-0.1, -0.3, 0.1, (1.5, 0.5, 2.0)),
        (0.1, 0.1, 0.4, (1.5, 0.0, 1.5)),
        (-0.3, -0.3, -0.3, (0.5, 0.5, 0.5)),
    ],
    ids=["across_the_middle", "above_it", "outside"],
)
def test_between_two_bounds_the_overview_draws_the_nearer_one(value, low, high, drawn):
    """The interval reaches from its worst value to its best, and has its marker inside."""
    (panel,) = overview_figure({"tiny": entry(value, low, high, least=-0.2, most=0.2)}).panels
    intervals = one(panel.series, Intervals)
    found = (intervals.x[0], intervals.low[0], intervals.high[0])
    assert found == pytest.approx(drawn)


def test_the_overview_stands_alone():
    """Claim, verdict, number with interval, and threshold; without controls."""
    entries = {f"claim {i}": entry(1.5, 1.25, 1.75, least=2.0) for i in range(7)}
    figure = overview_figure(entries)
    assert len(figure.panels) == 3
    assert len({panel.y.bounds for panel in figure.panels}) == 1
    series = [s for panel in figure.panels for s in panel.series]
    labels = [s for s in series if isinstance(s, Label)]
    assert [s.text for s in labels if s.is_bold] == [f"claim {i}: holds" for i in range(7)]
    others = [s.text for s in labels if not s.is_bold]
    assert others == ["here: 1.5 [1.25, 1.75] points; rule: at least 2"] * 7
    for panel in figure.panels:  # no two lines are at the same height
        heights = [s.y for s in panel.series if isinstance(s, Label)]
        assert len(set(heights)) == len(heights) > 0


CLAIM = Claim(
    name="tiny",
    sentence="BatchNorm is of use.",
    source="made up",
    base=(),
    arms={"batch": (), "none": (), "one": ()},
    settings=lambda budget: {},
    measure=lambda network: {},
    numbers=lambda points: {},
    conditions=(),
    curves=(Curves("loss", "loss, nats", "learning rate", "log", threshold={"enough": 0.5}),),
    not_varied="Everything.",
    would_change="Anything.",
    arm_labels={"one": "a third"},
)


def figure_of(tmp_path, places, values, **changes):
    """Arms `batch` and `none` at all places, `one` at the first; three seeds."""
    settings = {f"{panel} {x}": Setting((), x, panel) for panel in values for x in places}
    claim = dataclasses.replace(CLAIM, settings=lambda budget: settings, **changes)
    table = ResultTable(tmp_path, {}, False)
    for label, setting in settings.items():
        for arm in ("batch", "none", "one")[: 3 if setting.x == places[0] else 2]:
            for seed in (1, 2, 3):
                value = values[setting.panel] * (1 + 0.1 * seed)
                key = TrialKey("tiny", arm, label, seed)
                table.results[key] = TrialResult(0, 1.0, {"loss": value})
    return claim_figure(claim, "quick", table)


def test_logarithmic_axes_have_plain_numbers(tmp_path):
    figure = figure_of(tmp_path, (60, 500), {"relu": 0.2})
    (panel,) = figure.panels
    assert panel.x.ticks == {60: "60", 500: "500"}
    assert set(panel.y.ticks.values()) >= {"0.3", "0.5"}
    (axes,) = draw(figure).axes
    labels = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert {"60", "500"} <= set(labels) and not any("mathdefault" in text for text in labels)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (50, 600, ["50", "70", "100", "200", "300", "500"]),
        (0.0003, 30, ["0.001", "0.01", "0.1", "1", "10"]),
        (1e-4, 1e4, ["0.0001", "0.01", "1", "100", "10,000"]),
        (0.6, 2.4, ["0.7", "1", "2"]),
        (2.1, 2.9, ["2.2", "2.4", "2.6", "2.8"]),
    ],
    ids=["a_decade", "five_decades", "eight_decades", "a_factor_of_4", "less_than_a_factor_of_2"],
)
def test_logarithmic_ticks(low, high, labels):
    assert list(plain_log_ticks(low, high).values()) == labels


def test_panels_share_an_axis_unless_it_crushes_one(tmp_path):
    near = figure_of(tmp_path, (1, 2), {"relu": 0.1, "sigmoid": 0.2})
    assert near.panels[0].y == near.panels[1].y
    far = figure_of(tmp_path, (1, 2), {"relu": 0.45, "sigmoid": 1e9})
    low, high = far.panels[0].y.bounds
    assert far.panels[0].y != far.panels[1].y and low < 0.495 and high < 1


def test_a_lone_point_has_its_range(tmp_path):
    series = figure_of(tmp_path, (1, 2), {"": 1.0}).panels[0].series
    assert sum(isinstance(s, Band) for s in series) == 2
    lone = next(s for s in series if isinstance(s, Line) and s.x == [1, 1])
    assert lone.y == pytest.approx([1.1, 1.3])
    assert [s.name for s in series if isinstance(s, Line) and s.name][2:] == ["a third", "enough"]


def test_a_single_place_has_a_row_for_each_arm(tmp_path):
    """As points above each other, their labels would be far away, and the axis empty."""
    (panel,) = figure_of(tmp_path, (60,), {"": 1.0}).panels
    rows = [s for s in panel.series if isinstance(s, Intervals)]
    assert [s.low[0] for s in rows] == pytest.approx([1.1] * 3)
    labels = [s.text for s in panel.series if isinstance(s, Label)]
    assert [text.partition(":")[0] for text in labels][2] == "a third"
    assert all("1.2, 1.1 to 1.3" in text for text in labels)
    assert "60" in panel.title


def test_a_figure_says_what_it_shows(tmp_path):
    figure = figure_of(tmp_path, (1, 2), {"": 1.0})
    assert CLAIM.sentence in figure.title and "3 seeds" in figure.title
    assert "learning rate" in figure.panels[0].page_caption


def test_nothing_measured(tmp_path):
    figure = figure_of(tmp_path, (1, 2), {"": math.nan})
    assert "nothing" in figure.panels[0].title
    draw(figure)
