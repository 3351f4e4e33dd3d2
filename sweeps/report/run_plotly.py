"""The interactive figures of runs, as plotly's JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.sweeps.analysis.arms import Style, label_of, style_of
from bn_lightning.sweeps.analysis.compared_runs import Run
from bn_lightning.sweeps.analysis.paper_curves import paper_accuracy
from bn_lightning.sweeps.report.page_skeleton import Plot
from bn_lightning.sweeps.report.run_matplotlib import Series, run_styles
from bn_lightning.sweeps.report.traces import MARGIN, band, line


def run_plots(runs: Sequence[Run], with_paper: bool) -> list[Plot]:
    """Accuracy and loss against steps, percentiles of each run, and throughput."""
    arms = {run.label: run.arm for run in runs}
    styles = run_styles(arms, arms)
    accuracy = [
        trace
        for run in runs
        for trace in _series(run.metrics["test/accuracy"], run.label, styles[run.label])
    ]
    if with_paper:
        for arm, points in paper_accuracy().items():
            style = style_of(arm)
            (trace,) = _series(points, f"the paper's, {label_of(arm)}", style, "markers")
            marker = {"color": style.colour, "size": 4, "symbol": "circle-open"}
            accuracy.append(trace | {"marker": marker})
    layout = _steps_layout("test accuracy", "log", accuracy)
    plots = [Plot("accuracy", "Test accuracy", accuracy, layout)]
    losses = [
        trace
        for run in runs
        if "test/loss" in run.metrics
        for trace in _series(run.metrics["test/loss"], run.label, styles[run.label])
    ]
    if losses:
        layout = _steps_layout("nats", "log", losses)
        layout["yaxis"] |= {"type": "log", "tickformat": "~g", **_log_ticks(losses, "y")}
        plots.append(Plot("loss", "Test loss", losses, layout))
    bounds = _common_range(runs)
    for i, run in enumerate(runs):
        plots.append(_percentiles(i, run, styles[run.label], bounds))
    speeds = {r.label: r.record["steps_per_second"] for r in runs if "steps_per_second" in r.record}
    if speeds:
        plots.append(_throughput(speeds, styles))
    return plots


def _common_range(runs: Sequence[Run]) -> list[float] | None:
    """What the percentiles of all runs lie between, so that their widths can be compared."""
    values = [
        value
        for run in runs
        for percentile in (15, 85)
        for _, value in run.metrics[f"activation/p{percentile}"]
        if math.isfinite(value)
    ]
    if not values:
        return None
    room = 0.05 * (max(values) - min(values)) or 1.0
    return [min(values) - room, max(values) + room]


def _percentiles(i: int, run: Run, style: Style, bounds: list[float] | None) -> Plot:
    (steps, low), (_, middle), (_, high) = (
        zip(*run.metrics[f"activation/p{percentile}"], strict=True) for percentile in (15, 50, 85)
    )
    traces = line(steps, middle, "median", style)
    traces += band(steps, low, high, traces[0])
    layout = _steps_layout("input of one unit", "linear")
    layout["showlegend"] = False
    if bounds is not None:
        layout["yaxis"]["range"] = bounds
    return Plot(
        f"percentiles-{i}",
        f"Inputs of the last activation, {run.label}",
        traces,
        layout,
        "15th, 50th and 85th percentile of one unit on a fixed probe set",
    )


def _throughput(speeds: Mapping[str, float], styles: Mapping[str, Style]) -> Plot:
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(speeds.values()),
        "y": [label.replace(", ", ",<br>") for label in speeds],
        "marker": {"color": [styles[label].colour for label in speeds]},
        "texttemplate": "%{x:,.0f}",
    }
    layout = {
        "height": 140 + 50 * len(speeds),
        "margin": MARGIN,
        "xaxis": {"title": {"text": "training steps per second"}},
        "yaxis": {"automargin": True, "autorange": "reversed"},
    }
    caption = "evaluations included"
    return Plot("throughput", "Throughput", [trace], layout, caption, has_tools=False)


def _steps_layout(
    name: str, scale: str, traces: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    return {
        "height": 380 + 20 * len(traces),
        # Plotly's buttons lie above the axes, and half of the last number beside them.
        "margin": {**MARGIN, "t": 40, "r": 30},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top"},
        "xaxis": {
            "type": scale,
            "title": {"text": "training steps"},
            "tickformat": ",d",
            **(_log_ticks(traces, "x") if scale == "log" else {}),
        },
        "yaxis": {"title": {"text": name}},
    }


def _log_ticks(traces: Sequence[Mapping[str, Any]], axis: str) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 where a logarithmic axis spans less than one and a half decades.

    Around a single value plotly shows two.
    """
    values = [v for trace in traces for v in trace[axis] if math.isfinite(v) and v > 0]
    ratio = max(values) / min(values) if values else 1.0
    if 1 < ratio < 3:
        return {}  # plotly's own are closer
    return {"dtick": "D2" if 1 < ratio < 30 else 1}


def _series(series: Series, label: str, style: Style, mode: str = "") -> list[dict[str, Any]]:
    steps, values = zip(*series, strict=True)
    if len(steps) < 3 and not mode:
        mode = "markers+"  # one point makes no line
    return line(steps, values, label, style, mode)
