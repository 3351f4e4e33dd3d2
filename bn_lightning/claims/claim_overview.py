"""The overview: the effect of each condition that decides, beside the bound of its rule."""

import itertools
import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from bn_lightning.claims.interval_rows import LETTERS, LINE_HEIGHT, IntervalRow, rows_of_text
from bn_lightning.claims.verdict import FAILS, HOLDS, OPEN
from bn_lightning.claims.verdict_text import bound_text, effect_text, short_verdict
from bn_lightning.sweeps.analysis.arms import COLORS, Style
from bn_lightning.sweeps.report.figure import GRAY, Axis, Figure, Intervals, Line, Panel

_OUTCOMES = {
    HOLDS: Style(COLORS[0]),
    FAILS: Style(COLORS[1], marker="s"),
    OPEN: Style(GRAY, marker="^"),
}
_LOWEST, _HIGHEST = -1.0, 4.0  # in units of the bound: what is beyond is drawn there
_TICKS = {-1.0: "≤ −1", 0.0: "0", 1.0: "1", 2.0: "2", 3.0: "3", 4.0: "≥ 4"}
_MOST_COLUMNS = 3
_WIDTH, _LINE = 4.0, 0.155  # inches of a column, and of a line
_CAPTION = (
    "Each condition that decides, with its effect, the 95% interval over the seeds and its rule. "
    "Below, the same in units of the rule's bound: right of the gray line, at 1, is the side "
    "that holds. Ratios count by their logarithm. Between two bounds, the middle is at 2. An arrow "
    "means a lower bound."
)


def overview_figure(entries: Mapping[str, Any]) -> Figure:
    """Describe claims, verdicts, and the effect of each condition beside its bound.

    Args:
        entries: name -> entry of summary.json.
    """
    columns = _columns([_rows(name, entry) for name, entry in entries.items()])
    laid_out = [rows_of_text(rows) for rows in columns]
    height = max(height for _, height in laid_out)
    panels = []
    for number, (series, _) in enumerate(laid_out):
        drawn = [y for one in series if isinstance(one, Intervals) for y in one.y]
        # At each interval, so that the line crosses no text.
        y = [end for at in drawn for end in (at - 0.6, at + 0.6, math.nan)]
        panels.append(
            Panel(
                f"overview-{number}",
                "",
                Axis("effect in units of the rule's bound", "linear", (-1.15, 4.15), _TICKS),
                Axis(bounds=(-height, 1.0), ticks={}),
                [Line([1.0] * len(y), y, "", Style(GRAY)), *series],
                page_title="Overview" if number == 0 else "Overview, continued",
                page_caption=f"{_CAPTION} Controls are in the tables below." * (number == 0),
                page_height=round(150 + LINE_HEIGHT * (height + 1)),
                page_legend="above",
            )
        )
    inches = (_WIDTH * len(panels) + 0.4, _LINE * (height + 1) + 1.8)
    title = f"The claims for BatchNorm, and their verdicts\n{_CAPTION}"
    return Figure(panels, inches, legend="below", title=title)


def _columns(claims: Sequence[Sequence[IntervalRow]]) -> list[list[IntervalRow]]:
    """Return the rows of claims in columns, of which the longest is as short as possible."""
    heights = [sum(len(row.lines) + 1 for row in rows) for rows in claims]
    cuts = itertools.combinations(range(1, len(claims)), min(_MOST_COLUMNS, len(claims)) - 1)

    def longest(ends: tuple[int, ...]) -> int:
        return max(sum(heights[a:b]) for a, b in itertools.pairwise((0, *ends, len(claims))))

    ends = (0, *min(cuts, key=longest), len(claims))
    return [[row for rows in claims[a:b] for row in rows] for a, b in itertools.pairwise(ends)]


def _rows(name: str, entry: Mapping[str, Any]) -> list[IntervalRow]:
    rows = [IntervalRow(wrap(f"{name}: {short_verdict(entry)}", LETTERS - 4), None)]
    for condition in entry["conditions"]:
        if not condition["is_control"]:
            text = f"{condition['statement']}: {effect_text(condition)}; "
            text += f"rule: {bound_text(condition)}"
            outcome = condition["outcome"]
            rows.append(
                IntervalRow(
                    wrap(text, LETTERS),
                    _relative_interval(condition),
                    _OUTCOMES[outcome],
                    outcome,
                    condition["effect"]["at_least"],
                )
            )
    return rows


def _relative_interval(condition: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the effect in units of its bound, and the lower and upper end of its interval."""
    effect, least, most = condition["effect"], condition["least"], condition["most"]
    value, low, high = (
        math.nan if effect[end] is None else effect[end] for end in ("value", "low", "high")
    )
    if condition["kind"] == "ratio":  # a bound of 1 is at 0, and a factor of 2 is 1 from it
        value, low, high = (math.log2(x) if x > 0 else x for x in (value, low, high))
        least, most = (None if bound is None else math.log2(bound) for bound in (least, most))
    inside = [low, high]
    if least is not None and most is not None:
        inside.append(min(max((least + most) / 2, low), high))  # the best of the interval
    ends = [_relative(x, least, most) for x in inside]
    return _relative(value, least, most), min(ends), max(ends)


def _relative(value: float, least: float | None, most: float | None) -> float:
    """Return where a value is beside its bounds, in units of them: 1 is a bound, more is inside.

    The unit of two bounds is half of the distance between them, that of a bound at 0 is 1.
    """
    if math.isnan(value):
        return math.nan
    inside, units = [], []
    if least is not None:
        inside.append(value - least)
        units.append(least)
    if most is not None:
        inside.append(most - value)
        units.append(most)
    unit = abs(units[-1] - units[0]) / 2 if len(units) == 2 else abs(units[0])
    return min(max(1.0 + min(inside) / (unit or 1.0), _LOWEST), _HIGHEST)
