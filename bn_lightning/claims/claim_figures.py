"""The figure of a claim: what was measured of each arm, over the seeds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from bn_lightning.claims.design import Claim, Curves
from bn_lightning.claims.interval_rows import LETTERS, LINE_HEIGHT, IntervalRow, rows_of_text
from bn_lightning.claims.result_table import ResultTable
from bn_lightning.sweeps.analysis.arms import LINES, Style, label_of, style_of
from bn_lightning.sweeps.report.figure import GRAY, Axis, Band, Figure, Line, Panel, Series

_WIDTH, _HEIGHT, _LINE = 3.6, 3.0, 0.2  # inches of a panel, and of a line of text
_PAGE_HEIGHT, _PAGE_ENTRY = 340, 24  # pixels of a panel of the page, and of an entry below it
_MOST_COLUMNS = 3
_MOST_TICKS = 7
_MANTISSAS = ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))


class _Curve(NamedTuple):
    """What was measured of an arm.

    Attributes:
        label: in the legend.
        style: of the arm.
        of_x: place on the horizontal axis -> a value for each seed.
    """

    label: str
    style: Style
    of_x: Mapping[float, Sequence[float]]

    def values(self) -> list[float]:
        return [value for found in self.of_x.values() for value in found]


def claim_figure(claim: Claim, budget: str, table: ResultTable) -> Figure:
    """Describe what was measured: the mean of each arm, with the range of the seeds as a band.

    Where all arms were measured at a single place, each has a row with its mean and its range.

    Args:
        claim: the claim.
        budget: a name of `BUDGETS`.
        table: of the measured networks.
    """
    seeds = len({key.seed for key in table.results if key.claim == claim.name})
    shows = "One seed."
    if seeds > 1:
        shows = f"Mean of {seeds} seeds, with their range from the lowest to the highest."
    panels = []
    for place, curves in enumerate(claim.curves):
        found = _measured(claim, budget, curves, table)
        if not found:
            continue
        y_axes = _y_axes(curves, found)
        x_axis = _x_axis(curves, found)
        for number, (title, drawn) in enumerate(found.items()):
            panel_id = f"{claim.name.replace('_', '-')}-{place}-{number}"
            at = sorted({x for curve in drawn for x in curve.of_x})
            if len(at) == 1:
                title = ", ".join(filter(None, (title, f"{curves.x_label} {at[0]:,g}")))
                panels.append(_panel_of_rows(panel_id, title, curves, drawn, shows))
                continue
            series = _lines(drawn)
            series += [
                Line([at[0], at[-1]], [value, value], name, Style(GRAY, ":"))
                for name, value in curves.threshold.items()
            ]
            panels.append(
                Panel(
                    panel_id,
                    title,
                    x_axis,
                    y_axes[title],
                    series,
                    page_title=", ".join(filter(None, (curves.label, title))),
                    page_caption=f"Horizontal axis: {curves.x_label}. {shows}",
                    page_height=_PAGE_HEIGHT + _PAGE_ENTRY * len(drawn),
                    page_legend="below",
                )
            )
    panels = panels or [Panel(claim.name, "nothing measured", Axis(), Axis(), [])]
    rows = math.ceil(len(panels) / _MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    entries = {s.name for panel in panels for s in panel.series if isinstance(s, Line)}
    title = f"{claim.sentence}\n{shows}"
    width = max(_WIDTH * columns + 0.6, 6.0)
    texts = 2 + len(title) // int(12 * width) + math.ceil(len(entries) / 2)
    return Figure(panels, (width, _HEIGHT * rows + _LINE * texts), columns, "below", title=title)


def _measured(
    claim: Claim, budget: str, curves: Curves, table: ResultTable
) -> dict[str, list[_Curve]]:
    """Return title of a panel -> what was measured of each arm, only what there is."""
    settings = claim.settings(budget)
    found: dict[str, list[_Curve]] = {}
    for title in dict.fromkeys(setting.panel for setting in settings.values()):
        for place, arm in enumerate(claim.arms):
            for turn, (name, measures) in enumerate((curves.along or {"": {}}).items()):
                of_x: dict[float, list[float]] = {}
                for key, result in table.results.items():
                    setting = settings.get(key.setting)
                    if (key.claim, key.arm) != (claim.name, arm) or setting is None:
                        continue
                    if setting.panel != title:
                        continue
                    for measure, x in (measures or {curves.measure: setting.x}).items():
                        value = result.measures.get(measure, math.nan)
                        if math.isfinite(value) and (value > 0 or curves.scale != "log"):
                            of_x.setdefault(x, []).append(value)
                if of_x:
                    style = style_of(arm, claim.arms, turn)
                    style = replace(style, line=LINES[(place + turn) % len(LINES)])
                    label = claim.arm_labels.get(arm, label_of(arm))
                    label = ", ".join(filter(None, (label, name)))
                    found.setdefault(title, []).append(_Curve(label, style, of_x))
    return found


def _lines(drawn: Sequence[_Curve]) -> list[Series]:
    """Return a curve and a band for each arm, a vertical line where it has a single place."""
    series: list[Series] = []
    for label, style, of_x in drawn:
        xs = sorted(of_x)
        low, high = [min(of_x[x]) for x in xs], [max(of_x[x]) for x in xs]
        mean = [float(np.mean(of_x[x])) for x in xs]
        if len(xs) == 1:
            series.append(Line(2 * xs, low + high, "", Style(style.color)))
        else:
            series.append(Band(xs, low, high, style.color))
        series.append(Line(xs, mean, label, style, "line and points"))
    return series


def _panel_of_rows(
    panel_id: str, title: str, curves: Curves, drawn: Sequence[_Curve], shows: str
) -> Panel:
    rows = []
    for label, style, of_x in drawn:
        (values,) = of_x.values()
        mean, low, high = float(np.mean(values)), min(values), max(values)
        text = f"{label}: {mean:.4g}, {low:.4g} to {high:.4g}"
        rows.append(IntervalRow(wrap(text, LETTERS), (mean, low, high), style))
    series, height = rows_of_text(rows)
    bounds = _padded([value for curve in drawn for value in curve.values()], curves.scale)
    ticks = plain_log_ticks(*bounds) if curves.scale == "log" else None
    return Panel(
        panel_id,
        title,
        Axis(curves.label, curves.scale, bounds, ticks, "g"),
        Axis(bounds=(-height, 1.0), ticks={}),
        series,
        page_title=f"{curves.label}, {title}",
        page_caption=shows,
        page_height=round(100 + LINE_HEIGHT * (height + 1)),
    )


def _x_axis(curves: Curves, found: Mapping[str, Sequence[_Curve]]) -> Axis:
    """Return the axis of all panels, with ticks where networks were measured if there is room."""
    drawn = [curve for there in found.values() for curve in there]
    places = sorted({x for curve in drawn for x in curve.of_x})
    scale = curves.x_scale if places[0] > 0 else "linear"
    gaps = [_span(pair, scale) for pair in itertools.pairwise(places)]
    ticks = None
    if len(places) <= _MOST_TICKS and all(gap > sum(gaps) / 10 for gap in gaps):
        ticks = {place: f"{place:,g}" for place in places}
    elif scale == "log":
        ticks = plain_log_ticks(places[0], places[-1])
    is_count = all(float(place).is_integer() for place in places)
    return Axis(curves.x_label, scale, ticks=ticks, number_format="," if is_count else "g")


def _y_axes(curves: Curves, found: Mapping[str, Sequence[_Curve]]) -> dict[str, Axis]:
    """Return title of a panel -> its axis: one for all, unless it would crush one of them."""
    values = {title: [v for c in drawn for v in c.values()] for title, drawn in found.items()}
    values = {title: [*there, *curves.threshold.values()] for title, there in values.items()}
    joint = [value for there in values.values() for value in there]
    span = _span(joint, curves.scale)
    is_shared = all(_span(there, curves.scale) >= span / 4 for there in values.values())
    axes = {}
    for title, there in values.items():
        bounds = _padded(joint if is_shared else there, curves.scale)
        ticks = plain_log_ticks(*bounds) if curves.scale == "log" else None
        axes[title] = Axis(curves.label, curves.scale, bounds, ticks, "g")
    return axes


def _span(values: Sequence[float], scale: str) -> float:
    low, high = min(values), max(values)
    return math.log(high / low) if scale == "log" else high - low


def _padded(values: Sequence[float], scale: str) -> tuple[float, float]:
    """Return the bounds of an axis on which no value lies at an end."""
    low, high = min(values), max(values)
    if scale == "log":
        factor = (high / low) ** 0.06 if high > low else 2.0
        return low / factor, high * factor
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def plain_log_ticks(low: float, high: float) -> dict[float, str]:
    """Return at most `_MOST_TICKS` ticks of a logarithmic axis, as plain numbers: 30, 100, 300.

    Args:
        low: lower end, above 0.
        high: upper end.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for mantissas in _MANTISSAS:
        ticks = [float(f"{m}e{power}") for power in powers for m in mantissas]
        found = [tick for tick in ticks if low <= tick <= high]
        if len(found) <= _MOST_TICKS:
            break
    if len(found) < 3:  # a part of a decade: as on a linear axis
        ticks = list(map(float, MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)))
        found = [tick for tick in ticks if low <= tick <= high]
    every = math.ceil(len(found) / _MOST_TICKS)
    return {tick: f"{tick:,.10g}" for tick in found[::every]}
