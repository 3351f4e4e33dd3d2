"""The figures of a grid of learning rates and initializations, and its data for the page.

All accuracies share one color scale, viridis from 0 to 1, which keeps its order in grayscale and
for color-blind readers. Each color also stands in its cell as a number or a letter.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Float

from bn_lightning.sweeps.analysis.arms import label_of, style_of
from bn_lightning.sweeps.analysis.importances import MOST_FOR_IMPORTANCES
from bn_lightning.sweeps.analysis.summary import Summary, capital, decades
from bn_lightning.sweeps.analysis.tolerance import Grid, GridOutcome, GridTrial
from bn_lightning.sweeps.report.figure import (
    Axis,
    Band,
    Bars,
    ColorScale,
    Figure,
    Heatmap,
    Intervals,
    Line,
    Panel,
    Rule,
    Series,
)

# Larger grids have cells without texts, fewer labels, and panels of some initializations only.
MOST_TEXTS, MOST_LABELS, MOST_PANELS = 400, 16, 12

# Okabe & Ito's colors, which differ in grayscale too, and the letter in a cell; the best first.
OUTCOMES = {
    GridOutcome.TRAINED: ("#009E73", "T"),
    GridOutcome.SLOW: ("#F0E442", "s"),
    GridOutcome.CHANCE: ("#CCCCCC", "c"),
    GridOutcome.DIVERGED: ("#D55E00", "N"),
    GridOutcome.MISSING: ("#FFFFFF", "?"),
}

_ACCURACY = ColorScale("accuracy", (0, 1), "viridis")
_DIFFERENCE = ColorScale("difference of accuracy", (-1, 1), "PuOr_r")
_OUTCOME = ColorScale(
    "outcome",
    (-0.5, len(OUTCOMES) - 0.5),
    categories={f"{letter}: {outcome}": color for outcome, (color, letter) in OUTCOMES.items()},
)


def grid_figures(found: Summary, metric: str, caption: str) -> dict[str, Figure]:
    """Return file name -> figure for all figures that the grid has.

    Args:
        found: the numbers of the grid.
        metric: the accuracy that was measured, "test accuracy" for instance.
        caption: data, budget and number of seeds, for the pictures.
    """
    figures = {
        "accuracy": accuracy_map_figure(found, metric, caption),
        "outcomes": outcome_map_figure(found, caption),
    }
    if len(found.grid.rates) > 1:
        figures["rates"] = rates_figure(found, metric, caption)
        figures["widths"] = widths_figure(found, caption)
    if any(arm.importances for arm in found.arms.values()):
        figures["importances"] = importances_figure(found, caption)
    return figures


def accuracy_map_figure(found: Summary, metric: str, caption: str) -> Figure:
    """Describe the mean accuracy of each cell, a panel for each arm and for each comparison.

    Cells in which a seed diverged are hatched. Missing cells are empty.
    """
    names = list(found.arms)
    means = {name: mean_over_seeds(found.grid.arms[name].accuracy) for name in names}
    panels = []
    for i, name in enumerate(names):
        diverged_IR = found.grid.arms[name].diverged.any(axis=2)
        striped = [(int(r), int(c)) for c, r in np.argwhere(diverged_IR)]
        heatmap = Heatmap(means[name], _numbers(means[name]), _ACCURACY, striped, (i,))
        title = label_of(name)
        text = f"mean {metric}; striped: a seed diverged"
        panels.append(_cells(found.grid, f"accuracy-{i}", title, heatmap, text))
    for k, pair in enumerate(found.comparisons):
        values = means[pair.first] - means[pair.second]
        arms = names.index(pair.first), names.index(pair.second)
        heatmap = Heatmap(values, _numbers(values), _DIFFERENCE, arms=arms)
        title = f"{label_of(pair.first)}\nminus {label_of(pair.second)}"
        text = f"difference of {metric}"
        panels.append(_cells(found.grid, f"difference-{k}", title, heatmap, text))
    return Figure(panels, _inches(found.grid, len(panels)), caption=caption)


def metric_map_figure(grid: Grid, metric: str, direction: str) -> Figure:
    """Describe the mean of any metric in each cell, a panel for each arm.

    Args:
        grid: with the metric as accuracy.
        metric: its name.
        direction: "maximize" or "minimize"; the better of two values has the lighter color.
    """
    means = [mean_over_seeds(arm.accuracy) for arm in grid.arms.values()]
    finite = np.concatenate([values[np.isfinite(values)] for values in means])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    is_minimized = direction == "minimize"
    better = "lower" if is_minimized else "higher"
    colors = "viridis_r" if is_minimized else "viridis"
    # A scale needs two different bounds.
    scale = ColorScale(metric, (low, high if high > low else low + 1), colors)
    panels = []
    for i, (name, values) in enumerate(zip(grid.arms, means, strict=True)):
        texts = None
        if values.size <= MOST_TEXTS:
            texts = [["" if np.isnan(v) else f"{v:.2g}" for v in row] for row in values]
        heatmap = Heatmap(values, texts, scale, cells=_values_of_cells(grid, name))
        text = f"mean {metric} over seeds; {better} is better"
        panels.append(_cells(grid, f"map-{i}", label_of(name), heatmap, text))
    seeds = f"{len(grid.seeds)} seed{'s' * (len(grid.seeds) > 1)}"
    caption = f"{metric}, {better} is better, {seeds}"
    return Figure(panels, _inches(grid, len(panels)), caption=caption)


def _values_of_cells(grid: Grid, arm: str) -> list[list[str]]:
    """Return, for each cell, where it is and the metric of each of its seeds."""
    return [
        [
            "\n".join(
                [f"{init_label(grid)} {init_name(init)}, learning rate {short_number(rate)}"]
                + [
                    f"seed {seed}: {'no trial' if np.isnan(value) else format(value, '.4g')}"
                    for seed, value in zip(grid.seeds, cell, strict=True)
                ]
            )
            for rate, cell in zip(grid.rates, row, strict=True)
        ]
        for init, row in zip(grid.inits, grid.arms[arm].accuracy, strict=True)
    ]


def outcome_map_figure(found: Summary, caption: str) -> Figure:
    """Describe the most common outcome of each cell, of a tie the worse, a panel for each arm."""
    kinds = list(OUTCOMES)
    panels = []
    for i, (name, arm) in enumerate(found.grid.arms.items()):
        common = [[most_common(cell.tolist()) for cell in row] for row in arm.outcomes()]
        values_IR = np.array([[kinds.index(kind) for kind in row] for row in common])
        texts = [[OUTCOMES[kind][1] for kind in row] for row in common]
        heatmap = Heatmap(
            values_IR, texts if values_IR.size <= MOST_TEXTS else None, _OUTCOME, arms=(i,)
        )
        text = "; ".join(_OUTCOME.categories)
        panels.append(_cells(found.grid, f"outcome-{i}", label_of(name), heatmap, text))
    return Figure(panels, _inches(found.grid, len(panels)), legend="above", caption=caption)


def rates_figure(found: Summary, metric: str, caption: str) -> Figure:
    """Describe accuracy against learning rate, a panel for each initialization.

    Lines are means over seeds. Bands reach from the lowest seed to the highest.
    """
    grid = found.grid
    few = {rate: short_number(rate) for rate in grid.rates} if len(grid.rates) <= 4 else None
    x = Axis("learning rate", "log", (grid.rates[0] / 1.5, grid.rates[-1] * 1.5), few)
    panels = []
    for i in in_panels(len(grid.inits)):
        series: list[Series] = [Rule(grid.levels.trained)]
        for name, arm in grid.arms.items():
            there = ~np.isnan(arm.accuracy[i]).all(axis=1)
            if there.any():
                rates = np.asarray(grid.rates)[there].tolist()
                seeds_RS = arm.accuracy[i][there]
                style = style_of(name, grid.arms)
                mean, low, high = (
                    reduce(seeds_RS, axis=1).tolist()
                    for reduce in (np.nanmean, np.nanmin, np.nanmax)
                )
                series.append(Line(rates, mean, label_of(name), style, "line and points"))
                series.append(Band(rates, low, high, style.color))
        title = f"{init_label(grid)} {init_name(grid.inits[i])}"
        panels.append(
            Panel(
                f"rates-{i}",
                title,
                x,
                Axis(metric, bounds=(0, 1.02)),
                series,
                capital(title),
                page_height=260,
                has_tools=False,
            )
        )
    columns = min(4, len(panels))
    # A single panel would leave no room for the legend above it.
    inches = 2.6 * max(columns, 2), 2.2 * -(-len(panels) // columns) + 0.8
    return Figure(panels, inches, columns, "above", caption)


def widths_figure(found: Summary, caption: str) -> Figure:
    """Describe the decades of learning rate that train, with intervals, for each initialization.

    An arrow marks a width that the edge of the grid cuts off.
    """
    grid = found.grid
    series = []
    for k, (name, arm) in enumerate(found.arms.items()):
        shift = 0.16 * (k - (len(found.arms) - 1) / 2)
        estimates = [of_init.width for of_init in arm.inits]
        series.append(
            Intervals(
                x=[e.value for e in estimates],
                low=[e.low for e in estimates],
                high=[e.high for e in estimates],
                y=[i + shift for i in range(len(estimates))],
                texts=[decades(e) for e in estimates],
                at_least=[e.at_least for e in estimates],
                name=arm.label,
                style=style_of(name, found.arms),
            )
        )
    label = f"decades of learning rate that reach {grid.levels.trained:.2f}"
    panel = Panel(
        "widths",
        "",
        Axis(label, bounds=(-0.1, float(np.ptp(np.log10(grid.rates))) + 1)),
        Axis(_init_axis_label(grid), ticks=_init_ticks(grid)),
        series,
        "Width of the learning rates that train",
        "mean over seeds and 95% interval; an arrow where the edge of the grid cuts it off",
        page_height=190 + min(32 * len(grid.inits), 900),
        page_legend="above",
    )
    inches = (6, 1.6 + 0.36 * min(len(grid.inits), 2 * MOST_LABELS))
    return Figure([panel], inches, legend="above", caption=caption)


def importances_figure(found: Summary, caption: str) -> Figure:
    """Describe the share of the variance of accuracy that each parameter explains in each arm."""
    shares = {name: arm for name, arm in found.arms.items() if arm.importances}
    keys = dict.fromkeys(key for arm in shares.values() for key in arm.importances)
    names = {"lr": "learning rate", "init": init_label(found.grid)}
    names |= {key: key for key in keys if key not in names}
    series = [
        Bars(
            {names[key]: arm.importances.get(key, 0.0) for key in keys},
            [style_of(name, shares).color] * len(keys),
            ".2f",
            arm.label,
            is_hatched=k % 2 == 1,
        )
        for k, (name, arm) in enumerate(shares.items())
    ]
    counts = ", ".join(
        f"{min(arm.trials, MOST_FOR_IMPORTANCES):,} trials {arm.label}" for arm in shares.values()
    )
    panel = Panel(
        "importances",
        "",
        Axis("share of the variance\nof accuracy (fANOVA)", bounds=(0, 1.1)),
        Axis(),
        series,
        "What accuracy depends on",
        f"fANOVA, each arm by itself, of {counts}",
        page_height=260,
        page_legend="above",
    )
    inches = (5, 1.8 + 0.5 * len(keys))
    return Figure([panel], inches, legend="above", caption=f"{counts}\n{caption}")


def cells_json(
    grid: Grid, numbers: Mapping[int, GridTrial], links: Mapping[int, str], base: str
) -> Any:
    """Return the trials of each cell, which the page lists for a selected cell.

    Args:
        grid: lists the arms in the order of the figures.
        numbers: number of a trial in its study -> trial.
        links: number of a trial -> its directory relative to `base`, if that exists.
        base: path of the sweep's directory relative to the page.
    """
    arms, inits, rates = (
        {value: i for i, value in enumerate(values)}
        for values in (grid.arms, grid.inits, grid.rates)
    )

    def link(number: int) -> str | int | None:
        """Return 1 for a directory named by the number, which keeps the page small."""
        directory = links.get(number)
        return 1 if directory == str(number) else directory and quote(directory)

    return {
        "init_name": init_label(grid),
        "arms": [label_of(arm) for arm in grid.arms],
        "inits": [init_name(init) for init in grid.inits],
        "rates": [short_number(rate) for rate in grid.rates],
        "base": quote(base) + "/",
        "trials": [
            [
                number,
                arms[trial.arm],
                inits[trial.init],
                rates[trial.lr],
                trial.seed,
                round(trial.accuracy, 4),
                int(trial.diverged),
                link(number),
            ]
            for number, trial in numbers.items()
        ],
    }


def labeled(count: int) -> range:
    """Return the positions on an axis that have a label: all, or every n-th of many."""
    return range(0, count, -(-count // MOST_LABELS))


def in_panels(count: int) -> list[int]:
    """Return the initializations that have a panel: all, or evenly spaced ones of many."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_PANELS))})


def mean_over_seeds(values_IRS: Float[np.ndarray, "I R S"]) -> Float[np.ndarray, "I R"]:
    """Return the mean over seeds that are not missing, NaN if all are."""
    there = ~np.isnan(values_IRS)
    with np.errstate(invalid="ignore"):
        return np.where(there, values_IRS, 0).sum(axis=2) / there.sum(axis=2)


def most_common(outcomes_S: Iterable[GridOutcome]) -> GridOutcome:
    """Return the outcome of most seeds, of a tie the worse."""
    order = list(OUTCOMES)
    counts = Counter(outcomes_S)
    return max(counts, key=lambda outcome: (counts[outcome], order.index(outcome)))


def init_label(grid: Grid) -> str:
    """Return the label of the axis of initializations."""
    named = any(isinstance(init, str) for init in grid.inits)
    return "initialization" if named else "initial standard deviation"


def init_name(init: str | float) -> str:
    """Return an initialization as text."""
    return init if isinstance(init, str) else short_number(init)


def short_number(value: float) -> str:
    """Return a number with three digits at most: 0.00316, 0.1, 31.6, 100."""
    return f"{value:.3g}"


def short_share(value: float) -> str:
    """Return a share with two decimals and without the leading zero: .95, 1.0, -.20."""
    text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: -0.0 becomes 0.0
    return "1.0" if text == "1.00" else text.replace("0.", ".", 1)


def _numbers(values_IR: Float[np.ndarray, "I R"]) -> list[list[str]] | None:
    if values_IR.size > MOST_TEXTS:
        return None
    return [["" if np.isnan(v) else short_share(float(v)) for v in row] for row in values_IR]


def _cells(grid: Grid, id: str, title: str, heatmap: Heatmap, page_caption: str) -> Panel:
    """Return a panel with the cells of the grid."""
    rates: dict[float, str] = {i: short_number(grid.rates[i]) for i in labeled(len(grid.rates))}
    return Panel(
        id,
        title,
        Axis("learning rate", bounds=(-0.5, len(grid.rates) - 0.5), ticks=rates),
        Axis(_init_axis_label(grid), bounds=(-0.5, len(grid.inits) - 0.5), ticks=_init_ticks(grid)),
        [heatmap],
        capital(title).replace("\n", " "),
        page_caption,
        page_height=max(300, 130 + min(30 * len(grid.inits), 500)),
    )


def _init_axis_label(grid: Grid) -> str:
    """Return `init_label` in two lines, for figures that are low."""
    return init_label(grid).replace(" standard", "\nstandard", 1)


def _init_ticks(grid: Grid) -> dict[float, str]:
    return {i: init_name(grid.inits[i]) for i in labeled(len(grid.inits))}


def _inches(grid: Grid, panels: int) -> tuple[float, float]:
    """Return the size of a picture, from the number of cells and the length of names."""
    columns, rows = min(len(grid.rates), MOST_LABELS), min(len(grid.inits), MOST_LABELS)
    letters = min(max(len(init_name(init)) for init in grid.inits), 30)
    return 1.0 + 0.07 * letters + max(0.42 * columns, 1.6) * panels, 2.1 + max(0.32 * rows, 1.0)
