"""The figure of a claim, and the overview of all claims."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from bn_lightning.claims.design import Claim, Curves
from bn_lightning.claims.result_table import ResultTable
from bn_lightning.claims.verdict import FAILS, HOLDS, OPEN
from bn_lightning.sweeps.analysis.arms import COLORS, Style, label_of, style_of
from bn_lightning.sweeps.report.figure import (
    GRAY,
    Axis,
    Band,
    Figure,
    Intervals,
    Line,
    Panel,
    Series,
)

_WIDTH, _HEIGHT, _ENTRY = 3.6, 3.0, 0.2  # inches of a panel, and of an entry of its legend
_PAGE_HEIGHT, _PAGE_ENTRY = 340, 24  # pixels of a panel of the page, and of an entry below it
_MOST_COLUMNS = 3
_OUTCOMES = {
    HOLDS: Style(COLORS[0]),
    FAILS: Style(COLORS[1], marker="s"),
    OPEN: Style(GRAY, marker="^"),
}
_FARTHEST = 4.0  # from the bound, in units of the bound: the overview draws it there
_BESIDE = 0.15  # to the ends of the overview, so that markers lie on no label


def claim_figure(claim: Claim, budget: str, table: ResultTable) -> Figure:
    """Describe what was measured: the mean of each arm, with a band from lowest to highest seed.

    Args:
        claim: the claim.
        budget: a name of `BUDGETS`.
        table: of the measured networks.
    """
    settings = claim.settings(budget)
    panels = []
    for place, curves in enumerate(claim.curves):
        shown = {
            label: setting
            for label, setting in settings.items()
            if any(
                curves.measure in result.measures
                for key, result in table.results.items()
                if (key.claim, key.setting) == (claim.name, label)
            )
        }
        for number, title in enumerate(dict.fromkeys(s.panel for s in shown.values())):
            there = {label: s.x for label, s in shown.items() if s.panel == title}
            series = _curves(claim, curves, there, table)
            entries = sum(isinstance(one, Line) for one in series)
            panels.append(
                Panel(
                    f"{claim.name.replace('_', '-')}-{place}-{number}",
                    title or curves.label,
                    Axis(curves.x_label, curves.x_scale, number_format=_format_of(there.values())),
                    Axis(curves.label, curves.scale, number_format="g"),
                    series,
                    page_title=", ".join(part for part in (curves.label, title) if part),
                    page_caption="Mean of the seeds, and their range.",
                    page_height=_PAGE_HEIGHT + _PAGE_ENTRY * entries,
                    page_legend="below",
                )
            )
    rows = math.ceil(len(panels) / _MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    legends = [[s.name for s in panel.series if isinstance(s, Line)] for panel in panels]
    is_shared = len(panels) > 1 and all(legend == legends[0] for legend in legends)
    most = 1 if is_shared else max(map(len, legends))
    inches = (_WIDTH * columns + 0.6, (_HEIGHT + _ENTRY * most) * rows)
    return Figure(panels, inches, columns, "below" if is_shared else "panels below")


def _format_of(x: Collection[float]) -> Literal["", "g"]:
    """Return the format of an axis: plain numbers if they are short, else powers of 10."""
    least = min((value for value in x if value > 0), default=1.0)
    return "g" if max(x, default=1.0) < 1000 * least else ""


def _curves(
    claim: Claim, curves: Curves, settings: Mapping[str, float], table: ResultTable
) -> list[Series]:
    """Return a curve and a band for each arm; `settings` has the place of each label."""
    series: list[Series] = []
    for arm in claim.arms:
        for turn, (name, measures) in enumerate((curves.along or {"": {}}).items()):
            of_x: dict[float, list[float]] = {}
            for key, result in table.results.items():
                if (key.claim, key.arm) == (claim.name, arm) and key.setting in settings:
                    wanted = measures or {curves.measure: settings[key.setting]}
                    for measure, x in wanted.items():
                        value = result.measures.get(measure, math.nan)
                        if math.isfinite(value):
                            of_x.setdefault(x, []).append(value)
            if not of_x:
                continue
            xs = sorted(of_x)
            style = style_of(arm, claim.arms, turn)
            low, high = [min(of_x[x]) for x in xs], [max(of_x[x]) for x in xs]
            mean = [float(np.mean(of_x[x])) for x in xs]
            label = ", ".join(part for part in (label_of(arm), name) if part)
            series += [
                Band(xs, low, high, style.color),
                Line(xs, mean, label, style, "line and points"),
            ]
    return series


def overview_figure(entries: Mapping[str, Any]) -> Figure:
    """Describe the effect of each condition beside its bound, all in units of the bound.

    Args:
        entries: name -> entry of summary.json.
    """
    rows = [
        (f"{name} {number}", condition)
        for name, entry in entries.items()
        for number, condition in enumerate(entry["conditions"], 1)
    ]
    places = {label: float(len(rows) - 1 - i) for i, (label, _) in enumerate(rows)}
    series: list[Series] = [
        Line([1.0, 1.0], [-0.7, len(rows) - 0.3], "", Style(GRAY, "--")),
    ]
    for outcome, style in _OUTCOMES.items():
        found = [(label, c) for label, c in rows if c["outcome"] == outcome]
        if found:
            x, low, high = (
                [_relative(c["effect"][end], c) for _, c in found]
                for end in ("value", "low", "high")
            )
            y = [places[label] for label, _ in found]
            texts = [f"{c['name']}: {effect_text(c)}" for _, c in found]
            series.append(Intervals(x, low, high, y, texts, [False] * len(y), outcome, style))
    panel = Panel(
        "overview",
        "1 and more: the effect that the rule asks for",
        Axis("effect / bound of its rule", bounds=(-1.0 - _BESIDE, _FARTHEST + _BESIDE)),
        Axis(
            ticks={place: label for label, place in places.items()},
            bounds=(-0.7, max(len(rows) - 0.3, 0.7)),
        ),
        series,
        page_title="Overview",
        page_caption="Each condition, as it is numbered below, with its interval, in units of the "
        f"bound of its rule. 1 and more is on the side that holds. Effects below -1 or above "
        f"{_FARTHEST:g} are drawn there, and a row is empty where nothing was measured.",
        page_height=150 + 26 * len(rows),
        page_legend="above",
    )
    return Figure([panel], (7.5, 1.5 + 0.28 * len(rows)), legend="above")


def effect_text(condition: Mapping[str, Any]) -> str:
    """Return an effect with its interval and unit: 1.20 [1.19, 1.21] a layer."""
    effect, unit = condition["effect"], condition["unit"]
    if effect["value"] is None or math.isnan(effect["value"]):
        return "nothing measured"
    interval = ""
    if effect["seeds"] > 1 and effect["low"] is not None and not math.isnan(effect["low"]):
        interval = f" [{effect['low']:.3g}, {effect['high']:.3g}]"
    return f"{effect['value']:.3g}{interval}{f' {unit}' if unit else ''}"


def bound_text(condition: Mapping[str, Any]) -> str:
    """Return what the rule asks for: at least 2, at most 0.1, 1.18 to 1.22."""
    least, most = condition["least"], condition["most"]
    if least is None:
        return f"at most {most:g}"
    return f"at least {least:g}" if most is None else f"{least:g} to {most:g}"


def _relative(value: float | None, condition: Mapping[str, Any]) -> float:
    """Return an effect in units of its bound: a ratio on a logarithmic scale; 1 is the bound.

    A ratio's bound of 1 has no logarithm to measure in: a factor of 2 lies 1 beyond it.
    """
    if value is None or math.isnan(value):
        return math.nan
    least, most = condition["least"], condition["most"]
    if condition["kind"] == "ratio" and value > 0:
        value = math.log2(value)
        least, most = (None if b is None else math.log2(b) for b in (least, most))
        if 0.0 in (least, most):
            value, least = (value + 1.0 if least == 0.0 else 1.0 - value), 1.0
    if least is not None and least > 0:
        relative = value / least
    else:  # as far below the upper bound as a half is below 1
        over = value if least is None else abs(value)
        relative = 2.0 - over / most if most else math.nan
    return min(max(relative, -1.0), _FARTHEST)
