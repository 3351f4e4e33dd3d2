"""Every figure of a grid says what the grid says: in its cells, its hatching, its captions."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_lightning.sweeps.analysis.tolerance import Grid, Trial
from bn_lightning.sweeps.report.grid_matplotlib import (
    heatmaps_figure,
    importances_figure,
    outcomes_figure,
    rates_figure,
    widths_figure,
)
from bn_lightning.sweeps.report.run_matplotlib import save

ARMS = {"batch": "with BatchNorm", "none": "without"}
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


@pytest.fixture
def grid() -> Grid:
    trials = [
        Trial(arm, init, lr, seed, accuracy, 1.0, diverged=(init, lr, seed, arm) == NAN_AT)
        for (init, lr, seed), both in CELLS.items()
        for arm, accuracy in zip(ARMS, both, strict=True)
        if accuracy is not None
    ]
    return Grid.of(trials)


NAN_AT = (1.0, 1.0, 1, "batch")


def texts(axes: Axes) -> dict[tuple[int, int], str]:
    """(column, row) of a cell -> what stands in it."""
    return {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda o: hasattr(o, "get_text")))


def test_heatmaps_name_the_mean_of_the_seeds_that_are_there(grid):
    figure = heatmaps_figure(grid, ARMS, CAPTION)
    first, second, difference = figure.axes[:3]
    assert texts(first) == {(0, 0): ".94", (1, 0): ".97", (0, 1): ".72", (1, 1): ".53"}
    assert texts(second) == {(0, 0): ".11", (1, 0): ".50", (0, 1): ".10"}
    assert texts(difference) == {(0, 0): ".83", (1, 0): ".47", (0, 1): ".62"}
    assert [a.get_title() for a in (first, second, difference)] == [*ARMS.values(), "difference"]
    hatched = [patch for patch in first.patches if patch.get_hatch()]
    assert [(patch.get_x(), patch.get_y()) for patch in hatched] == [(0.5, 0.5)]
    assert not second.patches
    assert CAPTION in words(figure) and "standard deviation" in words(figure)


def test_both_arms_have_one_scale(grid):
    images = [axes.images[0] for axes in heatmaps_figure(grid, ARMS, CAPTION).axes[:2]]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    assert {image.get_cmap().name for image in images} == {"viridis"}


def test_one_arm_has_no_difference(grid):
    figure = heatmaps_figure(grid, {"batch": "with BatchNorm"}, CAPTION)
    assert [axes.get_title() for axes in figure.axes] == ["with BatchNorm", ""]


def test_outcomes_are_those_of_most_seeds_and_of_a_tie_the_worse(grid):
    first, second = outcomes_figure(grid, ARMS, CAPTION).axes
    assert texts(first) == {(0, 0): "T", (1, 0): "T", (0, 1): "s", (1, 1): "N"}
    assert texts(second) == {(0, 0): "c", (1, 0): "?", (0, 1): "c", (1, 1): "?"}


def test_rates_draws_the_mean_and_the_band_of_the_seeds(grid):
    figure = rates_figure(grid, ARMS, CAPTION)
    panel = figure.axes[1]
    assert panel.get_title() == "1" and panel.get_xscale() == "log"
    batch, none, _ = panel.lines
    np.testing.assert_allclose(batch.get_xydata(), [[0.01, 0.725], [1, 0.53]])
    np.testing.assert_allclose(none.get_xydata(), [[0.01, 0.10]])
    low, high = panel.collections[0].get_datalim(panel.transData).intervaly
    assert (low, high) == pytest.approx((0.10, 0.96))


def test_widths_have_intervals_and_arrows_at_the_edge(grid):
    axes = widths_figure(grid, ARMS, CAPTION).axes[0]
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    # Rates at -2 and 0 decades stand for two each.
    assert [line.get_xdata()[0] for line in points] == [4, 2, 0, 0]
    assert len(axes.texts) == 2  # both of the first arm reach an edge, none of the second
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(intervals[1], [0, 4])


def test_importances_has_a_bar_for_each_parameter_and_arm():
    shares = {"batch": {"lr": 0.75, "init": 0.25}, "none": {"init": 1.0}}
    axes = importances_figure(shares, ARMS, CAPTION).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.25, 0.0, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr", "init"]


def test_named_initialisations(grid):
    trials = [
        Trial("batch", init, lr, 1, 0.5, 1.0) for init in ("zeros", "he") for lr in (0.1, 1.0)
    ]
    figure = heatmaps_figure(Grid.of(trials), {"batch": "with"}, CAPTION)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["he", "zeros"]
    assert figure.axes[0].get_ylabel() == "initialisation"


@pytest.mark.parametrize(
    "draw",
    [heatmaps_figure, outcomes_figure, rates_figure, widths_figure],
    ids=lambda f: f.__name__,
)
def test_a_figure_is_written_the_same_twice(grid, draw, tmp_path: Path):
    for name in ("one", "two"):
        save(draw(grid, ARMS, CAPTION), tmp_path / name)
    for suffix in ("png", "svg"):
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two and len(one) > 5000


def test_large_grids_have_fewer_labels_and_panels_and_no_numbers():
    trials = [Trial("batch", 1.1**i, 1.1**r, 1, 0.5, 1.0) for i in range(25) for r in range(25)]
    grid, arms = Grid.of(trials), {"batch": "with"}
    axes = heatmaps_figure(grid, arms, CAPTION).axes[0]
    assert not texts(axes) and len(axes.get_xticks()) == 13
    panels = [axes for axes in rates_figure(grid, arms, CAPTION).axes if axes.get_visible()]
    assert len(panels) == 12
    assert panels[0].get_title() == "1" and panels[-1].get_title() == f"{1.1**24:.3g}"


def test_names_are_short_and_no_mathematics():
    name = "$x$" + "y" * 50
    trials = [Trial(name, name, lr, 1, 0.5, 1.0) for lr in (0.1, 1.0)]
    figure = heatmaps_figure(Grid.of(trials), {name: name}, CAPTION)
    figure.draw_without_rendering()
    label = figure.axes[0].get_yticklabels()[0].get_text()
    assert label == r"\$x\$" + "y" * 26 + "…"


@pytest.mark.parametrize("name", ["$x_{$", r"$\frac{a$", "$$"])
def test_captions_and_labels_are_no_mathematics(grid, name):
    """Matplotlib refuses to draw what it cannot read as mathematics."""
    shares = {"batch": {name: 0.5}}
    drawn = [rates_figure(grid, ARMS, name), importances_figure(shares, {"batch": name}, name)]
    for figure in drawn:
        figure.draw_without_rendering()
        assert name.replace("$", r"\$") in words(figure)
