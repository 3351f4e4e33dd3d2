"""The pictures of runs: the paper's Figure 1 from our own metrics.

Steps are drawn on a logarithmic axis: most of what normalisation changes happens early.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_lightning.metrics_csv import read_metrics

Series = Sequence[tuple[int, float]]
"""(step, value) pairs in order of steps."""

# Okabe & Ito's colours, told apart by the colour-blind and by their lightness in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")

# The numbers of callbacks/batch_norm_monitor.py -> how a panel calls them.
_MONITORED = {
    "scale": "mean |scale|",
    "shift": "mean |shift|",
    "mean_distance": "batch mean from running mean\n(running deviations)",
    "log_std_distance": "ln(batch / running deviation)\n(root mean square)",
    "dead": "share of dead channels",
}
_MOST_IN_LEGEND = 12


def draw_run(directory: str | Path) -> None:
    """Draw `figures/accuracy`, `percentiles` and `batch_norm` of a run from its metrics.csv.

    Each is written as PNG and SVG; one whose metrics the run did not log is left out.
    """
    metrics = read_metrics(directory)
    folder = Path(directory) / "figures"
    if "test/accuracy" in metrics:
        save(accuracy_figure({"": metrics["test/accuracy"]}), folder / "accuracy")
    if "activation/p50" in metrics:
        save(percentiles_figure({"": metrics}), folder / "percentiles")
    if any(name.startswith("batch_norm/") for name in metrics):
        save(batch_norm_figure(metrics), folder / "batch_norm")


def accuracy_figure(runs: Mapping[str, Series]) -> Figure:
    """Test accuracy against training steps, a line for each run (Figure 1a).

    Args:
        runs: label -> accuracy in [0, 1]; an empty label gets no legend.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    draw_accuracy(figure.subplots(), runs)
    return figure


def percentiles_figure(runs: Mapping[str, Mapping[str, Series]]) -> Figure:
    """Percentiles of the inputs of one activation, a panel for each run (Figure 1b, c).

    Args:
        runs: label -> metrics with `activation/p15`, `activation/p50` and `activation/p85`.
    """
    figure = Figure(figsize=(5 * len(runs), 3.5), layout="constrained")
    _draw_panels(figure.subplots(1, len(runs), squeeze=False)[0], runs)
    return figure


def comparison_figure(runs: Mapping[str, Mapping[str, Series]]) -> Figure:
    """The whole of Figure 1: accuracy of all runs, then the percentiles of each.

    Args:
        runs: label -> metrics, as `read_metrics` returns them.
    """
    figure = Figure(figsize=(4 * (1 + len(runs)), 3.3), layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(runs))
    draw_accuracy(first, {label: metrics["test/accuracy"] for label, metrics in runs.items()})
    _draw_panels(panels, runs)
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
                axes.plot(steps, values, color=colour, label=layer, marker="." * (len(steps) < 3))
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


def _draw_panels(panels: Sequence[Axes], runs: Mapping[str, Mapping[str, Series]]) -> None:
    for panel, (label, metrics) in zip(panels, runs.items(), strict=True):
        if panel is not panels[0]:
            panel.sharey(panels[0])
        draw_percentiles(panel, metrics)
        panel.set_title(label)
    panels[0].set_ylabel("input of one unit of the last\nactivation, percentiles 15, 50, 85")


def draw_accuracy(axes: Axes, runs: Mapping[str, Series]) -> None:
    """Draw test accuracy against steps, a line for each run."""
    for i, (label, series) in enumerate(runs.items()):
        steps, values = zip(*series, strict=True)
        axes.plot(
            steps,
            values,
            _STYLES[i % len(_STYLES)],
            color=_COLOURS[i % len(_COLOURS)],
            marker="." if len(steps) < 3 else "",
            label=label,
        )
    if any(runs):
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(top=1)
    _tidy(axes)


def draw_percentiles(axes: Axes, metrics: Mapping[str, Series]) -> None:
    """Draw the 15th, 50th and 85th percentile of one unit's inputs against steps."""
    (steps, low), (_, middle), (_, high) = (
        zip(*metrics[f"activation/p{percentile}"], strict=True) for percentile in (15, 50, 85)
    )
    axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(steps, low, steps, high, color=_COLOURS[0], linewidth=0.8)
    axes.plot(steps, middle, color=_COLOURS[0], label="median")
    # Logarithmic from step 1 on, with room for step 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    _tidy(axes)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)
    with rc_context({"svg.hashsalt": "bn_lightning"}):  # else names in the file are random
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})


def _tidy(axes: Axes) -> None:
    axes.set_xlabel("training steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
