"""The page of a study that is not a grid: its best trials, its figures, and all trials."""

from collections.abc import Mapping, Sequence

from bn_lightning.sweeps.analysis.provenance import is_planned
from bn_lightning.sweeps.analysis.trials import TrialTable
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.page_parts import (
    best_of,
    counts_of,
    notes_of,
    provenance_of,
    trials_table,
)
from bn_lightning.sweeps.report.page_skeleton import Html, places_for, render_page, tag
from bn_lightning.sweeps.report.plotly_renderer import plots_of
from bn_lightning.sweeps.report.study_figures import drawn_trials

_HEADINGS = {
    "history": "History",
    "parameters": "Parameters",
    "importances": "Importances",
    "pareto": "Pareto front",
}


def study_page(
    study: TrialTable,
    reason: str,
    figures: Mapping[str, Figure],
    links: Mapping[int, str],
    notes: Sequence[str],
) -> str:
    """Return the page of a study that is not a grid.

    Args:
        study: its trials.
        reason: why it is not a grid.
        figures: file name -> figure, as `study_figures` returns them.
        links: number of a trial -> its directory relative to the page, if that exists.
        notes: shown first.
    """
    complete = study.complete
    lead = (
        f"{len(complete):,} of {len(study.rows):,} trials have a result."
        if complete
        else f"No trial has finished: of {len(study.rows):,} trials none has a result to report."
    )
    plots = {name: plots_of(figure) for name, figure in figures.items()}
    body = [
        tag("h1", f"Study {study.name}"),
        tag("p", lead, class_="lead"),
        *([tag("p", f"There is no map of what trains: {reason}.")] if reason else []),
        *notes_of(notes),
        *(best_of(study, links) if complete else []),
    ]
    for name, drawn in plots.items():
        body.append(tag("h2", _HEADINGS[name]))
        body += _remarks(study, name)
        body.append(places_for(drawn, "18rem" if name == "parameters" else "32rem"))
    body += [
        *counts_of(study),
        *([tag("h2", "Trials"), trials_table(study, study.rows, links)] if study.rows else []),
        *provenance_of(study),
    ]
    every = [plot for drawn in plots.values() for plot in drawn]
    return render_page(f"Study {study.name}", body, every)


def _remarks(study: TrialTable, name: str) -> list[Html]:
    """Return what a reader of a figure must know."""
    texts = []
    drawn, count = len(drawn_trials(study)), len(study.complete)
    if name != "importances" and drawn < count:
        texts.append(f"{drawn:,} of {count:,} trials with a result, evenly chosen.")
    if name == "importances" and is_planned(study.about) is False:
        texts.append(
            "The sampler chose the points by their results, so these shares are those of the "
            "region that it searched, not of the whole space."
        )
    return [tag("p", text, class_="soft") for text in texts]
