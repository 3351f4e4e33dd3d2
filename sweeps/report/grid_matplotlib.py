"""The pictures of a tolerance grid: what trains over learning rates and initialisations.

Accuracies of both arms share one scale, viridis from 0 to 1, which keeps its order in grey and for
the colour-blind; what a colour says also stands in the cell as a number or a letter. Every axis of
rates and standard deviations is logarithmic.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from bn_lightning.sweeps.analysis.arms import style_of
from bn_lightning.sweeps.analysis.tolerance import Arm, Grid, Outcome, estimate, widths
from bn_lightning.sweeps.report.run_matplotlib import literal

# Of larger grids: cells without numbers in them, fewer labels, and panels of fewer initialisations.
MOST_TEXTS, MOST_LABELS, MOST_PANELS = 400, 16, 12

_MOST_LETTERS = 30  # of a name

# Okabe & Ito's colours, apart in grey too, and a letter for each.
OUTCOMES = {
    Outcome.TRAINED: ("#009E73", "T"),
    Outcome.SLOW: ("#F0E442", "s"),
    Outcome.CHANCE: ("#CCCCCC", "c"),
    Outcome.DIVERGED: ("#D55E00", "N"),
    Outcome.MISSING: ("#FFFFFF", "?"),
}


def heatmaps_figure(grid: Grid, arms: Mapping[str, str], caption: str) -> Figure:
    """Mean accuracy over seeds of each cell, an arm a panel, and the first arm minus the second.

    Cells in which a seed diverged are hatched; missing ones are empty.

    Args:
        grid: with at least one arm.
        arms: name in the grid -> title; two of them get a panel for their difference.
        caption: data, budget and number of seeds, below the panels.
    """
    means = {name: mean_over_seeds(grid.arms[name].accuracy) for name in arms}
    panels = len(arms) + (len(arms) == 2)
    figure = Figure(
        figsize=_size(grid, panels, 0.42, 0.32),
        layout="constrained",
    )
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for panel, (name, title) in zip(axes, arms.items(), strict=False):
        image = _draw_cells(panel, grid, means[name], "viridis", 0, 1)
        _hatch(panel, grid.arms[name])
        panel.set_title(drawn_text(title))
    figure.colorbar(image, ax=axes[len(arms) - 1], label="accuracy", pad=0.02)
    if len(arms) == 2:
        first, second = means.values()
        image = _draw_cells(axes[2], grid, first - second, "PuOr_r", -1, 1)
        axes[2].set_title("difference")
        figure.colorbar(image, ax=axes[2], label="difference of accuracy", pad=0.02)
    axes[0].set_ylabel(init_label(grid))
    _caption(figure, "learning rate", caption)
    return figure


def outcomes_figure(grid: Grid, arms: Mapping[str, str], caption: str) -> Figure:
    """What became of most seeds of each cell, an arm a panel; of a tie, the worse.

    Args:
        grid: with at least one arm.
        arms: name in the grid -> title.
        caption: data, budget and number of seeds, below the panels.
    """
    figure = Figure(
        figsize=_size(grid, len(arms), 0.34, 0.3),
        layout="constrained",
    )
    axes = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for panel, (name, title) in zip(axes, arms.items(), strict=True):
        outcomes = grid.arms[name].outcomes()
        for i, r in np.ndindex(outcomes.shape[:2]):
            colour, letter = OUTCOMES[most_common(outcomes[i, r].tolist())]
            panel.add_patch(
                Rectangle((r - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="white")
            )
            if _has_texts(grid):
                panel.text(r, i, letter, ha="center", va="center", fontsize=7)
        _label_axes(panel, grid)
        panel.set_title(drawn_text(title))
    axes[0].set_ylabel(init_label(grid))
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="grey", label=f"{letter}: {outcome}")
            for outcome, (colour, letter) in OUTCOMES.items()
        ],
        loc="outside upper center",
        ncols=len(OUTCOMES),
        frameon=False,
    )
    _caption(figure, "learning rate", caption)
    return figure


def rates_figure(grid: Grid, arms: Mapping[str, str], caption: str) -> Figure:
    """Accuracy against learning rate, a panel for each initialisation, or for evenly chosen ones.

    Lines are means over seeds, bands reach from the lowest seed to the highest.

    Args:
        grid: with at least one arm.
        arms: name in the grid -> label.
        caption: data, budget and number of seeds, below the panels.
    """
    chosen = in_panels(len(grid.inits))
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    # One panel alone would leave no room for the legend above it.
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.2 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, i in zip(panels, chosen, strict=False):
        for name, label in arms.items():
            accuracy_RS = grid.arms[name].accuracy[i]
            there = ~np.isnan(accuracy_RS).all(axis=1)
            if there.any():
                rates = np.asarray(grid.rates)[there]
                found = accuracy_RS[there]
                style = style_of(name, arms)
                panel.plot(
                    rates,
                    np.nanmean(found, axis=1),
                    color=style.colour,
                    linestyle=style.line,
                    marker=style.marker,
                    markersize=3,
                    label=drawn_text(label),
                )
                panel.fill_between(
                    rates,
                    np.nanmin(found, axis=1),
                    np.nanmax(found, axis=1),
                    color=style.colour,
                    alpha=0.2,
                    linewidth=0,
                )
        panel.axhline(grid.levels.trained, color="grey", linewidth=0.6)
        panel.set_xscale("log")
        panel.set_ylim(0, 1.02)
        panel.set_title(drawn_text(init_name(grid.inits[i])), fontsize="small")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels)[len(chosen) :]:
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(arms), frameon=False)
    figure.supylabel("accuracy", fontsize="medium")
    _caption(figure, "learning rate", caption)
    return figure


def widths_figure(grid: Grid, arms: Mapping[str, str], caption: str) -> Figure:
    """Decades of learning rate that train, for each initialisation, with intervals over seeds.

    An arrow marks a width that the edge of the grid cuts off.

    Args:
        grid: with at least one arm and two rates.
        arms: name in the grid -> label.
        caption: data, budget and number of seeds, below the axes.
    """
    figure = Figure(
        figsize=(6, 1.6 + 0.36 * min(len(grid.inits), 2 * MOST_LABELS)), layout="constrained"
    )
    axes = figure.subplots()
    trained = grid.levels.trained
    for k, name in enumerate(arms):
        width_IS, censored_IS = widths(grid.arms[name].accuracy, grid.rates, trained)
        shift = 0.16 * (k - (len(arms) - 1) / 2)
        style = style_of(name, arms)
        for i in range(len(grid.inits)):
            found = estimate(width_IS[i])
            y = i + shift
            axes.plot([found.low, found.high], [y, y], color=style.colour, linewidth=1.5)
            axes.plot(found.value, y, style.marker, color=style.colour, markersize=5)
            if censored_IS[i].any():
                axes.annotate(
                    "",
                    (found.value + 0.28, y),
                    (found.value, y),
                    arrowprops={"arrowstyle": "->", "color": style.colour},
                )
    places = labelled(len(grid.inits))
    axes.set_yticks(places, [drawn_text(init_name(grid.inits[i])) for i in places])
    axes.set_ylabel(init_label(grid))
    axes.set_xlim(-0.1, np.ptp(np.log10(grid.rates)) + 1)
    _caption(figure, f"decades of learning rate that reach {trained:.2f}", caption)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[
            Line2D([], [], color=style.colour, marker=style.marker, label=drawn_text(label))
            for style, label in ((style_of(name, arms), label) for name, label in arms.items())
        ],
        loc="outside upper center",
        ncols=len(arms),
        frameon=False,
    )
    return figure


def importances_figure(
    shares: Mapping[str, Mapping[str, float]], arms: Mapping[str, str], caption: str
) -> Figure:
    """Share of the variance of accuracy that each parameter explains, a bar for each arm.

    Args:
        shares: arm -> parameter -> share, as `tolerance.importances` gives it.
        arms: name -> label.
        caption: data, budget and number of seeds, below the axes.
    """
    names = list(dict.fromkeys(name for of_arm in shares.values() for name in of_arm))
    figure = Figure(figsize=(5, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(arms), 1)
    for k, (arm, label) in enumerate(arms.items()):
        values = [shares.get(arm, {}).get(name, 0.0) for name in names]
        places = [i + height * (k - (len(arms) - 1) / 2) for i in range(len(names))]
        bars = axes.barh(
            places,
            values,
            height,
            color=style_of(arm, arms).colour,
            hatch=("", "//")[k % 2],
            label=drawn_text(label),
        )
        axes.bar_label(bars, fmt="{:.2f}", padding=2, fontsize="small")
    axes.set_yticks(range(len(names)), [drawn_text(name) for name in names])
    axes.set_xlim(0, 1.1)
    _caption(figure, "share of the variance of accuracy (fANOVA)", caption)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def labelled(count: int) -> range:
    """Which of the places on an axis have a label: all, or every n-th of many."""
    return range(0, count, -(-count // MOST_LABELS))


def in_panels(count: int) -> list[int]:
    """Which initialisations have a panel of their own: all, or evenly chosen ones of many."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_PANELS))})


def _size(grid: Grid, panels: int, width: float, height: float) -> tuple[float, float]:
    """Inches, for cells of this size, smaller ones in a larger grid, and for the names beside."""
    columns, rows = min(len(grid.rates), MOST_LABELS), min(len(grid.inits), MOST_LABELS)
    letters = max(len(drawn_text(init_name(init))) for init in grid.inits)
    return 1.0 + 0.07 * letters + max(width * columns, 1.6) * panels, 2.1 + max(height * rows, 1.0)


def _has_texts(grid: Grid) -> bool:
    return len(grid.rates) * len(grid.inits) <= MOST_TEXTS


def _caption(figure: Figure, label: str, caption: str) -> None:
    figure.supxlabel(literal(f"{label}\n{caption}"), fontsize="medium", wrap=True)


def _draw_cells(
    axes: Axes, grid: Grid, values_IR: Float[np.ndarray, "I R"], name: str, low: float, high: float
) -> AxesImage:
    scale = colormaps[name]
    image = axes.imshow(values_IR, cmap=scale, vmin=low, vmax=high, aspect="auto")
    for i, r in np.ndindex(values_IR.shape):
        value = float(values_IR[i, r])
        if _has_texts(grid) and not np.isnan(value):
            red, green, blue, _ = scale((value - low) / (high - low))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                r,
                i,
                short(value),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )
    _label_axes(axes, grid)
    return image


def _hatch(axes: Axes, arm: Arm) -> None:
    for i, r in np.argwhere(arm.diverged.any(axis=2)):
        axes.add_patch(
            Rectangle((r - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor="white", lw=0)
        )


def _label_axes(axes: Axes, grid: Grid) -> None:
    axes.set_xlim(-0.5, len(grid.rates) - 0.5)
    axes.set_ylim(-0.5, len(grid.inits) - 0.5)
    places = labelled(len(grid.rates))
    axes.set_xticks(places, [short_number(grid.rates[i]) for i in places], rotation=90)
    places = labelled(len(grid.inits))
    axes.set_yticks(places, [drawn_text(init_name(grid.inits[i])) for i in places])
    axes.tick_params(length=0, labelsize="small")
    axes.spines[:].set_visible(False)


def mean_over_seeds(values_IRS: Float[np.ndarray, "I R S"]) -> Float[np.ndarray, "I R"]:
    """The mean over the seeds that are there; NaN where none is."""
    there = ~np.isnan(values_IRS)
    with np.errstate(invalid="ignore"):
        return np.where(there, values_IRS, 0).sum(axis=2) / there.sum(axis=2)


def most_common(outcomes_S: Iterable[Outcome]) -> Outcome:
    """What became of most seeds; of a tie, the worse."""
    worst_first = list(OUTCOMES)[::-1]
    counts = Counter(outcomes_S)
    return max(counts, key=lambda outcome: (counts[outcome], -worst_first.index(outcome)))


def init_label(grid: Grid) -> str:
    """What the axis of initialisations is called."""
    named = any(isinstance(init, str) for init in grid.inits)
    return "initialisation" if named else "standard deviation of the initial weights"


def init_name(init: str | float) -> str:
    """An initialisation as its axis and captions have it."""
    return init if isinstance(init, str) else short_number(init)


def drawn_text(text: str) -> str:
    """A name from a configuration as matplotlib may draw it: not too long, and no mathematics."""
    text = text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
    return literal(text)


def short_number(value: float) -> str:
    """Three digits at most: 0.00316, 0.1, 31.6, 100."""
    return f"{value:.3g}"


def short(value: float) -> str:
    """Two decimals without the leading zero: .95, 1.0, -.20."""
    text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before nothing
    return "1.0" if text == "1.00" else text.replace("0.", ".", 1)
