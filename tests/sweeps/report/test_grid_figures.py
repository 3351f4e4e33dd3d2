"""The figures of a grid show its numbers: in cells, hatching and captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_lightning.sweeps.analysis.summary import Summary, summarize
from bn_lightning.sweeps.analysis.tolerance import GridTrial
from bn_lightning.sweeps.report.grid_figures import grid_figures
from bn_lightning.sweeps.report.matplotlib_renderer import draw, save

ARMS = {"batch": "with BatchNorm", "none": "without BatchNorm"}
CAPTION = "digits, 20 steps, 2 seeds"

# Initialisation, rate, seed -> accuracy of both arms; None where a trial is missing.
CELLS = {
    (0.1, 0.01, 1): (0.95, 0.10),
    (0.1, 0.01, 2): (0.93, 0.12),
    (0.1, 1.0, 1): (0.97, 0.50),
    (0.1, 1.0, 2): (0.97, None),
    (1.0, 0.01, 1): (0.50, 0.10),
    (1.0, 0.01, 2): (0.95, 0.10),
    (1.0, 1.0, 1): (0.10, None),
    (1.0, 1.0, 2): (0.96, None),
}


def summary_of(trials: list[GridTrial]) -> Summary:
    return summarize(trials, 2.3, is_planned=False)


def drawn(found: Summary, name: str, caption: str = CAPTION) -> Figure:
    return draw(grid_figures(found, "test accuracy", caption)[name])


@pytest.fixture
def found() -> Summary:
    trials = [
        GridTrial(arm, init, lr, seed, accuracy, 1.0, diverged=(init, lr, seed, arm) == NAN_AT)
        for (init, lr, seed), both in CELLS.items()
        for arm, accuracy in zip(ARMS, both, strict=True)
        if accuracy is not None
    ]
    return summary_of(trials)


NAN_AT = (1.0, 1.0, 1, "batch")


def texts(axes: Axes) -> dict[tuple[int, int], str]:
    """(column, row) of a cell -> what stands in it."""
    return {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda o: hasattr(o, "get_text")))


def test_heatmaps_name_the_mean_of_the_seeds_that_are_there(found):
    figure = drawn(found, "accuracy")
    first, second, difference = figure.axes[:3]
    assert texts(first) == {(0, 0): ".94", (1, 0): ".97", (0, 1): ".72", (1, 1): ".53"}
    assert texts(second) == {(0, 0): ".11", (1, 0): ".50", (0, 1): ".10"}
    assert texts(difference) == {(0, 0): ".83", (1, 0): ".47", (0, 1): ".62"}
    assert [a.get_title() for a in (first, second, difference)] == [
        *ARMS.values(),
        "with BatchNorm\nminus without BatchNorm",
    ]
    hatched = [patch for patch in first.patches if patch.get_hatch()]
    assert [(patch.get_x(), patch.get_y()) for patch in hatched] == [(0.5, 0.5)]
    assert not second.patches
    assert CAPTION in words(figure) and "initial\nstandard deviation" in words(figure)


def test_both_arms_have_one_scale(found):
    images = [axes.images[0] for axes in drawn(found, "accuracy").axes[:2]]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    assert {image.get_cmap().name for image in images} == {"viridis"}


def test_one_arm_has_no_difference():
    trials = [GridTrial("batch", 0.1, lr, 1, 0.5, 1.0) for lr in (0.1, 1.0)]
    figure = drawn(summary_of(trials), "accuracy")
    assert [axes.get_title() for axes in figure.axes] == ["with BatchNorm", ""]


def test_outcomes_are_those_of_most_seeds_and_of_a_tie_the_worse(found):
    first, second = drawn(found, "outcomes").axes
    assert texts(first) == {(0, 0): "T", (1, 0): "T", (0, 1): "s", (1, 1): "N"}
    assert texts(second) == {(0, 0): "c", (1, 0): "?", (0, 1): "c", (1, 1): "?"}


def test_rates_draws_the_mean_and_the_band_of_the_seeds(found):
    figure = drawn(found, "rates")
    panel = figure.axes[1]
    assert not any(line.get_clip_on() for line in panel.lines[1:])  # markers at the edge are whole
    assert panel.get_title() == "initial standard deviation 1" and panel.get_xscale() == "log"
    _, batch, none = panel.lines
    np.testing.assert_allclose(batch.get_xydata(), [[0.01, 0.725], [1, 0.53]])
    np.testing.assert_allclose(none.get_xydata(), [[0.01, 0.10]])
    low, high = panel.collections[0].get_datalim(panel.transData).intervaly
    assert (low, high) == pytest.approx((0.10, 0.96))


def test_widths_have_intervals_and_arrows_at_the_edge(found):
    axes = drawn(found, "widths").axes[0]
    # Rates at -2 and 0 decades stand for two each.
    widths = [x for line in axes.lines for x in line.get_xdata()]
    assert widths == [4, 2, 0, 0]
    assert len(axes.texts) == 2  # both of the first arm reach an edge, none of the second
    intervals = [path.vertices[:, 0] for path in axes.collections[0].get_paths()]
    np.testing.assert_allclose(intervals[1], [0, 4])


def test_importances_has_a_bar_for_each_parameter_and_arm(found):
    arms = {
        "batch": replace(found.arms["batch"], importances={"lr": 0.75, "init": 0.25}),
        "none": replace(found.arms["none"], importances={"init": 1.0}),
    }
    axes = drawn(replace(found, arms=arms), "importances").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.25, 0.0, 1.0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["learning rate", "initial standard deviation"]
    assert "8 trials with BatchNorm, 5 trials without BatchNorm" in words(axes.figure)


def test_named_initialisations():
    trials = [
        GridTrial("batch", init, lr, 1, 0.5, 1.0) for init in ("zeros", "he") for lr in (0.1, 1.0)
    ]
    figure = drawn(summary_of(trials), "accuracy")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["he", "zeros"]
    assert figure.axes[0].get_ylabel() == "initialization"


@pytest.mark.parametrize("name", ["accuracy", "outcomes", "rates", "widths"])
def test_a_figure_is_written_the_same_twice(found, name, tmp_path: Path):
    for file in ("one", "two"):
        save(grid_figures(found, "test accuracy", CAPTION)[name], tmp_path / file)
    for suffix in ("png", "svg"):
        one, two = ((tmp_path / f"{file}.{suffix}").read_bytes() for file in ("one", "two"))
        assert one == two and len(one) > 5000


def test_large_grids_have_fewer_labels_and_panels_and_no_numbers():
    trials = [GridTrial("batch", 1.1**i, 1.1**r, 1, 0.5, 1.0) for i in range(25) for r in range(25)]
    found = summary_of(trials)
    axes = drawn(found, "accuracy").axes[0]
    assert not texts(axes) and len(axes.get_xticks()) == 13
    panels = [axes for axes in drawn(found, "rates").axes if axes.get_visible()]
    assert len(panels) == 12
    assert panels[0].get_title().split()[-1] == "1"
    assert panels[-1].get_title().split()[-1] == f"{1.1**24:.3g}"


def test_names_are_short_and_no_mathematics():
    name = "$x$" + "y" * 50
    trials = [GridTrial(name, name, lr, 1, 0.5, 1.0) for lr in (0.1, 1.0)]
    figure = drawn(summary_of(trials), "accuracy")
    figure.draw_without_rendering()
    label = figure.axes[0].get_yticklabels()[0].get_text()
    assert label == r"\$x\$" + "y" * 26 + "…"


@pytest.mark.parametrize("name", ["$x_{$", r"$\frac{a$", "$$"])
def test_captions_and_labels_are_no_mathematics(found, name):
    """Matplotlib refuses to draw what it cannot read as mathematics."""
    arm = replace(found.arms["batch"], importances={name: 0.5}, label=name)
    named = replace(found, arms={"batch": arm}, comparisons=())
    for figure in ("rates", "importances"):
        picture = drawn(named, figure, name)
        picture.draw_without_rendering()
        assert name.replace("$", r"\$") in words(picture)


def test_one_seed_and_an_initialisation_without_trials():
    trials = [
        GridTrial(arm, init, lr, 1, 0.95, 1.0)
        for arm in ("a", "b", "none")
        for init in (0.1, 1.0)
        for lr in (0.1, 1.0, 10.0)
        if (arm, init) != ("b", 1.0)
    ]
    for figure in grid_figures(summary_of(trials), "test accuracy", CAPTION).values():
        draw(figure).draw_without_rendering()
