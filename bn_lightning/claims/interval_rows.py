"""Rows of text with an interval below each, which need no room beside the panel."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bn_lightning.sweeps.analysis.arms import Style
from bn_lightning.sweeps.report.figure import Intervals, Label, Series

LINE_HEIGHT = 16
"""Pixels of a line of the page."""

LETTERS = 52
"""Of a line, so that a narrow page has room for it."""


class IntervalRow(NamedTuple):
    """Lines of text and an interval.

    Attributes:
        lines: of text.
        interval: value, lower end and upper end, below the lines, NaN for nothing; None for a
            heading.
        style: of the interval.
        name: entry of its style in the legend, "" for none.
        at_least: whether the value is a lower bound.
    """

    lines: Sequence[str]
    interval: tuple[float, float, float] | None
    style: Style = Style("")
    name: str = ""
    at_least: bool = False


def rows_of_text(rows: Iterable[IntervalRow]) -> tuple[list[Series], float]:
    """Return the series of rows, and how many lines are needed; the first is at y = 0."""
    series: list[Series] = []
    alike: dict[tuple[str, Style], list[tuple[float, IntervalRow]]] = {}
    y = 0.0
    for row in rows:
        if row.interval is None and y < 0:  # a heading
            y -= 0.6
        for line in row.lines:
            series.append(Label(y, line, row.interval is None))
            y -= 1
        if row.interval is None:
            continue
        if not math.isnan(row.interval[0]):
            alike.setdefault((row.name, row.style), []).append((y, row))
            y -= 1
        y -= 0.3
    for (name, style), there in sorted(alike.items(), key=lambda item: item[0][0]):
        there.sort(key=lambda item: item[1].at_least)  # the first has the marker of the legend
        values, lows, highs = zip(*(row.interval or () for _, row in there), strict=True)
        series.append(
            Intervals(
                x=values,
                low=lows,
                high=highs,
                y=[y for y, _ in there],
                texts=[" ".join(row.lines) for _, row in there],
                at_least=[row.at_least for _, row in there],
                name=name,
                style=style,
            )
        )
    return series, -y
