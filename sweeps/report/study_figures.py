"""The figures of a study that is not a grid: its history, its parameters, and their importances."""

import itertools
import math
from collections.abc import Mapping, Sequence

from bn_lightning.sweeps.analysis.arms import COLORS, Style
from bn_lightning.sweeps.analysis.importances import is_log_scale
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable
from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.report.figure import GRAY, Axis, Bars, Figure, Line, Panel

MOST_TRIALS = 1000
"""Of more trials, evenly spaced ones are drawn, to keep the page small."""

_MOST_TICKS = 8  # choices with a label
_TRIAL, _BEST = Style(COLORS[0]), Style(COLORS[1], marker="D")


def study_figures(table: TrialTable, shares: Mapping[str, float], count: int) -> dict[str, Figure]:
    """Return file name -> figure: `history`, `parameters` and `importances`, or `pareto`.

    `pareto` is that of a study with several values.

    Args:
        table: the trials.
        shares: parameter -> its importance, empty for none.
        count: the number of trials that the importances rest on.
    """
    rows = drawn_trials(table)
    if not rows:
        return {}
    if len(table.directions) > 1:
        return {"pareto": pareto_figure(table, rows)}
    found = {"history": history_figure(table, rows)}
    panels = _parameter_panels(table, rows)
    if panels:
        columns = min(3, len(panels))
        inches = 4 * max(columns, 1), 3 * -(-len(panels) // columns)
        found["parameters"] = Figure(panels, inches, columns)
    if shares:
        found["importances"] = shares_figure(table, shares, count)
    return found


def drawn_trials(table: TrialTable) -> list[TrialRow]:
    """Return the complete trials with finite values, of many evenly spaced ones."""
    rows = [row for row in table.complete if all(map(math.isfinite, row.values))]
    return rows[:: -(-len(rows) // MOST_TRIALS)] if rows else []


def history_figure(table: TrialTable, rows: Sequence[TrialRow]) -> Figure:
    """Describe the value of each trial against its number, and the best value so far."""
    (name,), best = table.value_names, max if table.directions == ("maximize",) else min
    numbers = [row.number for row in rows]
    values = [row.values[0] for row in rows]
    so_far = list(itertools.accumulate(values, best))
    series = [
        Line(numbers, so_far, "best so far", Style(COLORS[1])),
        Line(numbers, values, "trial", _TRIAL, "points", texts=_texts(table, rows)),
    ]
    panel = Panel(
        "history",
        "",
        Axis("trial"),
        Axis(name),
        series,
        f"{name} of the trials, in their order",
        page_legend="below",
    )
    return Figure([panel], (6, 3.5), legend="panels")


def _parameter_panels(table: TrialTable, rows: Sequence[TrialRow]) -> list[Panel]:
    """Return a panel for each parameter with several values: the value of each trial against it."""
    (value_name,) = table.value_names
    panels = []
    for i, name in enumerate(dict.fromkeys(key for row in rows for key in row.params)):
        having = [row for row in rows if name in row.params]
        values = [row.params[name] for row in having]
        if len(set(map(repr, values))) < 2:
            continue
        x, places = _parameter_axis(name, values, is_log_scale(table, name))
        results = [row.values[0] for row in having]
        line = Line(places, results, "", _TRIAL, "points", texts=_texts(table, having))
        panels.append(
            Panel(
                f"parameter-{i}",
                "",
                x,
                Axis(value_name),
                [line],
                name,
                page_height=280,
                has_tools=False,
            )
        )
    return panels


def _parameter_axis(
    name: str, values: Sequence[Cell], is_log: bool
) -> tuple[Axis, Sequence[float]]:
    """Return the axis of a parameter, and the place of each value on it."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        return Axis(_short(name, 32), "log" if is_log else "linear", number_format="g"), numbers
    choices = list(dict.fromkeys(map(str, values)))
    every = -(-len(choices) // _MOST_TICKS)
    ticks = {float(k): _short(choices[k]) for k in range(0, len(choices), every)}
    places = [float(choices.index(str(value))) for value in values]
    return Axis(_short(name, 32), bounds=(-0.5, len(choices) - 0.5), ticks=ticks), places


def shares_figure(table: TrialTable, shares: Mapping[str, float], count: int) -> Figure:
    """Describe the share of the variance of the value that each parameter explains."""
    (name,) = table.value_names
    panel = Panel(
        "importances",
        "",
        Axis(f"share of the variance\nof {name} (fANOVA)", bounds=(0, 1.1)),
        Axis(is_reversed=True),
        [Bars(shares, [COLORS[0]] * len(shares), ".2f")],
        f"What {name} depends on",
        f"fANOVA of {count:,} trials",
        page_height=150 + 30 * len(shares),
        has_tools=False,
    )
    return Figure([panel], (6, 1.6 + 0.35 * len(shares)), caption=f"{count:,} trials")


def pareto_figure(table: TrialTable, rows: Sequence[TrialRow]) -> Figure:
    """Describe a panel for each pair of values, with the Pareto front of all values marked."""
    front = best_trials(rows, table.optuna_directions)
    numbers = {row.number for row in front}
    others = [row for row in rows if row.number not in numbers]
    panels = []
    for i, j in itertools.combinations(range(len(table.directions)), 2):
        lines = [
            Line(
                [row.values[i] for row in of_kind],
                [row.values[j] for row in of_kind],
                name,
                style,
                "points",
                texts=_texts(table, of_kind),
            )
            for of_kind, name, style in (
                (others, "trial", Style(GRAY)),
                (front, "Pareto front", _BEST),
            )
            if of_kind
        ]
        names = table.value_names
        title = f"{names[j]} against {names[i]}"
        panels.append(
            Panel(
                f"pareto-{i}-{j}",
                "",
                Axis(names[i]),
                Axis(names[j]),
                lines,
                title,
                page_legend="below",
            )
        )
    columns = min(3, len(panels))
    inches = 4 * columns, 3 * -(-len(panels) // columns)
    return Figure(panels, inches, columns, legend="panels")


def _texts(table: TrialTable, rows: Sequence[TrialRow]) -> list[str]:
    """Return what the page shows for each trial, in lines."""
    texts, names = [], table.value_names
    for row in rows:
        pairs = [*zip(names, row.values, strict=True), *row.params.items()]
        lines = [f"trial {row.number}", *(f"{name} {_text(value)}" for name, value in pairs)]
        texts.append("\n".join(lines))
    return texts


def _text(value: Cell) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _short(str(value))


def _short(text: str, letters: int = 16) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
