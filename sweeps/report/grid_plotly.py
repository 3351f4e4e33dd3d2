"""The interactive figures of a grid, as plotly's JSON."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from bn_lightning.sweeps.analysis.arms import label_of, style_of
from bn_lightning.sweeps.analysis.summary import Findings, capital, decades
from bn_lightning.sweeps.analysis.tolerance import Grid, Trial
from bn_lightning.sweeps.report.grid_matplotlib import (
    MOST_TEXTS,
    OUTCOMES,
    in_panels,
    init_label,
    init_name,
    labelled,
    mean_over_seeds,
    most_common,
    short,
    short_number,
)
from bn_lightning.sweeps.report.page_skeleton import Plot
from bn_lightning.sweeps.report.traces import MARGIN, MARKERS, band, line, rounded

# Learning rates of which every one has room for a level label below a small plot.
MOST_LEVEL_LABELS = 4


def cells_json(
    grid: Grid, numbers: Mapping[int, Trial], links: Mapping[int, str], base: str
) -> Any:
    """The trials of each cell, for what the page shows when one is pointed at.

    Args:
        grid: which lists arms in the order in which they are shown.
        numbers: number of a trial in its study -> trial.
        links: number -> directory, relative to `base`, of those that are there.
        base: path of the sweep's directory as seen from the page.
    """
    arms, inits, rates = (
        {value: i for i, value in enumerate(values)}
        for values in (grid.arms, grid.inits, grid.rates)
    )

    def link(number: int) -> str | int | None:
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


def heatmaps(found: Findings, metric: str) -> list[Plot]:
    """Mean accuracy of each cell, a plot for each arm, and the differences that were computed."""
    grid = found.grid
    names = list(grid.arms)
    means = {name: mean_over_seeds(arm.accuracy) for name, arm in grid.arms.items()}
    plots = [
        Plot(
            f"accuracy-{i}",
            capital(label_of(name)),
            [
                _cells(means[name], "Viridis", (0, 1)),
                *_failures(np.asarray(grid.arms[name].diverged.any(axis=2))),
            ],
            _grid_layout(grid),
            f"mean {metric}; striped: a seed diverged",
            (i,),
        )
        for i, name in enumerate(names)
    ]
    scale = [[k / 10, to_hex(colormaps["PuOr_r"](k / 10))] for k in range(11)]
    for k, pair in enumerate(found.comparisons):
        plots.append(
            Plot(
                f"difference-{k}",
                f"{capital(label_of(pair.first))} minus {label_of(pair.second)}",
                [_cells(means[pair.first] - means[pair.second], scale, (-1, 1))],
                _grid_layout(grid),
                f"difference of {metric}",
                (names.index(pair.first), names.index(pair.second)),
            )
        )
    return plots


def outcomes(found: Findings) -> list[Plot]:
    """What became of most seeds of each cell, a plot for each arm; of a tie, the worse."""
    grid = found.grid
    kinds = list(OUTCOMES)
    scale = []
    for k, kind in enumerate(kinds):
        colour = OUTCOMES[kind][0]
        scale += [[k / len(kinds), colour], [(k + 1) / len(kinds), colour]]
    plots = []
    for i, (name, arm) in enumerate(grid.arms.items()):
        found_IRS = arm.outcomes()
        common = [[most_common(cell.tolist()) for cell in row] for row in found_IRS]
        plots.append(
            Plot(
                f"outcome-{i}",
                capital(label_of(name)),
                [
                    {
                        "type": "heatmap",
                        "z": [[kinds.index(kind) for kind in row] for row in common],
                        "text": [[OUTCOMES[kind][1] for kind in row] for row in common],
                        "texttemplate": "%{text}"
                        if len(grid.rates) * len(grid.inits) <= MOST_TEXTS
                        else "",
                        "textfont": {"size": 10},
                        "hovertemplate": "%{hovertext}<extra></extra>",
                        "colorscale": scale,
                        "zmin": -0.5,
                        "zmax": len(kinds) - 0.5,
                        "xgap": 1,
                        "ygap": 1,
                        "showscale": False,
                    }
                ],
                _grid_layout(grid),
                "; ".join(f"{letter}: {kind}" for kind, (_, letter) in OUTCOMES.items()),
                (i,),
            )
        )
    return plots


def rates(found: Findings, metric: str) -> list[Plot]:
    """Accuracy against learning rate, a plot for each initialisation, or for evenly chosen ones."""
    grid = found.grid
    ticks: dict[str, Any] = {"exponentformat": "power"}
    if len(grid.rates) <= MOST_LEVEL_LABELS:
        texts = [short_number(rate) for rate in grid.rates]
        ticks = {"tickvals": list(grid.rates), "ticktext": texts}
    plots = []
    for i in in_panels(len(grid.inits)):
        traces: list[dict[str, Any]] = []
        for name, arm in grid.arms.items():
            accuracy_RS = arm.accuracy[i]
            there = ~np.isnan(accuracy_RS).all(axis=1)
            if not there.any():
                continue
            x = np.asarray(grid.rates)[there]
            seeds = accuracy_RS[there]
            traces += line(
                x, np.nanmean(seeds, axis=1), label_of(name), style_of(name, grid.arms), "markers+"
            )
            traces += band(x, np.nanmin(seeds, axis=1), np.nanmax(seeds, axis=1), traces[-1])
        layout = {
            "height": 260,
            "margin": {**MARGIN, "l": 45},
            "showlegend": False,
            "xaxis": {"type": "log", "title": {"text": "learning rate"}, **ticks},
            "yaxis": {"range": [0, 1.02], "title": {"text": metric}},
            "shapes": [_rule(grid.levels.trained)],
        }
        init = grid.inits[i]
        name = init if isinstance(init, str) else f"Standard deviation {init_name(init)}"
        plots.append(Plot(f"rates-{i}", name, traces, layout, has_tools=False))
    return plots


def widths(found: Findings) -> Plot:
    """Decades of learning rate that train, for each initialisation, with intervals."""
    grid = found.grid
    traces = []
    for k, (name, arm) in enumerate(found.arms.items()):
        style = style_of(name, found.arms)
        shift = 0.16 * (k - (len(found.arms) - 1) / 2)
        estimates = [of_init.width for of_init in arm.inits]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": arm.label,
                "x": [rounded(e.value) for e in estimates],
                "y": [i + shift for i in range(len(estimates))],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [rounded(e.high - e.value) for e in estimates],
                    "arrayminus": [rounded(e.value - e.low) for e in estimates],
                    "color": style.colour,
                },
                "marker": {
                    "color": style.colour,
                    "size": 9,
                    "symbol": [
                        "triangle-right" if e.at_least else MARKERS[style.marker] for e in estimates
                    ],
                },
                "hovertext": [decades(e) for e in estimates],
                "hovertemplate": "%{hovertext}",
            }
        )
    layout = {
        "height": 190 + min(32 * len(grid.inits), 900),
        "margin": {**MARGIN, "l": 90, "t": 40},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "xaxis": {
            "title": {"text": f"decades of learning rate that reach {grid.levels.trained:.2f}"},
            "rangemode": "tozero",
        },
        "yaxis": {
            "tickvals": list(labelled(len(grid.inits))),
            "ticktext": [init_name(grid.inits[i]) for i in labelled(len(grid.inits))],
            "title": {"text": _init_axis(grid), "font": {"size": 12}},
            "automargin": True,
        },
    }
    return Plot(
        "widths",
        "Width of the learning rates that train",
        traces,
        layout,
        "mean over seeds and 95% interval; an arrow where the edge of the grid cuts it off",
    )


def importances(found: Findings) -> list[Plot]:
    """Share of the variance of accuracy that each parameter explains; none without shares."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": arm.label,
            "x": [rounded(share) for share in arm.importances.values()],
            "y": list(arm.importances),
            "marker": {
                "color": style_of(name, found.arms).colour,
                "pattern": {"shape": ("", "/")[k % 2]},
            },
            "texttemplate": "%{x:.2f}",
            "textposition": "outside",
            "cliponaxis": False,
        }
        for k, (name, arm) in enumerate(found.arms.items())
        if arm.importances
    ]
    layout = {
        "height": 260,
        "margin": {**MARGIN, "l": 50, "t": 40, "r": 40},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "share of the variance of accuracy"}, "range": [0, 1.05]},
        "yaxis": {},
    }
    title = "What accuracy depends on"
    return [Plot("importances", title, traces, layout, "fANOVA, each arm by itself")] * bool(traces)


def _cells(values_IR: np.ndarray, scale: Any, bounds: tuple[float, float]) -> dict[str, Any]:
    has_texts = values_IR.size <= MOST_TEXTS
    return {
        "type": "heatmap",
        "z": [[rounded(value) for value in row] for row in values_IR],
        "text": [["" if math.isnan(v) else short(v) for v in row] for row in values_IR]
        if has_texts
        else None,
        "texttemplate": "%{text}" if has_texts else "",
        "textfont": {"size": 9},
        "hovertemplate": "%{hovertext}<extra></extra>",
        "colorscale": scale,
        "zmin": bounds[0],
        "zmax": bounds[1],
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "thickness": 10,
            "len": 1,
            "outlinewidth": 0,
            "xpad": 4,
            "ticklabeloverflow": "allow",
        },
    }


def _failures(diverged_IR: np.ndarray) -> list[dict[str, Any]]:
    places = np.argwhere(diverged_IR)
    if not len(places):
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": places[:, 1].tolist(),
            "y": places[:, 0].tolist(),
            "marker": {"symbol": "line-ne", "size": 18, "line": {"color": "#ffffff", "width": 1.5}},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def _grid_layout(grid: Grid) -> dict[str, Any]:
    places, init_places = labelled(len(grid.rates)), labelled(len(grid.inits))
    names = [init_name(grid.inits[i]) for i in init_places]
    return {
        "height": max(300, 130 + min(30 * len(grid.inits), 500)),
        # By the length of the names: to let plotly measure them doubles the time to draw.
        "margin": {**MARGIN, "l": 45 + 7 * min(max(map(len, names)), 24), "b": 85},
        "dragmode": False,
        "xaxis": {
            "tickvals": list(places),
            "ticktext": [short_number(grid.rates[i]) for i in places],
            "tickangle": 0 if len(places) <= MOST_LEVEL_LABELS else -90,
            "title": {"text": "learning rate", "standoff": 6},
            "range": [-0.5, len(grid.rates) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": {
            "tickvals": list(init_places),
            "ticktext": names,
            "title": {"text": _init_axis(grid), "standoff": 6, "font": {"size": 12}},
            "range": [-0.5, len(grid.inits) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
    }


def _init_axis(grid: Grid) -> str:
    """Shorter than `init_label`, for figures that may be low."""
    named = any(isinstance(init, str) for init in grid.inits)
    return "initialisation" if named else "std of the initial weights"


def _rule(y: float) -> dict[str, Any]:
    line = {"color": "#888888", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}
