"""Draw the description of a figure with matplotlib, and write it as PNG and SVG."""

import io
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from bn_lightning.runs.atomic_write import write_atomically
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
    from_log1p,
    log1p_ticks,
    to_log1p,
)

_BELOW_PANEL: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
_MOST_LETTERS, _MOST_IN_LEGEND = 30, 80  # letters of a tick's label, of a legend's entry


class Picture(matplotlib.figure.Figure):
    """A figure of matplotlib that a notebook shows, with or without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def draw(figure: Figure) -> Picture:
    """Return the picture of a figure."""
    columns = figure.columns or len(figure.panels)
    rows = -(-len(figure.panels) // columns)
    drawn = Picture(figsize=figure.inches, layout="constrained")
    all_axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[len(figure.panels) :]:
        axes.set_visible(False)
    for i, (axes, panel) in enumerate(zip(all_axes, figure.panels, strict=False)):
        _draw_panel(axes, panel)
        letters = int(12 * figure.inches[0] / columns)
        axes.set_title(_wrapped(panel.title, letters), fontsize="medium")
        # Equal axes are labeled once, at the left and at the bottom.
        if i % columns == 0 or panel.y != figure.panels[i - 1].y:
            label, letters = panel.y.label, int(8 * figure.inches[1] / rows)
            axes.set_ylabel(literal(label) if "\n" in label else _wrapped(label, letters))
        elif panel.y.bounds != (None, None):
            axes.tick_params(labelleft=False)
        if figure.caption and i + columns < len(figure.panels):
            axes.tick_params(labelbottom=False)
        if not figure.caption:
            axes.set_xlabel(literal(panel.x.label))
        if figure.legend.startswith("panels") and axes.get_legend_handles_labels()[1]:
            place = {} if figure.legend == "panels" else _BELOW_PANEL
            axes.legend(frameon=False, fontsize="small", **place)
    if figure.title:
        title = _wrapped(figure.title, int(12 * figure.inches[0]), most_lines=8)
        drawn.suptitle(title, fontsize="medium")
    if figure.caption:
        label = f"{figure.panels[0].x.label}\n{figure.caption}"
        drawn.supxlabel(literal(label), fontsize="medium", wrap=True)
    _draw_color_bars(drawn, all_axes, figure)
    if figure.legend in ("above", "below"):
        _draw_legend(drawn, figure)
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg; the same figure gives the same bytes.

    A link at one of these paths is replaced, not followed.
    """
    drawn = draw(figure)
    drawn.set_dpi(150)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = io.BytesIO(), io.BytesIO()
    # Unlike `savefig`, the methods of the canvases draw once, and the layout is computed once.
    FigureCanvasAgg(drawn).print_png(png)
    drawn.set_layout_engine("none")
    with rc_context({"svg.hashsalt": "bn_lightning"}):  # otherwise ids in the SVG are random
        FigureCanvasSVG(drawn).print_svg(svg, metadata={"Date": None})
    for suffix, buffer in (("png", png), ("svg", svg)):
        write_atomically(path.with_name(f"{path.name}.{suffix}"), buffer.getvalue())


def figures_folder(directory: Path) -> Path:
    """Return the folder of a directory's pictures.

    Raises:
        ValueError: it is a link, so that someone else's directory would decide where to write.
    """
    folder = directory / "figures"
    if folder.is_symlink():
        raise ValueError(
            f"expected `{folder}` to be a folder, got a link to {folder.readlink()}; remove it"
        )
    return folder


def literal(text: str) -> str:
    """Escape a text, so that matplotlib does not read it as mathematics."""
    return text.replace("$", "\\$")


def _shortened(text: str, letters: int = _MOST_LETTERS) -> str:
    """Return a name with at most this many letters, escaped."""
    return literal(text if len(text) <= letters else f"{text[: letters - 1]}…")


def _wrapped(text: str, letters: int, most_lines: int = 4) -> str:
    """Break a title into lines of this many letters, escaped; "…" takes the place of the rest."""
    lines = [part for line in text.split("\n") for part in wrap(line, letters)]
    last = most_lines - 1
    return literal("\n".join([*lines[:last], *(["…"] if lines[most_lines:] else lines[last:])]))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    bars = [series for series in panel.series if isinstance(series, Bars)]
    for series in panel.series:
        match series:
            case Line():
                _draw_line(axes, series)
            case Band(x, low, high, color, name):
                label = _shortened(name, _MOST_IN_LEGEND) or None
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0, label=label)
            case Rule(y):
                axes.axhline(y, color=GRAY, linewidth=0.8)
            case Intervals():
                _draw_intervals(axes, series)
            case Label(y, text, is_bold):
                weight = "bold" if is_bold else "normal"
                from_left = axes.get_yaxis_transform()
                drawn = axes.text(0, y, literal(text), size="small", weight=weight)
                drawn.set(transform=from_left, verticalalignment="center")
            case Bars():
                _draw_bars(axes, series, bars.index(series), len(bars))
            case Heatmap():
                _draw_heatmap(axes, series)
    _draw_axis(axes.xaxis, axes.set_xscale, panel.x)
    _draw_axis(axes.yaxis, axes.set_yscale, panel.y)
    # After the scales; setting a limit to None would keep the limit of the linear scale.
    if panel.x.bounds != (None, None):
        axes.set_xlim(*panel.x.bounds)
    if panel.y.bounds != (None, None):
        axes.set_ylim(*panel.y.bounds)
    if any(isinstance(series, Heatmap) for series in panel.series):
        axes.tick_params(length=0, labelsize="small")
        axes.tick_params(axis="x", rotation=90)
        axes.spines[:].set_visible(False)
    else:
        has_labels = any(isinstance(series, Label) for series in panel.series)
        axes.grid(alpha=0.0 if bars or has_labels else 0.3)
        axes.spines[["top", "right", *(["left"] if has_labels else [])]].set_visible(False)


def _draw_line(axes: Axes, line: Line) -> None:
    options: dict[str, Any] = {
        "color": line.style.color,
        "label": _shortened(line.name, _MOST_IN_LEGEND) or None,
    }
    if line.shows == "circles":
        options |= {"marker": "o", "markersize": 2, "fillstyle": "none", "markeredgewidth": 0.5}
        axes.plot(line.x, line.y, linestyle="", **options)
        return
    if line.shows != "line":
        options |= {"marker": line.style.marker, "markersize": 1.5 if line.is_crowded else 4}
        # Markers at the edge of the axes are whole.
        options["clip_on"] = False
    style = "" if line.shows == "points" else line.style.line
    axes.plot(line.x, line.y, linestyle=style, linewidth=1.5 * line.width, **options)


def _draw_intervals(axes: Axes, intervals: Intervals) -> None:
    color, marker = intervals.style.color, intervals.style.marker
    axes.hlines(intervals.y, intervals.low, intervals.high, color=color)
    axes.plot(
        intervals.x,
        intervals.y,
        marker,
        color=color,
        markersize=5,
        clip_on=False,
        label=_shortened(intervals.name, _MOST_IN_LEGEND) or None,
    )
    for x, y, at_least in zip(intervals.x, intervals.y, intervals.at_least, strict=True):
        if at_least:
            arrow = {"arrowstyle": "->", "color": color}
            axes.annotate("", (x + 0.28, y), (x, y), arrowprops=arrow)


def _draw_bars(axes: Axes, bars: Bars, k: int, count: int) -> None:
    """Draw the k-th of several series of bars, one beside the other."""
    height = 0.8 / count
    drawn = axes.barh(
        [i + height * (k - (count - 1) / 2) for i in range(len(bars.values))],
        list(bars.values.values()),
        height,
        color=list(bars.colors),
        hatch="//" * bars.is_hatched,
        label=_shortened(bars.name, _MOST_IN_LEGEND),
    )
    axes.bar_label(drawn, fmt=f"{{:{bars.number_format}}}", padding=2, fontsize="small")
    axes.set_yticks(range(len(bars.values)), list(map(_shortened, bars.values)))
    axes.margins(x=0.12)


def _draw_heatmap(axes: Axes, heatmap: Heatmap) -> None:
    low, high = heatmap.scale.bounds
    colors = colormap_of(heatmap.scale)
    axes.imshow(heatmap.values, cmap=colors, vmin=low, vmax=high, aspect="auto", origin="lower")
    if heatmap.scale.categories:  # neighbors may have the same color
        rows, columns = heatmap.values.shape
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=1)
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=1)
    for i, row in enumerate(heatmap.texts or ()):
        for r, text in enumerate(row):
            if text:
                share = (float(heatmap.values[i, r]) - low) / (high - low)
                red, green, blue, _ = colors(share)
                is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                color = "white" if is_dark else "black"
                axes.text(r, i, text, ha="center", va="center", fontsize=6, color=color)
    for r, i in heatmap.striped:
        axes.add_patch(
            Rectangle((r - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor="white", lw=0)
        )


def colormap_of(scale: ColorScale) -> Colormap:
    """Return matplotlib's colormap of a scale."""
    if scale.categories:
        return ListedColormap(list(scale.categories.values()))
    return colormaps[scale.colormap]


def _draw_axis(drawn: MatplotlibAxis, set_scale: Callable[..., None], axis: Axis) -> None:
    if axis.scale == "log":
        set_scale("log")
    elif axis.scale == "log1p":
        set_scale("function", functions=(to_log1p, from_log1p))
    if axis.scale == "log1p":
        ticks = log1p_ticks(max(drawn.get_view_interval()))
        drawn.set_ticks(list(ticks), labels=list(ticks.values()))
    elif axis.ticks is not None:
        drawn.set_ticks(list(axis.ticks), labels=list(map(_shortened, axis.ticks.values())))
        drawn.set_ticks([], minor=True)
    elif axis.number_format == ",":
        drawn.set_major_formatter("{x:,.0f}")
    if axis.is_reversed:
        drawn.set_inverted(True)


def _draw_color_bars(drawn: matplotlib.figure.Figure, all_axes: list[Axes], figure: Figure) -> None:
    """Draw a color bar after the last panel with each continuous scale."""
    last: dict[str, tuple[Axes, AxesImage]] = {}
    for axes, panel in zip(all_axes, figure.panels, strict=False):
        for heatmap in (s for s in panel.series if isinstance(s, Heatmap)):
            if heatmap.scale.colormap:
                last[heatmap.scale.label] = (axes, axes.images[0])
    for label, (axes, image) in last.items():
        drawn.colorbar(image, ax=axes, label=literal(label), pad=0.02)


def _draw_legend(drawn: matplotlib.figure.Figure, figure: Figure) -> None:
    """Draw one legend for all panels: the categories of heatmaps, else the names of series."""
    heatmaps = [s for panel in figure.panels for s in panel.series if isinstance(s, Heatmap)]
    if heatmaps:
        handles: list[Any] = [
            Patch(facecolor=color, edgecolor="gray", label=label)
            for label, color in heatmaps[0].scale.categories.items()
        ]
    else:
        found = [axes.get_legend_handles_labels() for axes in drawn.axes]
        by_name = {n: h for handles, names in found for h, n in zip(handles, names, strict=True)}
        handles = list(by_name.values())
    is_above = figure.legend == "above"
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = int(11 * figure.inches[0] / (longest + 6))  # letters, with room for the marks
    drawn.legend(
        handles=handles,
        loc="outside upper center" if is_above else "outside lower center",
        ncols=len(handles) if is_above else min(max(columns, 1), 3),
        frameon=False,
    )
