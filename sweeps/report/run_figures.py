"""The figures of runs: the BatchNorm paper's Figure 1 from our own metrics, and BatchNorm's values.

Axes of steps are logarithmic, because most of what normalization changes happens early.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.colors import to_hex

from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.sweeps.analysis.arms import Style, label_of, style_of
from bn_lightning.sweeps.analysis.paper_curves import paper_accuracy
from bn_lightning.sweeps.report.figure import Axis, Band, Bars, Figure, Line, Panel, Series
from bn_lightning.sweeps.report.matplotlib_renderer import figures_folder, save

Points = Sequence[tuple[int, float]]
"""(step, value) pairs in order of steps."""

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

_LOG_STEPS = Axis("training steps", "log", number_format=",")


def draw_run(directory: str | Path) -> None:
    """Write `figures/accuracy`, `percentiles` and `batch_norm` of a run from its metrics.csv.

    Each is written as PNG and SVG, if the run logged its metrics.
    """
    metrics = read_metrics(directory)
    folder = figures_folder(Path(directory))
    if "test/accuracy" in metrics:
        save(accuracy_figure({"": metrics["test/accuracy"]}), folder / "accuracy")
    if "activation/p50" in metrics:
        save(percentiles_figure({"": metrics}), folder / "percentiles")
    if any(name.startswith("batch_norm/") for name in metrics):
        save(batch_norm_figure(metrics), folder / "batch_norm")


def comparison_figure(accuracy: Figure, percentiles: Figure) -> Figure:
    """Describe the whole of Figure 1: accuracy of all runs, then the percentiles of each."""
    panels = [*accuracy.panels, *percentiles.panels]
    return Figure(panels, (4 * len(panels), 3.3), legend="panels")


def accuracy_figure(
    runs: Mapping[str, Points], arms: Arms | None = None, with_paper: bool = False
) -> Figure:
    """Describe test accuracy against training steps, a line for each run (Figure 1a).

    Args:
        runs: label -> accuracy in [0, 1]; an empty label has no entry in the legend.
        arms: label -> arm.
        with_paper: whether the paper's points are drawn.
    """
    lines = _lines(runs, arms)
    for arm, points in paper_accuracy().items() if with_paper else ():
        steps, values = zip(*points, strict=True)
        name = f"the paper's, {label_of(arm)}"
        lines.append(Line(steps, values, name, style_of(arm), "circles"))
    y = Axis("test accuracy", bounds=(None, 1))
    panel = _steps_panel("accuracy", "Test accuracy", _LOG_STEPS, y, lines)
    return Figure([panel], (5, 3.5), legend="panels")


def loss_figure(runs: Mapping[str, Points], arms: Arms | None = None) -> Figure:
    """Describe test loss in nats against training steps, a line for each run.

    Args:
        runs: label -> loss.
        arms: label -> arm.
    """
    y = Axis("test loss, nats", "log", number_format="g")
    panel = _steps_panel("loss", "Test loss", _LOG_STEPS, y, _lines(runs, arms))
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
            Line(steps, low, "", style, width=0.5),
            Line(steps, high, "", style, width=0.5),
            Line(steps, middle, "", style),
        ]
        panels.append(
            Panel(
                f"percentiles-{i}",
                label,
                Axis("training steps", "symlog", (0, None), number_format=","),
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


def batch_norm_figure(metrics: Mapping[str, Points]) -> Figure:
    """Describe the parameters and batch statistics of each BatchNorm layer against steps.

    Args:
        metrics: with the `batch_norm/LAYER/METRIC` of callbacks/batch_norm_monitor.py. There is a
            panel for each metric and a line for each layer, the darkest nearest to the input.
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
    panels = [
        Panel(
            f"batch_norm-{name}",
            title,
            _LOG_STEPS,
            Axis(bounds=(-0.02, 1.02) if name == "dead" else (None, None)),
            [
                _line(monitored[layer, name], layer, Style(shades[layer]))
                for layer in layers
                if (layer, name) in monitored
            ],
        )
        for name, title in _MONITORED.items()
    ]
    inches = (3.2 * len(panels), 3.3)
    return Figure(panels, inches, legend="below" if len(layers) <= _MOST_IN_LEGEND else "")


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


def _lines(runs: Mapping[str, Points], arms: Arms | None) -> list[Line]:
    styles = run_styles(runs, arms)
    return [_line(points, label, styles[label]) for label, points in runs.items()]


def _line(points: Points, name: str, style: Style) -> Line:
    steps, values = zip(*points, strict=True)
    # A line through one point would be invisible.
    return Line(steps, values, name, style, "line and points" if len(steps) < 3 else "line")


def _steps_panel(id: str, title: str, x: Axis, y: Axis, lines: Sequence[Series]) -> Panel:
    height = 380 + 20 * len(lines)
    return Panel(id, "", x, y, lines, title, page_height=height, page_legend="below")


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
