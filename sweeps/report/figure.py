"""The description of a figure, which matplotlib_renderer.py and plotly_renderer.py draw.

matplotlib draws all panels of a figure into one picture. plotly draws each panel as a plot of the
page. Names in a description may come from a configuration; each renderer escapes them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bn_lightning.sweeps.analysis.arms import Style

GRAY = "#888888"
MOST_MARKERS = 30
"""A line with more points has small markers."""


@dataclass(frozen=True)
class Axis:
    """The axis of a panel.

    Attributes:
        label: the quantity and its unit.
        scale: "log1p" draws a value x at log10(1 + x), so that 0 has a place.
        bounds: lower and upper end; None for automatic.
        ticks: position -> label; None for automatic.
        number_format: "," for counts, "g" for short decimals, "" for the library's own.
        is_reversed: whether values decrease from left to right, or from bottom to top.
    """

    label: str = ""
    scale: Literal["linear", "log", "log1p"] = "linear"
    bounds: tuple[float | None, float | None] = (None, None)
    ticks: Mapping[float, str] | None = None
    number_format: Literal["", ",", "g"] = ""
    is_reversed: bool = False


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x, y: (P,), NaN for a gap.
        name: its entry in the legend, "" for none.
        style: color, line and marker.
        shows: the curve, the curve with a marker at each point, the markers alone, or small open
            circles. Markers are smaller if there are more than `MOST_MARKERS`.
        width: relative to the usual one.
        texts: (P,), what the page shows for a point, in lines; None for its coordinates.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str
    style: Style
    shows: Literal["line", "line and points", "points", "circles"] = "line"
    width: float = 1.0
    texts: Sequence[str] | None = None

    @property
    def is_crowded(self) -> bool:
        """Whether its markers are small."""
        return len(self.x) > MOST_MARKERS


@dataclass(frozen=True)
class Band:
    """The area between two curves.

    Attributes:
        x, low, high: (P,).
        color: hexadecimal.
        name: its entry in the legend, "" for none.
    """

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    color: str
    name: str = ""


@dataclass(frozen=True)
class Rule:
    """A horizontal line across the panel at `y`."""

    y: float


@dataclass(frozen=True)
class Intervals:
    """Points with horizontal intervals.

    Attributes:
        x, y: (P,).
        low, high: (P,), NaN for no interval.
        texts: (P,), the values with their units.
        at_least: (P,), whether the value is a lower bound, shown by an arrow.
        name: the entry in the legend, "" for none.
        style: color and marker.
    """

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str]
    at_least: Sequence[bool]
    name: str
    style: Style


@dataclass(frozen=True)
class Label:
    """A text that begins at the left end of the panel, at the height `y`.

    Attributes:
        y: of the middle of its only line.
        text: the line.
        is_bold: whether it is a heading.
    """

    y: float
    text: str
    is_bold: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars.

    Attributes:
        values: name -> length.
        colors: one for each bar.
        number_format: of the length beside a bar, in Python's format language.
        name: the entry in the legend, "" for none.
        is_hatched: whether the bars are hatched.
    """

    values: Mapping[str, float]
    colors: Sequence[str]
    number_format: str
    name: str = ""
    is_hatched: bool = False


@dataclass(frozen=True)
class ColorScale:
    """The colors of a heatmap.

    Attributes:
        label: the quantity.
        bounds: values of the first and the last color.
        colormap: matplotlib's name of a colormap, "" for categories.
        categories: label -> color; a heatmap's value is the index of its category.
    """

    label: str
    bounds: tuple[float, float]
    colormap: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heatmap:
    """Cells at x = 0, 1, ..., R - 1 and y = 0, 1, ..., I - 1.

    Attributes:
        values: (I, R), NaN for an empty cell.
        texts: (I, R), in the cells; None for none.
        scale: the colors.
        striped: (column, row) of cells that are hatched.
        arms: positions of the arms whose trials the page lists for a cell of the grid.
        cells: (I, R), what the page shows of a cell that is pointed at, where `arms` is empty.
    """

    values: Float[np.ndarray, "I R"]
    texts: Sequence[Sequence[str]] | None
    scale: ColorScale
    striped: Sequence[tuple[int, int]] = ()
    arms: tuple[int, ...] = ()
    cells: Sequence[Sequence[str]] = ()


Series = Line | Band | Rule | Intervals | Label | Bars | Heatmap


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        id: of its element in the page: letters, digits and hyphens.
        title: above it in the picture; may have several lines.
        x: the horizontal axis.
        y: the vertical axis.
        series: drawn in this order.
        page_title: above it in the page.
        page_caption: after the page's title.
        page_height: in CSS pixels.
        page_legend: where the page shows the legend, "" for nowhere.
        has_tools: whether the page shows plotly's buttons for zooming and saving.
    """

    id: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    page_title: str = ""
    page_caption: str = ""
    page_height: int = 380
    page_legend: Literal["above", "below", ""] = ""
    has_tools: bool = True


@dataclass(frozen=True)
class Figure:
    """Panels that one picture shows.

    Attributes:
        panels: at least one.
        inches: width and height of the picture.
        columns: panels side by side, 0 for all.
        legend: in each panel, or below it, or one above or below all panels, or "" for none.
        caption: below the label of the horizontal axis, which all panels then share.
        title: above all panels of a picture; may have several lines.
    """

    panels: Sequence[Panel]
    inches: tuple[float, float]
    columns: int = 0
    legend: Literal["panels", "panels below", "above", "below", ""] = ""
    caption: str = ""
    title: str = ""


def to_log1p(values: Any) -> Any:
    """Return the places of numbers or an array of them, above -1, on an axis of scale "log1p"."""
    return np.log1p(values) / np.log(10)


def from_log1p(places: Any) -> Any:
    """Return the numbers at places of an axis of scale "log1p"."""
    return np.expm1(np.multiply(places, np.log(10)))


def log1p_ticks(highest: float) -> dict[float, str]:
    """Return the ticks of an axis of scale "log1p" up to `highest`: 0 and the powers of 10."""
    powers = [10.0**k for k in range(1 + max(0, math.floor(math.log10(max(highest, 1)))))]
    return {0.0: "0"} | {power: f"{power:,.0f}" for power in powers}
