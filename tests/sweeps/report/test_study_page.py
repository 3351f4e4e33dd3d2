"""The figures and the page of a study that is not a grid."""

import re
from typing import Any

import numpy as np
import pytest

from bn_lightning.sweeps.analysis.importances import (
    MOST_FOR_IMPORTANCES,
    is_log_scale,
    study_importances,
)
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.report.matplotlib_renderer import draw
from bn_lightning.sweeps.report.plotly_renderer import plots_of
from bn_lightning.sweeps.report.study_figures import study_figures
from bn_lightning.sweeps.report.study_page import study_page

COMMAND = "bn-train -m --config-dir conf +experiment=mine +sweep=mine hydra.sweeper.n_jobs=2"


def study(count: int = 24, **about: Any) -> TrialTable:
    """Return a study that minimizes val/loss, which depends on the width alone."""
    rows = tuple(
        TrialRow(
            i,
            "COMPLETE",
            (1 / 2 ** (i % 4),),
            {"width": 8 * 2 ** (i % 4), "kind": f"<k{i % 3}>", "drop": i % 5 / 10},
            {"val/loss": 1 / 2 ** (i % 4), "test/accuracy": 0.5 + i % 4 / 10, "seconds": 1.0},
        )
        for i in range(count)
    )
    sweep = {"overrides": ["+experiment=mine", "+sweep=mine"]}
    return TrialTable("s", ("minimize",), rows, {"command": COMMAND, "sweep": sweep} | about)


def figures_of(table: TrialTable) -> Any:
    return study_figures(table, *study_importances(table))


def test_the_value_has_the_name_of_its_metric() -> None:
    table = study()
    assert table.value_names == ["val/loss"]
    unnamed = tuple(TrialRow(i, "COMPLETE", (i / 7,)) for i in range(3))
    assert TrialTable("s", ("minimize",), unnamed).value_names == ["value"]
    named = TrialTable("s", ("minimize",), unnamed, {"metrics": ["loss"]})
    assert named.value_names == ["loss"]
    for figure in figures_of(table).values():
        words = [axis.label for panel in figure.panels for axis in (panel.x, panel.y)]
        assert any("val/loss" in word for word in words)


def test_history_has_the_best_value_so_far() -> None:
    (axes,) = draw(figures_of(study(6))["history"]).axes
    best, trials = axes.get_lines()
    assert best.get_ydata().tolist() == [1, 0.5, 0.25, 0.125, 0.125, 0.125]
    assert trials.get_ydata().tolist() == [1, 0.5, 0.25, 0.125, 1, 0.5]
    assert trials.get_linestyle() == "None"


def test_each_parameter_has_a_panel_on_its_own_scale() -> None:
    figure = figures_of(study())["parameters"]
    assert [panel.x.label for panel in figure.panels] == ["width", "kind", "drop"]
    assert [panel.x.scale for panel in figure.panels] == ["log", "linear", "linear"]
    kinds = figure.panels[1]
    assert list(kinds.x.ticks.values()) == ["<k0>", "<k1>", "<k2>"]
    assert set(kinds.series[0].x) == {0, 1, 2}
    text = plots_of(figure)[1].traces[0]["hovertext"][1]
    assert text == "trial 1<br>val/loss 0.5<br>width 16<br>kind &lt;k1><br>drop 0.1"


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([0.1, 0.316, 1.0], True),
        ([8, 16, 32, 64], True),
        ([1, 2, 3, 4], False),
        ([0.0, 0.1, 1.0], False),
        ([0.1, 0.2], False),
        ([0.01, 0.1], True),
        (["a", "b"], False),
        ([1.0], False),
        (np.geomspace(0.01, 0.1, 50)[np.random.default_rng(0).permutation(50)].tolist(), True),
        (np.random.default_rng(0).uniform(0.1, 0.9, 50).tolist(), False),
    ],
    ids=["rates", "widths", "counts", "zero", "near", "far", "names", "one", "log_drawn", "drawn"],
)
def test_the_scale_of_a_parameter(values: list[Any], is_log: bool) -> None:
    rows = tuple(TrialRow(i, "COMPLETE", (0.0,), {"x": v}) for i, v in enumerate(values))
    assert is_log_scale(TrialTable("s", ("minimize",), rows), "x") is is_log
    if is_log:
        return
    assert is_log_scale(TrialTable("s", ("minimize",), rows, {"log": ["x"]}), "x")


def test_importances_say_how_many_trials_they_rest_on() -> None:
    shares, count = study_importances(study())
    assert count == 24 and max(shares, key=shares.get) == "width"
    assert sum(shares.values()) == pytest.approx(1)
    (panel,) = study_figures(study(), shares, count)["importances"].panels
    assert panel.page_caption == "fANOVA of 24 trials"
    assert study_importances(study(MOST_FOR_IMPORTANCES + 5))[1] == MOST_FOR_IMPORTANCES
    assert study_importances(study(1)) == ({}, 1)
    text = "The sampler chose the points by their results"
    for sampler, is_said in (("TPESampler", True), ("GridSampler", False)):
        table = study(sampler=f"optuna.samplers.{sampler}")
        assert (text in study_page(table, "", figures_of(table), {}, [])) == is_said


def test_the_best_trials_their_directories_and_the_command_that_repeats_the_best() -> None:
    table = study()
    text = study_page(table, "it varies no learning rate", figures_of(table), {3: "3"}, ["a note"])
    assert "There is no map of what trains: it varies no learning rate." in text
    assert '<p class="note">a note</p>' in text
    best = text[text.index("Best trials") : text.index(">History<")]
    heads = re.findall(r'scope="col">([^<]*)<', best)
    assert heads == ["trial", "state", "val/loss", "test/accuracy", "width", "kind", "drop"]
    numbers = [int(n) for n in re.findall(r'scope="row">(?:<a[^>]*>)?(\d+)', best)]
    assert numbers == [3, 7, 11, 15, 19, 23, 2, 6, 10, 14]
    assert '<a href="3/">3</a>' in best
    command = (
        "bn-train --config-dir conf +experiment=mine +sweep=mine width=64 &#x27;kind=&lt;k0&gt;"
    )
    assert command in best and "hydra.sweeper" not in best


def test_a_large_study_is_small_enough() -> None:
    table = study(10_000)
    text = study_page(table, "", study_figures(table, {}, 0), {}, [])
    assert len(text.encode()) <= 6e6
    assert "1,000 of 10,000 trials with a result, evenly chosen." in text


def test_several_values_have_their_pareto_front() -> None:
    values = ((1.0, 1.0), (2.0, 2.0), (0.5, 3.0))  # the third is worse than both
    rows = tuple(TrialRow(i, "COMPLETE", pair, {"a": i}) for i, pair in enumerate(values))
    table = TrialTable("s", ("maximize", "minimize"), rows)
    figures = figures_of(table)
    assert list(figures) == ["pareto"]
    others, front = figures["pareto"].panels[0].series
    assert (others.x, front.x, front.y) == ([0.5], [1, 2], [1, 2])
    text = study_page(table, "", figures, {}, [])
    best = text[text.index("the Pareto front") : text.index(">Pareto front<")]
    assert len(re.findall(r'scope="row"', best)) == 2


@pytest.mark.parametrize("states", [(), ("FAIL", "WAITING")], ids=["none", "unfinished"])
def test_no_finished_trial(states: tuple[str, ...]) -> None:
    rows = tuple(TrialRow(i, state) for i, state in enumerate(states))
    table = TrialTable("s", ("maximize",), rows)
    assert figures_of(table) == {}
    text = study_page(table, "", {}, {}, [])
    assert f"No trial has finished: of {len(states)} trials none" in text
