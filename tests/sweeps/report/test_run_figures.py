"""The figures of runs: what they show, which files are written, and that the bytes repeat."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from bn_lightning.landscape import landscape_figure
from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.record import RunRecord
from bn_lightning.sweeps.analysis.compared_runs import ComparedRun, read_runs
from bn_lightning.sweeps.analysis.paper_curves import paper_accuracy
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.matplotlib_renderer import draw, save
from bn_lightning.sweeps.report.plotly_renderer import plots_of
from bn_lightning.sweeps.report.run_figures import (
    accuracy_figure,
    batch_norm_figure,
    comparison_figure,
    draw_run,
    figures_of_run,
    loss_figure,
    losses_figure,
    percentiles_figure,
    throughput_figure,
)

ACCURACY = [(1, 0.1), (1000, 0.5), (50_000, 0.98)]
CURVE = [(step, [value]) for step, value in ACCURACY]
MANY = [(step, [0.5]) for step in range(1, 50_001, 1000)]
PERCENTILES = {
    "activation/p15": [(0, -2.0), (10, -1.0)],
    "activation/p50": [(0, 0.5), (10, 0.25)],
    "activation/p85": [(0, 3.0), (10, 2.0)],
}
RUN = {"test/accuracy": ACCURACY, **PERCENTILES}
NUMBERS = ("scale", "shift", "mean_distance", "log_std_distance", "dead")


def monitored(
    layers: int = 2, numbers: tuple[str, ...] = NUMBERS, steps: tuple[int, ...] = (1, 100, 200)
) -> dict[str, list[tuple[int, float]]]:
    """Metrics as BatchNormMonitor logs them, each line with values of its own."""
    return {
        f"batch_norm/network.{layer}/{number}": [
            (step, layer + i / 10 + step / 1000) for step in steps
        ]
        for layer in range(layers)
        for i, number in enumerate(numbers)
    }


def lines(axes: Axes) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.get_lines()
    ]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def filled(axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    """The lower left and the upper right corner of the band."""
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    return vertices.min(0), vertices.max(0)


def compared(labels: list[str]) -> Figure:
    accuracy = accuracy_figure(dict.fromkeys(labels, CURVE))
    percentiles = percentiles_figure(dict.fromkeys(labels, RUN))
    return comparison_figure({"accuracy": accuracy, "percentiles": percentiles})


class TestAccuracy:
    def test_a_line_for_each_group_of_runs(self) -> None:
        other = [(1, [0.2]), (50_000, [0.9])]
        (axes,) = draw(accuracy_figure({"with": CURVE, "without": other}, title="mnist")).axes
        assert lines(axes) == [ACCURACY, [(1, 0.2), (50_000, 0.9)]]
        assert legend(axes) == ["with", "without"]
        styles = {(line.get_linestyle(), line.get_color()) for line in axes.get_lines()}
        assert len(styles) == 2
        assert axes.get_xlabel() == "training steps"
        assert axes.get_ylabel() == "test accuracy"
        assert axes.get_ylim()[1] == 1
        assert axes.get_title() == "mnist"

    def test_seeds_have_their_mean_and_a_band_from_lowest_to_highest(self) -> None:
        curve = [(10, [0.2, 0.4]), (20, [0.5, 0.9])]
        (axes,) = draw(accuracy_figure({"with": curve})).axes
        np.testing.assert_allclose(lines(axes), [[(10, 0.3), (20, 0.7)]])
        low, high = filled(axes)
        assert low.tolist() == [10, 0.2] and high.tolist() == [20, 0.9]

    def test_one_run_needs_no_legend(self) -> None:
        (axes,) = draw(accuracy_figure({"": CURVE})).axes
        assert lines(axes) == [ACCURACY]
        assert axes.get_legend() is None

    @pytest.mark.parametrize("curve", [CURVE[:1], CURVE, MANY], ids=["one", "few", "many"])
    def test_each_measurement_has_a_marker(self, curve: Any) -> None:
        """A line through one point would be invisible."""
        (axes,) = draw(accuracy_figure({"": curve})).axes
        (line,) = axes.get_lines()
        assert line.get_marker() not in ("", "None", None)
        assert not line.get_clip_on()  # whole at the edge, too

    def test_few_points_are_on_a_linear_axis(self) -> None:
        scales = [draw(accuracy_figure({"": c})).axes[0].get_xscale() for c in (CURVE, MANY)]
        assert scales == ["linear", "log"]

    def test_many_runs_are_told_apart(self) -> None:
        (axes,) = draw(accuracy_figure({str(i): CURVE for i in range(28)})).axes
        styles = {(line.get_linestyle(), line.get_color()) for line in axes.get_lines()}
        assert len(styles) == 28


class TestPercentiles:
    def test_three_lines_and_the_band_between(self) -> None:
        (axes,) = draw(percentiles_figure({"": PERCENTILES})).axes
        assert sorted(lines(axes)) == sorted(PERCENTILES.values())
        low, high = filled(axes)
        assert low.tolist() == [0, -2]
        assert high.tolist() == [10, 3]
        assert axes.get_xlabel() == "training steps"
        assert "15, 50, 85" in axes.get_ylabel()

    def test_a_panel_for_each_run_on_one_scale(self) -> None:
        wide = {name: [(s, 10 * v) for s, v in points] for name, points in PERCENTILES.items()}
        first, second = draw(percentiles_figure({"with": PERCENTILES, "without": wide})).axes
        assert (first.get_title(), second.get_title()) == ("with", "without")
        assert first.get_ylim() == second.get_ylim()
        assert first.get_ylim()[1] >= 30
        assert sorted(lines(second)) == sorted(wide.values())


class TestArms:
    ARMS = {"a run": "none", "another": "batch", "a third": "none"}

    def test_colours_are_the_arms_in_any_order(self) -> None:
        colours = []
        for labels in (list(self.ARMS), list(self.ARMS)[::-1]):
            (axes,) = draw(accuracy_figure(dict.fromkeys(labels, CURVE), self.ARMS)).axes
            colours.append({line.get_label(): line.get_color() for line in axes.get_lines()})
        assert colours[0] == colours[1]
        assert colours[0]["a run"] == colours[0]["a third"] != colours[0]["another"]

    def test_runs_of_one_arm_have_lines_of_their_own(self) -> None:
        (axes,) = draw(accuracy_figure(dict.fromkeys(self.ARMS, CURVE), self.ARMS)).axes
        styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
        assert len(styles) == 3

    def test_the_papers_points_have_the_arms_colours(self) -> None:
        arms = {"ours": "batch", "other": "none"}
        figure = accuracy_figure({"ours": CURVE}, arms, with_paper=True)
        (axes,) = draw(figure).axes
        ours, with_, without = axes.get_lines()
        assert with_.get_label() == "the paper's, with BatchNorm"
        assert ours.get_color() == with_.get_color() != without.get_color()
        assert lines(axes)[1] == [tuple(map(float, p)) for p in paper_accuracy()["batch"]]

    def test_loss_is_drawn_on_a_logarithmic_axis(self) -> None:
        (axes,) = draw(loss_figure({"with": [(1, [2.3]), (100, [0.1])]})).axes
        assert lines(axes) == [[(1, 2.3), (100, 0.1)]]
        assert axes.get_yscale() == "log" and "nats" in axes.get_ylabel()

    def test_throughput_has_a_bar_for_each_run(self) -> None:
        (axes,) = draw(throughput_figure({"a run": 300.0, "another": 200.0}, self.ARMS)).axes
        assert [bar.get_width() for bar in axes.patches] == [300, 200]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a run", "another"]

    def test_landscape_is_the_median_and_keeps_what_overflows_above(self) -> None:
        relative = [[0.9, 0.5, 4.0], [0.7, 0.4, float("inf")], [0.8, 0.6, float("nan")]]
        (axes,) = draw(landscape_figure([0.1, 1.0, 10.0], relative, "none", "caption")).axes
        median, _ = axes.get_lines()
        assert median.get_ydata()[:2].tolist() == [0.8, 0.5]
        assert median.get_ydata()[2] > axes.get_ylim()[1]
        low, high = filled(axes)
        assert low.tolist() == [0.1, 0.4] and high[0] == 10
        assert axes.get_title() == "caption"
        assert legend(axes) == ["lowest to highest batch", "median of 3 batches"]


class TestSteps:
    def test_a_logarithmic_axis_ends_near_its_points(self) -> None:
        for figure in (accuracy_figure({"": MANY}), loss_figure({"": MANY})):
            (axes,) = draw(figure).axes
            low, high = axes.get_xlim()
            assert 0.1 < low <= 1 and 50_000 <= high < 500_000

    def test_equal_ratios_are_equally_far_apart(self) -> None:
        """Most of what normalization changes happens early."""
        for figure in (
            draw(accuracy_figure({"": MANY})),
            draw(percentiles_figure({"": PERCENTILES})),
        ):
            (axes,) = figure.axes
            places = axes.transData.transform([(step, 0.5) for step in (100, 1000, 10_000)])[:, 0]
            assert places[1] - places[0] == pytest.approx(places[2] - places[1], rel=0.01)

    def test_step_0_has_its_place_on_one_scale_in_picture_and_page(self) -> None:
        figure = percentiles_figure({"": PERCENTILES})
        (axes,) = draw(figure).axes
        (plot,) = plots_of(figure)
        drawn = axes.transData.transform([(0, 0), (1, 0), (10, 0)])[:, 0]
        ticks = dict(
            zip(plot.layout["xaxis"]["ticktext"], plot.layout["xaxis"]["tickvals"], strict=True)
        )
        paged = np.array([ticks[name] for name in ("0", "1", "10")])
        assert drawn[0] < drawn[1] and plot.layout["xaxis"]["type"] == "linear"
        shares = [np.diff(places) / np.ptp(places) for places in (paged, drawn)]
        np.testing.assert_allclose(*shares, rtol=1e-5)
        assert plot.traces[-1]["x"] == [ticks["0"], ticks["10"]]
        assert plot.traces[-1]["customdata"] == [0, 10]


class TestComparison:
    @pytest.mark.parametrize("labels", [["with"], ["with", "without"]], ids=["one", "two"])
    def test_accuracy_of_all_then_percentiles_of_each(self, labels: list[str]) -> None:
        accuracy, *panels = draw(compared(labels)).axes
        assert lines(accuracy) == [ACCURACY] * len(labels)
        assert legend(accuracy) == labels
        assert [panel.get_title() for panel in panels] == labels
        for panel in panels:
            assert sorted(lines(panel)) == sorted(PERCENTILES.values())


class TestBatchNorm:
    def test_a_panel_for_each_number_a_line_for_each_layer(self) -> None:
        metrics = monitored()
        panels = draw(batch_norm_figure({"train/loss": ACCURACY, **metrics})).axes
        assert len(panels) == len(NUMBERS)
        for panel, number in zip(panels, NUMBERS, strict=True):
            expected = [metrics[f"batch_norm/network.{layer}/{number}"] for layer in range(2)]
            assert lines(panel) == expected
            assert panel.get_xlabel() == "training steps"
            assert panel.get_xscale() == "linear"  # of three points
        titles = [panel.get_title() for panel in panels]
        assert len(set(titles)) == len(NUMBERS)
        for title, word in zip(
            titles, ("scale", "shift", "mean", "deviation", "dead"), strict=True
        ):
            assert word in title
        low, high = panels[-1].get_ylim()
        assert low <= 0 < 1 <= high

    @pytest.mark.parametrize("layers", [1, 2, 12])
    def test_layers_are_named_in_their_order(self, layers: int) -> None:
        (found,) = draw(batch_norm_figure(monitored(layers))).legends
        names = [text.get_text() for text in found.get_texts()]
        assert names == [f"network.{layer}" for layer in range(layers)]

    def test_too_many_layers_are_not_named(self) -> None:
        figure = draw(batch_norm_figure(monitored(13)))
        assert not figure.legends
        assert [len(panel.get_lines()) for panel in figure.axes] == [13] * len(NUMBERS)

    @pytest.mark.parametrize("layers", [2, 30])
    def test_the_darkest_is_nearest_to_the_input(self, layers: int) -> None:
        for panel in draw(batch_norm_figure(monitored(layers))).axes:
            colours = [to_rgb(line.get_color()) for line in panel.get_lines()]
            brightness = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue in colours]
            assert brightness == sorted(set(brightness))

    def test_layers_keep_their_colour_in_each_panel(self) -> None:
        """Also if one of them has no running statistics."""
        metrics = monitored(3)
        for number in ("mean_distance", "log_std_distance"):
            del metrics[f"batch_norm/network.0/{number}"]
        scale, _, mean, *_ = draw(batch_norm_figure(metrics)).axes
        colours = {line.get_label(): line.get_color() for line in scale.get_lines()}
        assert len(mean.get_lines()) == 2
        for line in mean.get_lines():
            assert line.get_color() == colours[line.get_label()]

    def test_a_compiled_network_logs_two_numbers(self) -> None:
        figure = draw(batch_norm_figure(monitored(2, ("scale", "shift"))))
        assert [len(panel.get_lines()) for panel in figure.axes] == [2, 2, 0, 0, 0]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "network.0",
            "network.1",
        ]

    def test_a_single_look_is_seen(self) -> None:
        for panel in draw(batch_norm_figure(monitored(steps=(1,)))).axes:
            assert all(line.get_marker() not in ("", "None") for line in panel.get_lines())

    def test_a_layer_with_slashes_in_its_name(self) -> None:
        series = [(1, 0.5), (2, 0.25)]
        figure = draw(batch_norm_figure({"batch_norm/a/b/scale": series}))
        assert lines(figure.axes[0]) == [series]
        assert figure.legends[0].get_texts()[0].get_text() == "a/b"


class TestSave:
    def test_png_and_svg(self, tmp_path: Path) -> None:
        save(accuracy_figure({"": CURVE}), tmp_path / "new/folder/accuracy")
        assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {
            "accuracy.png",
            "accuracy.svg",
        }
        assert (tmp_path / "new/folder/accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")
        text = (tmp_path / "new/folder/accuracy.svg").read_text()
        assert text.startswith("<?xml")
        assert text.rstrip().endswith("</svg>")

    def test_a_name_with_a_dot(self, tmp_path: Path) -> None:
        save(accuracy_figure({"": CURVE}), tmp_path / "lr-0.5")
        assert {path.name for path in tmp_path.iterdir()} == {"lr-0.5.png", "lr-0.5.svg"}

    @pytest.mark.parametrize("suffix", ["png", "svg"])
    @pytest.mark.parametrize("twice", ["figure", "drawing"])
    def test_the_same_figure_gives_the_same_bytes(
        self, tmp_path: Path, suffix: str, twice: str
    ) -> None:
        figure: Any = compared(["with", "without"])
        for name in ("first", "second"):
            save(figure, tmp_path / name)
            if twice == "drawing":
                figure = compared(["with", "without"])
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


class TestRun:
    ALL = {**RUN, **monitored(), "train/loss": ACCURACY, "val/loss": ACCURACY}
    FILES = {
        f"{name}.{suffix}"
        for name in ("accuracy", "loss", "percentiles", "batch_norm")
        for suffix in ("png", "svg")
    }
    TITLE = "mnist_bn, without BatchNorm, seed 3"

    def record(self, directory: Path, metrics: dict[str, Any], **config: Any) -> ComparedRun:
        logger = MetricsCSVLogger(directory)
        for name, points in metrics.items():
            for step, value in points:
                logger.log_metrics({name: value}, step)
        logger.save()
        named = {"task_name": "mnist_bn", "norm": None, "seed": 3}
        record = RunRecord(directory, named | config)
        record.end("completed", data={"source": "mnist"})
        (run,) = read_runs([directory])
        return run

    def run(self, directory: Path, metrics: dict[str, Any]) -> set[str]:
        self.record(directory, metrics)
        draw_run(directory)
        return {path.name for path in directory.glob("figures/*")}

    def test_all_that_was_logged(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, self.ALL) == self.FILES

    @pytest.mark.parametrize(
        ("metrics", "names"),
        [
            ({"test/accuracy": ACCURACY}, {"accuracy"}),
            ({"val/accuracy": ACCURACY}, {"accuracy"}),
            (PERCENTILES, {"percentiles"}),
            ({"train/loss": ACCURACY}, {"loss"}),
            ({"lr": ACCURACY}, set()),
            ({}, set()),
        ],
        ids=["accuracy", "validation", "percentiles", "loss", "none_of_them", "nothing"],
    )
    def test_what_was_not_logged_is_left_out(
        self, tmp_path: Path, metrics: dict[str, Any], names: set[str]
    ) -> None:
        assert figures_of_run(self.record(tmp_path, metrics)).keys() == names

    def test_a_diverged_run_is_drawn_as_far_as_it_came(self, tmp_path: Path) -> None:
        nan = float("nan")
        metrics = {name: [(1, 1.0), (2, nan)] for name in (*PERCENTILES, *monitored())}
        metrics |= {"test/accuracy": ACCURACY[:1], "train/loss": [(1, 2.0), (2, nan)]}
        assert self.run(tmp_path, metrics) == self.FILES

    def test_titles_name_task_arm_and_seed(self, tmp_path: Path) -> None:
        for name, figure in figures_of_run(self.record(tmp_path, self.ALL)).items():
            drawn = draw(figure)
            top = drawn.get_suptitle() if name == "batch_norm" else drawn.axes[0].get_title()
            assert top == self.TITLE

    def test_loss_has_a_line_for_each_split(self, tmp_path: Path) -> None:
        figure = figures_of_run(self.record(tmp_path, self.ALL))["loss"]
        (axes,) = draw(figure).axes
        assert legend(axes) == ["training", "validation"]
        assert len({line.get_marker() for line in axes.get_lines()}) == 2

    def test_a_loss_of_many_batches_is_averaged(self) -> None:
        """Every mean is of what came since the point before it, and the last step has a point."""
        points = [(step, float(step // 50 % 2)) for step in range(50, 50_001, 50)]
        (axes,) = draw(losses_figure({"training": points}, "batch")).axes
        (line,) = lines(axes)
        assert 20 < len(line) <= 50 and line[-1][0] == 50_000
        assert legend(axes) == ["training, mean since the point before"]
        before, (step, mean) = line[-2][0], line[-1]
        part = [value for at, value in points if before < at <= step]
        assert mean == pytest.approx(np.mean(part))

    @pytest.mark.parametrize(("steps", "count"), [(50_000, 2), (1_000, 1)])
    def test_the_papers_points_are_beside_its_own_experiment_and_budget_only(
        self, tmp_path: Path, steps: int, count: int
    ) -> None:
        network = {"widths": [100] * 3, "activation": "sigmoid", "norm_position": "before"}
        run = self.record(
            tmp_path,
            {"test/accuracy": ACCURACY},
            model={"network": network},
            data={"batch_size": 60},
            trainer={"max_steps": steps},
        )
        (axes,) = draw(figures_of_run(run)["accuracy"]).axes
        assert len(axes.get_lines()) == count
        assert legend(axes) == ["the paper's, without BatchNorm"] * (count - 1)
