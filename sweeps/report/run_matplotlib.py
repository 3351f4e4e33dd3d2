"""The pictures of runs: the paper's Figure 1 from our own metrics, BatchNorms, loss landscapes.

Steps are drawn on a logarithmic axis: most of what normalisation changes happens early. `save`
writes these and every other static picture.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_lightning.runs.atomic_write import write_atomically
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.sweeps.analysis.arms import COLOURS, Style, label_of, style_of
from bn_lightning.sweeps.analysis.paper_curves import paper_accuracy

Series = Sequence[tuple[int, float]]
"""(step, value) pairs in order of steps."""

Arms = Mapping[str, str]
"""Label -> arm, whose colour its run is drawn in; a run without an arm has one of its own."""

# The numbers of callbacks/batch_norm_monitor.py -> how a panel calls them.
_MONITORED = {
    "scale": "mean |scale|",
    "shift": "mean |shift|",
    "mean_distance": "batch mean from running mean\n(running deviations)",
    "log_std_distance": "ln(batch / running deviation)\n(root mean square)",
    "dead": "share of dead channels",
}
_MOST_IN_LEGEND = 12
_ABOVE = 1e9  # stands for a relative loss that is no number: far above the axes


def draw_run(directory: str | Path) -> None:
    """Draw `figures/accuracy`, `percentiles` and `batch_norm` of a run from its metrics.csv.

    Each is written as PNG and SVG; one whose metrics the run did not log is left out.
    """
    metrics = read_metrics(directory)
    folder = folder_in(Path(directory))
    if "test/accuracy" in metrics:
        save(accuracy_figure({"": metrics["test/accuracy"]}), folder / "accuracy")
    if "activation/p50" in metrics:
        save(percentiles_figure({"": metrics}), folder / "percentiles")
    if any(name.startswith("batch_norm/") for name in metrics):
        save(batch_norm_figure(metrics), folder / "batch_norm")


def accuracy_figure(
    runs: Mapping[str, Series], arms: Arms | None = None, with_paper: bool = False
) -> Figure:
    """Test accuracy against training steps, a line for each run (Figure 1a).

    Args:
        runs: label -> accuracy in [0, 1]; an empty label gets no legend.
        arms: label -> arm.
        with_paper: draw the paper's points, too.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    draw_accuracy(figure.subplots(), runs, arms, with_paper)
    return figure


def loss_figure(runs: Mapping[str, Series], arms: Arms | None = None) -> Figure:
    """Test loss in nats against training steps, a line for each run.

    Args:
        runs: label -> loss.
        arms: label -> arm.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, runs, arms)
    axes.set_yscale("log")
    axes.set_ylabel("test loss, nats")
    return figure


def throughput_figure(speeds: Mapping[str, float], arms: Arms | None = None) -> Figure:
    """Training steps per second, a bar for each run.

    Args:
        speeds: label -> steps per second.
        arms: label -> arm.
    """
    figure = Figure(figsize=(5, 1.2 + 0.35 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    styles = run_styles(speeds, arms)
    bars = axes.barh(
        [literal(label) for label in speeds],
        list(speeds.values()),
        color=[styles[label].colour for label in speeds],
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("training steps per second, evaluations included")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def percentiles_figure(
    runs: Mapping[str, Mapping[str, Series]], arms: Arms | None = None
) -> Figure:
    """Percentiles of the inputs of one activation, a panel for each run (Figure 1b, c).

    Args:
        runs: label -> metrics with `activation/p15`, `activation/p50` and `activation/p85`.
        arms: label -> arm.
    """
    figure = Figure(figsize=(5 * len(runs), 3.5), layout="constrained")
    _draw_panels(figure.subplots(1, len(runs), squeeze=False)[0], runs, arms)
    return figure


def comparison_figure(
    runs: Mapping[str, Mapping[str, Series]], arms: Arms | None = None, with_paper: bool = False
) -> Figure:
    """The whole of Figure 1: accuracy of all runs, then the percentiles of each.

    Args:
        runs: label -> metrics, as `read_metrics` returns them.
        arms: label -> arm.
        with_paper: draw the paper's points of accuracy, too.
    """
    figure = Figure(figsize=(4 * (1 + len(runs)), 3.3), layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(runs))
    accuracy = {label: metrics["test/accuracy"] for label, metrics in runs.items()}
    draw_accuracy(first, accuracy, arms, with_paper)
    _draw_panels(panels, runs, arms)
    return figure


def batch_norm_figure(metrics: Mapping[str, Series]) -> Figure:
    """What each BatchNorm layer has learnt and how far its batches stray, against steps.

    Args:
        metrics: with the `batch_norm/LAYER/NUMBER` of callbacks/batch_norm_monitor.py; a panel for
            each number, a line for each layer, the darkest nearest to the input.
    """
    monitored = {
        tuple(name.removeprefix("batch_norm/").rsplit("/", 1)): series
        for name, series in metrics.items()
        if name.startswith("batch_norm/")
    }
    layers = list(dict.fromkeys(layer for layer, _ in monitored))
    figure = Figure(figsize=(3.2 * len(_MONITORED), 3.3), layout="constrained")
    panels = figure.subplots(1, len(_MONITORED))
    for axes, (number, label) in zip(panels, _MONITORED.items(), strict=True):
        for i, layer in enumerate(layers):
            if (layer, number) in monitored:
                steps, values = zip(*monitored[layer, number], strict=True)
                # viridis grows lighter all the way, and ends before it is too light to see.
                colour = colormaps["viridis"](0.9 * i / max(len(layers) - 1, 1))
                axes.plot(
                    steps, values, color=colour, label=literal(layer), marker="." * (len(steps) < 3)
                )
        axes.set_xscale("log")
        axes.set_title(label, fontsize="medium")
        if number == "dead":
            axes.set_ylim(-0.02, 1.02)
        _tidy(axes)
    if len(layers) <= _MOST_IN_LEGEND:
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
    return figure


def landscape_figure(
    steps: Sequence[float], relative_BE: Sequence[Sequence[float]], arm: str, caption: str
) -> Figure:
    """Loss after one step along the gradient over the loss before, against the step size.

    The median over batches, the band from the lowest to the highest; what is not finite is above
    the axes.

    Args:
        steps: (E,) step sizes above 0.
        relative_BE: (B, E), for each batch.
        arm: whose colour it is drawn in.
        caption: what was looked at.

    Source: Bjorck et al. 2018, arXiv 1806.02375, section 3.2.
    """
    values_BE = np.nan_to_num(np.asarray(relative_BE, dtype=float), nan=_ABOVE, posinf=_ABOVE)
    colour = style_of(arm).colour
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    low, high = values_BE.min(axis=0), values_BE.max(axis=0)
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, np.median(values_BE, axis=0), color=colour)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min(low.min(), 0.5) * 0.9, min(max(high.max(), 2), 1e3))
    axes.set_xlabel("step size η along the gradient")
    axes.set_ylabel("loss(w − ηg) / loss(w)")
    axes.set_title(literal(caption), fontsize="small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_styles(labels: Iterable[str], arms: Arms | None = None) -> dict[str, Style]:
    """Label -> style: the arm's colour, and for its second, third... run another line.

    A style does not depend on the order of the labels, but for runs of one arm.
    """
    labels = list(labels)
    of = {label: (arms or {}).get(label, label) for label in labels}
    turns: Counter[str] = Counter()
    styles = {}
    for label in labels:
        styles[label] = style_of(of[label], of.values(), turns[of[label]])
        turns[of[label]] += 1
    return styles


def _draw_panels(
    panels: Sequence[Axes], runs: Mapping[str, Mapping[str, Series]], arms: Arms | None
) -> None:
    styles = run_styles(runs, arms)
    for panel, (label, metrics) in zip(panels, runs.items(), strict=True):
        if panel is not panels[0]:
            panel.sharey(panels[0])
        draw_percentiles(panel, metrics, styles[label].colour)
        panel.set_title(literal(label))
    panels[0].set_ylabel("input of one unit of the last\nactivation, percentiles 15, 50, 85")


def draw_accuracy(
    axes: Axes, runs: Mapping[str, Series], arms: Arms | None = None, with_paper: bool = False
) -> None:
    """Draw test accuracy against steps, a line for each run; the paper's as small circles."""
    _draw_lines(axes, runs, arms)
    if with_paper:
        for arm, points in paper_accuracy().items():
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                "o",
                color=style_of(arm).colour,
                markersize=2,
                fillstyle="none",
                markeredgewidth=0.5,
                label=f"the paper's, {label_of(arm)}",
            )
    if any(runs):
        axes.legend(frameon=False, fontsize="small" if with_paper else None)
    axes.set_ylabel("test accuracy")
    axes.set_ylim(top=1)


def _draw_lines(axes: Axes, runs: Mapping[str, Series], arms: Arms | None) -> None:
    styles = run_styles(runs, arms)
    for label, series in runs.items():
        steps, values = zip(*series, strict=True)
        axes.plot(
            steps,
            values,
            styles[label].line,
            color=styles[label].colour,
            marker="." if len(steps) < 3 else "",
            label=literal(label),
        )
    if any(runs):
        axes.legend(frameon=False)
    axes.set_xscale("log")
    _tidy(axes)


def draw_percentiles(axes: Axes, metrics: Mapping[str, Series], colour: str = COLOURS[0]) -> None:
    """Draw the 15th, 50th and 85th percentile of one unit's inputs against steps."""
    (steps, low), (_, middle), (_, high) = (
        zip(*metrics[f"activation/p{percentile}"], strict=True) for percentile in (15, 50, 85)
    )
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, low, steps, high, color=colour, linewidth=0.8)
    axes.plot(steps, middle, color=colour, label="median")
    # Logarithmic from step 1 on, with room for step 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    _tidy(axes)


def literal(text: str) -> str:
    """What stands in a configuration as matplotlib may draw it: no mathematics."""
    return text.replace("$", "\\$")


def folder_in(directory: Path) -> Path:
    """The folder of a directory's pictures.

    Raises:
        ValueError: it is a link: a directory of somebody else's would say where pictures go.
    """
    folder = directory / "figures"
    if folder.is_symlink():
        raise ValueError(
            f"{folder} expected a folder for pictures, got a link to {folder.readlink()}; remove it"
        )
    return folder


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg; the same figure gives the same bytes.

    A link of that name is replaced, not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, dict[str, Any]] = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    for suffix, chosen in options.items():
        drawn = io.BytesIO()
        with rc_context({"svg.hashsalt": "bn_lightning"}):  # else names in the file are random
            figure.savefig(drawn, format=suffix, **chosen)
        write_atomically(path.with_name(f"{path.name}.{suffix}"), drawn.getvalue())


def _tidy(axes: Axes) -> None:
    axes.set_xlabel("training steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
