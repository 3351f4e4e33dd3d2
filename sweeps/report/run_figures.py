"""The figures of runs: the BatchNorm paper's Figure 1 from our own metrics, and BatchNorm's values.

Axes of steps are logarithmic, because most of what normalization changes happens early, except
where there are only a few points. Each measurement has a marker.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.colors import to_hex

from bn_lightning.sweeps.analysis.arms import (
    COLORS,
    LINES,
    MARKERS,
    Style,
    label_of,
    style_of,
    title_of,
)
from bn_lightning.sweeps.analysis.compared_runs import ComparedRun, read_runs
from bn_lightning.sweeps.analysis.paper_curves import is_paper_experiment, paper_accuracy
from bn_lightning.sweeps.analysis.seed_groups import SeedGroup, best_metric
from bn_lightning.sweeps.report.figure import GRAY, Axis, Band, Bars, Figure, Line, Panel, Series
from bn_lightning.sweeps.report.matplotlib_renderer import figures_folder, save

Points = Sequence[tuple[int, float]]
"""(step, value) pairs in order of steps."""

Curve = Sequence[tuple[int, Sequence[float]]]
"""(step, a value for each seed) pairs in order of steps."""

Arms = Mapping[str, str]
"""Label -> arm, which has the run's color; a run without an arm has a color of its own."""

# The metrics of callbacks/batch_norm_monitor.py -> the title of their panel.
_MONITORED = {
    "scale": "mean |scale|",
    "shift": "mean |shift|",
    "mean_distance": "batch mean from running mean\n(running deviations)",
    "log_std_distance": "ln(batch / running deviation)\n(root mean square)",
    "dead": "share of dead channels",
}
_MOST_IN_LEGEND = 12
_PERCENTILES = tuple(f"activation/p{number}" for number in (15, 50, 85))
_SPLITS = {"train/loss": "training", "val/loss": "validation", "test/loss": "test"}

COMPARED = ("accuracy", "percentiles")
"""Names of the figures that a comparison has side by side."""

MOST_LOSSES = 50
"""Points of a loss in the figure of a run."""

FEW_POINTS = 12
"""Lines with at most this many points have a linear axis of steps."""


def draw_run(directory: str | Path) -> None:
    """Write the figures of a run into its `figures/`, as PNG and SVG."""
    (run,) = read_runs([Path(directory)])
    folder = figures_folder(Path(directory))
    for name, figure in figures_of_run(run).items():
        save(figure, folder / name)


def figures_of_run(run: ComparedRun) -> dict[str, Figure]:
    """Return file name -> figure for what a run logged, with its task, arm and seed as title.

    They are `accuracy`, `loss` (of training, validation and test), `percentiles` and `batch_norm`.
    """
    title = title_of(run.record["config"])
    metric = best_metric([run], "accuracy")
    found = {}
    if metric:
        curves = {"": [(step, [value]) for step, value in run.metrics[metric]]}
        with_paper = metric == "test/accuracy" and is_paper_experiment(run.record)
        found["accuracy"] = accuracy_figure(curves, {"": run.arm}, with_paper, title, metric)
    losses = {name: run.metrics[key] for key, name in _SPLITS.items() if key in run.metrics}
    if losses:
        found["loss"] = losses_figure(losses, run.arm, title)
    if run.metrics.keys() >= {*_PERCENTILES}:
        found["percentiles"] = percentiles_figure({title: run.metrics}, {title: run.arm})
    if any(name.startswith("batch_norm/") for name in run.metrics):
        found["batch_norm"] = batch_norm_figure(run.metrics, title)
    return found


def figures_of_groups(groups: Sequence[SeedGroup], with_paper: bool) -> dict[str, Figure]:
    """Return file name -> figure for what groups of runs logged, in the order of the page.

    Args:
        groups: at least one.
        with_paper: whether the paper's curves are drawn.
    """
    arms = {group.title: group.arm for group in groups}
    runs = [run for group in groups for run in group.runs]
    tasks = {run.task for run in runs}
    task = tasks.pop() if len(tasks) == 1 else ""
    metric, loss = best_metric(runs, "accuracy"), best_metric(runs, "loss")
    accuracies, losses = (
        {group.title: curve for group in groups if (curve := group.curve(name))}
        for name in (metric, loss)
    )
    found = {}
    if accuracies:
        with_paper = with_paper and metric == "test/accuracy"
        found["accuracy"] = accuracy_figure(accuracies, arms, with_paper, task, metric)
    if losses:
        found["loss"] = loss_figure(losses, arms, task, loss)
    first = {group.runs[0].label: group.runs[0] for group in groups}
    percentiles = {
        label: run.metrics for label, run in first.items() if run.metrics.keys() >= {*_PERCENTILES}
    }
    if percentiles:
        of_runs = {label: run.arm for label, run in first.items()}
        found["percentiles"] = percentiles_figure(percentiles, of_runs)
    speeds = {
        group.title: speed.mean
        for group in groups
        if (speed := group.spread(lambda run: run.record.get("steps_per_second"))).n
    }
    if speeds:
        found["throughput"] = throughput_figure(speeds, arms)
    return found


def comparison_figure(figures: Mapping[str, Figure]) -> Figure:
    """Describe the whole of Figure 1: accuracy of all runs, then the percentiles of each.

    Args:
        figures: file name -> figure, as `figures_of_groups` returns them.
    """
    panels = [panel for name in COMPARED if name in figures for panel in figures[name].panels]
    return Figure(panels, (4 * max(len(panels), 1), 3.3), legend="panels")


def accuracy_figure(
    runs: Mapping[str, Curve],
    arms: Arms | None = None,
    with_paper: bool = False,
    title: str = "",
    metric: str = "test/accuracy",
) -> Figure:
    """Describe accuracy against training steps, a line for each group of runs (Figure 1a).

    The line is the mean over seeds. Several seeds have a band from the lowest to the highest.

    Args:
        runs: label -> accuracy in [0, 1]; an empty label has no entry in the legend.
        arms: label -> arm.
        with_paper: whether the paper's points of these arms are drawn.
        title: above the picture.
        metric: the accuracy that was measured.
    """
    series = _curves(runs, arms)
    x = _steps_axis(series)
    for arm, points in paper_accuracy().items() if with_paper else ():
        if not arms or arm in arms.values():
            steps, values = zip(*points, strict=True)
            name = f"the paper's, {label_of(arm)}"
            series.append(Line(steps, values, name, style_of(arm), "circles"))
    name = metric.replace("/", " ")
    y = Axis(name, bounds=(None, 1))
    panel = _steps_panel("accuracy", title, x, y, series, name)
    return Figure([panel], (5, 3.5), legend="panels")


def loss_figure(
    runs: Mapping[str, Curve],
    arms: Arms | None = None,
    title: str = "",
    metric: str = "test/loss",
) -> Figure:
    """Describe a loss in nats against training steps, as `accuracy_figure` does accuracy."""
    series = _curves(runs, arms)
    name = metric.replace("/", " ")
    y = Axis(f"{name}, nats", "log", number_format="g")
    panel = _steps_panel("loss", title, _steps_axis(series), y, series, name)
    return Figure([panel], (5, 3.5), legend="panels")


def losses_figure(losses: Mapping[str, Points], arm: str, title: str = "") -> Figure:
    """Describe the losses of one run in nats against training steps, a line for each split.

    Of a loss with more than `MOST_LOSSES` points, which is one of single batches, each point of the
    line is the mean since the point before.

    Args:
        losses: name of a split -> loss.
        arm: of the run, which has its color.
        title: above the picture.
    """
    colors = (GRAY, style_of(arm).color, COLORS[2])
    series: list[Series] = []
    for i, (name, points) in enumerate(losses.items()):
        means = _means(points)
        label = name if means is points else f"{name}, mean since the point before"
        style = Style(colors[i % len(colors)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)])
        series.append(_line(means, label, style))
    y = Axis("loss, nats", "log", number_format="g")
    panel = _steps_panel("losses", title, _steps_axis(series), y, series, "loss")
    return Figure([panel], (5, 3.5), legend="panels")


def percentiles_figure(
    runs: Mapping[str, Mapping[str, Points]], arms: Arms | None = None
) -> Figure:
    """Describe percentiles of the inputs of one activation, a panel for each run (Figure 1b, c).

    All panels have the same bounds, so that widths can be compared.

    Args:
        runs: label -> metrics with `activation/p15`, `activation/p50` and `activation/p85`.
        arms: label -> arm.
    """
    label = "input of one unit of the last\nactivation, percentiles 15, 50, 85"
    y = Axis(label, bounds=_common_bounds(runs.values()))
    styles = run_styles(runs, arms)
    panels = []
    for i, (label, metrics) in enumerate(runs.items()):
        steps, low = zip(*metrics["activation/p15"], strict=True)
        _, middle = zip(*metrics["activation/p50"], strict=True)
        _, high = zip(*metrics["activation/p85"], strict=True)
        style = Style(styles[label].color)
        series: list[Series] = [
            Band(steps, low, high, style.color),
            Line(steps, low, "", style, "line and points", width=0.5),
            Line(steps, high, "", style, "line and points", width=0.5),
            Line(steps, middle, "", style, "line and points"),
        ]
        panels.append(
            Panel(
                f"percentiles-{i}",
                label,
                Axis("training steps", "log1p"),
                y,
                series,
                f"Inputs of the last activation, {label}",
                "15th, 50th and 85th percentile of one unit on a fixed probe set",
            )
        )
    return Figure(panels, (5 * len(panels), 3.5))


def throughput_figure(speeds: Mapping[str, float], arms: Arms | None = None) -> Figure:
    """Describe training steps per second, a bar for each run.

    Args:
        speeds: label -> steps per second.
        arms: label -> arm.
    """
    styles = run_styles(speeds, arms)
    panel = Panel(
        "throughput",
        "",
        Axis("training steps per second,\nevaluations included"),
        Axis(is_reversed=True),
        [Bars(speeds, [styles[label].color for label in speeds], ",.0f")],
        "Throughput",
        page_height=140 + 50 * len(speeds),
        has_tools=False,
    )
    return Figure([panel], (5, 1.2 + 0.35 * len(speeds)))


def batch_norm_figure(metrics: Mapping[str, Points], title: str = "") -> Figure:
    """Describe the parameters and batch statistics of each BatchNorm layer against steps.

    Args:
        metrics: with the `batch_norm/LAYER/METRIC` of callbacks/batch_norm_monitor.py. There is a
            panel for each metric and a line for each layer, the darkest nearest to the input.
        title: above the picture.
    """
    monitored = {
        tuple(name.removeprefix("batch_norm/").rsplit("/", 1)): points
        for name, points in metrics.items()
        if name.startswith("batch_norm/")
    }
    layers = list(dict.fromkeys(layer for layer, _ in monitored))
    # viridis grows lighter all the way; its last tenth is too light to see.
    shades = {
        layer: to_hex(colormaps["viridis"](0.9 * i / max(len(layers) - 1, 1)))
        for i, layer in enumerate(layers)
    }
    panels = []
    for name, quantity in _MONITORED.items():
        lines = [
            _line(monitored[layer, name], layer, Style(shades[layer]))
            for layer in layers
            if (layer, name) in monitored
        ]
        y = Axis(bounds=(-0.02, 1.02) if name == "dead" else (None, None))
        panels.append(Panel(f"batch_norm-{name}", quantity, _steps_axis(lines), y, lines))
    return Figure(
        panels,
        (3.2 * len(panels), 3.3),
        legend="below" if len(layers) <= _MOST_IN_LEGEND else "",
        title=title,
    )


def run_styles(labels: Iterable[str], arms: Arms | None = None) -> dict[str, Style]:
    """Return label -> style: the arm's color, and another line for each further run of an arm.

    A style depends on the order of labels only among runs of one arm.
    """
    labels = list(labels)
    of = {label: (arms or {}).get(label, label) for label in labels}
    turns: Counter[str] = Counter()
    styles = {}
    for label in labels:
        styles[label] = style_of(of[label], of.values(), turns[of[label]])
        turns[of[label]] += 1
    return styles


def _curves(runs: Mapping[str, Curve], arms: Arms | None) -> list[Series]:
    """Return a line for each mean, and before it a band where there are several seeds."""
    styles = run_styles(runs, arms)
    series: list[Series] = []
    for label, curve in runs.items():
        steps = [step for step, _ in curve]
        if any(len(values) > 1 for _, values in curve):
            low, high = ([end(values) for _, values in curve] for end in (min, max))
            series.append(Band(steps, low, high, styles[label].color))
        series.append(_line([(s, fmean(values)) for s, values in curve], label, styles[label]))
    return series


def _line(points: Points, name: str, style: Style) -> Line:
    steps, values = zip(*points, strict=True)
    return Line(steps, values, name, style, "line and points")


def _means(points: Points) -> Points:
    """Return the means of at most `MOST_LOSSES` parts of equal ratios of steps, at their ends."""
    if len(points) <= MOST_LOSSES:
        return points
    first, last = max(points[0][0], 1), points[-1][0]
    parts: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        share = math.log(max(step, 1) / first) / math.log(last / first)
        parts.setdefault(math.ceil(share * (MOST_LOSSES - 1) - 1e-9), []).append((step, value))
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts.values()]


def _steps_axis(series: Iterable[Series]) -> Axis:
    most = max((len(line.x) for line in series if isinstance(line, Line)), default=0)
    if most <= FEW_POINTS:
        return Axis("training steps", number_format=",")
    return Axis("training steps", "log", number_format=",")


def _steps_panel(
    id: str, title: str, x: Axis, y: Axis, series: Sequence[Series], name: str
) -> Panel:
    lines = sum(isinstance(one, Line) for one in series)
    height = 380 + 20 * lines
    page_title = f"{name[:1].upper()}{name[1:]}"
    return Panel(id, title, x, y, series, page_title, page_height=height, page_legend="below")


def _common_bounds(
    runs: Iterable[Mapping[str, Points]],
) -> tuple[float, float] | tuple[None, None]:
    """Return bounds around the percentiles of all runs."""
    values = [
        value
        for metrics in runs
        for name in ("activation/p15", "activation/p85")
        for _, value in metrics[name]
        if math.isfinite(value)
    ]
    if not values:
        return None, None
    room = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room
