"""Optuna's plots of a study that is not a grid."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.visualization import (
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_pareto_front,
    plot_slice,
)

from bn_lightning.sweeps.analysis.memory_study import memory_study
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable
from bn_lightning.sweeps.report.page_skeleton import Plot

MOST_TRIALS = 1000
"""Of more trials, evenly spaced ones are drawn, to keep the page small."""

_Draw = Callable[[optuna.Study], Any]
_OF_VALUES: tuple[tuple[str, str, _Draw], ...] = (("pareto", "Pareto front", plot_pareto_front),)
_OF_A_VALUE: tuple[tuple[str, str, _Draw], ...] = (
    ("history", "History", plot_optimization_history),
    ("slice", "Slices", plot_slice),
    ("parallel", "Parallel coordinates", plot_parallel_coordinate),
)


def optuna_plots(table: TrialTable) -> tuple[list[Plot], int]:
    """Return history, slices and parallel coordinates, or the Pareto front of several values.

    Returns:
        The plots, and the number of trials in them.
    """
    complete = [row for row in table.rows if row.is_complete]
    chosen = complete[:: -(-len(complete) // MOST_TRIALS)] if complete else []
    if not chosen or not any(row.params for row in chosen):
        return [], len(chosen)
    study = study_of(table, chosen)
    if len(table.directions) > 1:
        made = _OF_VALUES if len(table.directions) <= 3 else ()
    else:
        made = _OF_A_VALUE
    return [_plot(name, title, draw, study) for name, title, draw in made], len(chosen)


def study_of(table: TrialTable, rows: Sequence[TrialRow]) -> optuna.Study:
    """Return a study in memory with these complete trials."""
    study = memory_study(table.optuna_directions)
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    distributions = {
        name: _distribution([row.params[name] for row in rows if name in row.params])
        for name in names
    }
    study.add_trials(
        [
            optuna.trial.create_trial(
                values=list(row.values),
                params=dict(row.params),
                distributions={name: distributions[name] for name in row.params},
            )
            for row in rows
        ]
    )
    return study


def _distribution(values: list[Cell]) -> BaseDistribution:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not all(math.isfinite(number) for number in numbers):
        return CategoricalDistribution(list(dict.fromkeys(values)))
    low, high = min(numbers), max(numbers)
    is_log = low > 0 and high / low >= 100
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _plot(name: str, title: str, draw: _Draw, study: optuna.Study) -> Plot:
    figure = draw(study).to_plotly_json()
    layout = {
        key: value for key, value in figure["layout"].items() if key not in ("template", "title")
    }
    layout |= {"height": 420, "margin": {"l": 60, "r": 20, "t": 30, "b": 80}}
    return Plot(
        f"optuna-{name}", title, [_plain(trace) for trace in figure["data"]], _plain(layout)
    )


def _plain(content: Any) -> Any:
    """Return the content with Python's lists and numbers instead of tuples and NumPy's types."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content.tolist() if hasattr(content, "tolist") else content
