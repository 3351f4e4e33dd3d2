"""Turn the description of a figure into plotly's JSON: a plot of the page for each panel."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_hex

from bn_lightning.sweeps.report.figure import (
    GRAY,
    Axis,
    Band,
    Bars,
    ColorScale,
    Figure,
    Heatmap,
    Intervals,
    Label,
    Line,
    Panel,
    Rule,
    Series,
    log1p_ticks,
    to_log1p,
)
from bn_lightning.sweeps.report.matplotlib_renderer import colormap_of
from bn_lightning.sweeps.report.page_skeleton import Plot

_MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond"}
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
_MODES = {
    "line": "lines",
    "line and points": "markers+lines",
    "points": "markers",
    "circles": "markers",
}
_LEGENDS = {"above": {"y": 1.02, "yanchor": "bottom"}, "below": {"y": -0.25, "yanchor": "top"}}

# At most this many learning rates have horizontal labels below a small plot.
MOST_LEVEL_LABELS = 4


def plots_of(figure: Figure) -> list[Plot]:
    """Return the plots of a figure's panels."""
    return [_plot(panel) for panel in figure.panels]


def _plot(panel: Panel) -> Plot:
    traces = [trace for series in panel.series for trace in _traces(series, panel.x)]
    heatmaps = [series for series in panel.series if isinstance(series, Heatmap)]
    has_tools = panel.has_tools and not heatmaps
    layout: dict[str, Any] = {
        "height": panel.page_height,
        # plotly's buttons are above the axes, and half of the last tick's label beside them.
        "margin": {
            "l": 60 + 15 * panel.y.label.count("\n"),
            "r": 30 if has_tools else 10,
            "t": 40 if has_tools else 10,
            "b": 55,
        },
        "showlegend": bool(panel.page_legend),
        "xaxis": _axis(panel.x, _positive(panel, 0)),
        "yaxis": _axis(panel.y, _positive(panel, 1)),
        "shapes": [_rule(series.y) for series in panel.series if isinstance(series, Rule)],
    }
    if panel.page_legend:
        layout["legend"] = {"orientation": "h", **_LEGENDS[panel.page_legend]}
    if heatmaps:
        longest = max((len(text) for text in (panel.y.ticks or {}).values()), default=0)
        # From the length of the names: measuring them in the browser doubles the time to draw.
        layout["margin"]["l"] += 7 * min(longest, 24) - 15
        layout["margin"]["b"] = 85
        layout["dragmode"] = False
        layout["xaxis"]["tickangle"] = 0 if len(panel.x.ticks or ()) <= MOST_LEVEL_LABELS else -90
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"showgrid": False, "zeroline": False}
            layout[axis]["title"]["standoff"] = 6
    labels = [series for series in panel.series if isinstance(series, Label)]
    if labels:
        layout["annotations"] = list(map(_annotation, labels))
        layout["margin"]["l"] = 20  # half of the first tick's label
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"showgrid": False, "zeroline": False}
        layout["yaxis"]["showline"] = False
    if any(isinstance(series, Bars | Intervals) for series in panel.series):
        layout["yaxis"]["automargin"] = True  # for names of any length
        layout["margin"]["r"] = 40
    if any(isinstance(series, Bars) for series in panel.series):
        layout["yaxis"]["type"] = "category"
    arms = heatmaps[0].arms if heatmaps else ()
    return Plot(panel.id, panel.page_title, traces, layout, panel.page_caption, arms, has_tools)


def _traces(series: Series, x: Axis) -> list[dict[str, Any]]:
    match series:
        case Line():
            return [_line(series, x)]
        case Band():
            return [_band(series, x)]
        case Intervals():
            return [_intervals(series)]
        case Bars():
            return [_bars(series)]
        case Heatmap():
            return [_heatmap(series), *_stripes(series)]
    return []


def _line(line: Line, x: Axis) -> dict[str, Any]:
    style = line.style
    marker: dict[str, Any] = {"symbol": _MARKERS[style.marker], "size": 3 if line.is_crowded else 7}
    if line.shows == "circles":
        marker = {"symbol": "circle-open", "size": 4}
    made: dict[str, Any] = {
        "type": "scatter",
        "mode": _MODES[line.shows],
        "name": line.name,
        **({} if line.name else {"showlegend": False}),
        "x": _places(line.x, x),
        "y": list(map(rounded, line.y)),
        "line": {"color": style.color, "dash": _DASHES[style.line], "width": 2 * line.width},
        "marker": {"color": style.color, **marker},
        "cliponaxis": line.shows == "line",  # markers at the edge of the axes are whole
    }
    if line.texts is not None:
        made |= {"hovertext": _plain(line.texts), "hovertemplate": "%{hovertext}<extra></extra>"}
    elif x.scale == "log1p":
        made["customdata"] = list(map(rounded, line.x))
        made["hovertemplate"] = "%{customdata:,}, %{y:.4g}"
    return made


def _plain(texts: Sequence[str]) -> list[str]:
    """Return texts in which plotly reads no tag but the ends of their lines."""
    return [text.replace("<", "&lt;").replace("\n", "<br>") for text in texts]


def _band(band: Band, x: Axis) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _places((*band.x, *band.x[::-1]), x),
        "y": [rounded(value) for value in (*band.high, *band.low[::-1])],
        "fill": "toself",
        "fillcolor": f"{band.color}33",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "name": band.name,
        "showlegend": bool(band.name),
    }


def _places(values: Sequence[float], axis: Axis) -> list[float]:
    """Return where values are on an axis; plotly has no scale "log1p" of its own."""
    return [rounded(to_log1p(value) if axis.scale == "log1p" else value) for value in values]


def _intervals(found: Intervals) -> dict[str, Any]:
    above = [rounded(high - x) for x, high in zip(found.x, found.high, strict=True)]
    below = [rounded(x - low) for x, low in zip(found.x, found.low, strict=True)]
    symbol = _MARKERS[found.style.marker]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": found.name,
        "showlegend": bool(found.name),
        "x": list(map(rounded, found.x)),
        "y": list(found.y),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "color": found.style.color,
        },
        "marker": {
            "color": found.style.color,
            "size": 9,
            "symbol": ["triangle-right" if cut else symbol for cut in found.at_least],
        },
        "cliponaxis": False,
        "hovertext": list(found.texts),
        "hovertemplate": "%{hovertext}",
    }


def _annotation(label: Label) -> dict[str, Any]:
    (text,) = _plain([label.text])
    return {
        "text": f"<b>{text}</b>" if label.is_bold else text,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": label.y,
        "yanchor": "middle",
        "showarrow": False,
        "font": {"size": 11},
    }


def _bars(bars: Bars) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": bars.name,
        "x": list(map(rounded, bars.values.values())),
        "y": [name.replace(", ", ",<br>") for name in bars.values],
        "marker": {
            "color": list(bars.colors),
            "pattern": {"shape": "/" * bars.is_hatched},
        },
        "texttemplate": f"%{{x:{bars.number_format}}}",
        "textposition": "outside",
        "cliponaxis": False,
    }


def _heatmap(heatmap: Heatmap) -> dict[str, Any]:
    low, high = heatmap.scale.bounds
    return {
        "type": "heatmap",
        "z": [[rounded(value) for value in row] for row in heatmap.values],
        "text": heatmap.texts,
        "texttemplate": "%{text}" if heatmap.texts else "",
        "textfont": {"size": 9},
        **({"hovertext": list(map(_plain, heatmap.cells))} if heatmap.cells else {}),
        "hovertemplate": "%{hovertext}<extra></extra>",
        "colorscale": _color_scale(heatmap.scale),
        "zmin": low,
        "zmax": high,
        "xgap": 1,
        "ygap": 1,
        "showscale": not heatmap.scale.categories,
        "colorbar": {
            "thickness": 10,
            "len": 1,
            "outlinewidth": 0,
            "xpad": 4,
            "ticklabeloverflow": "allow",
        },
    }


def _color_scale(scale: ColorScale) -> list[list[Any]]:
    """Return (place in [0, 1], color) pairs; a category has its color at both of its ends."""
    colors = list(scale.categories.values())
    if colors:
        count = len(colors)
        return [[(k + end) / count, color] for k, color in enumerate(colors) for end in (0, 1)]
    return [[k / 20, to_hex(colormap_of(scale)(k / 20))] for k in range(21)]


def _stripes(heatmap: Heatmap) -> list[dict[str, Any]]:
    if not heatmap.striped:
        return []
    columns, rows = zip(*heatmap.striped, strict=True)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": list(columns),
            "y": list(rows),
            "marker": {"symbol": "line-ne", "size": 18, "line": {"color": "#ffffff", "width": 1.5}},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def _rule(y: float) -> dict[str, Any]:
    line = {"color": GRAY, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _axis(axis: Axis, positive: Sequence[float]) -> dict[str, Any]:
    """Return plotly's axis.

    Args:
        axis: its description.
        positive: the values above 0 that are drawn along it.
    """
    is_log = axis.scale == "log"
    title = {"text": axis.label.replace("\n", "<br>"), "font": {"size": 12}}
    made: dict[str, Any] = {"title": title, "type": "log" if is_log else "linear"}
    if axis.bounds != (None, None):
        made["range"] = [
            math.log10(bound) if is_log and bound is not None else bound for bound in axis.bounds
        ]
    if axis.scale == "log1p":
        ticks = log1p_ticks(max(positive, default=1.0))
        made |= {"tickvals": _places(list(ticks), axis), "ticktext": list(ticks.values())}
    elif axis.ticks is not None:
        made |= {"tickvals": list(axis.ticks), "ticktext": list(axis.ticks.values())}
    elif is_log and axis.number_format:
        made |= log_ticks(positive)
    elif is_log:
        made["exponentformat"] = "power"
    if axis.number_format and axis.scale != "log1p":
        made["tickformat"] = {",": ",d", "g": "~g"}[axis.number_format]
    if axis.is_reversed:
        made["autorange"] = "reversed"
    return made


def _positive(panel: Panel, k: int) -> list[float]:
    """Return the finite values above 0 of a panel's lines, x for k = 0 and y for k = 1."""
    lines = [series for series in panel.series if isinstance(series, Line)]
    values = [value for line in lines for value in (line.x, line.y)[k]]
    return [value for value in values if math.isfinite(value) and value > 0]


def log_ticks(positive: Sequence[float]) -> dict[str, Any]:
    """Return ticks at 1, 2 and 5 for a logarithmic axis of less than one and a half decades."""
    ratio = max(positive) / min(positive) if positive else 1.0
    if 1 < ratio < 3:
        return {}  # plotly's own ticks are closer
    return {"dtick": "D2" if 1 < ratio < 30 else 1}  # a single value has an axis of two decades


def rounded(value: float) -> float:
    """Return the value with six significant digits, more than any figure shows."""
    return float(f"{value:.6g}")
