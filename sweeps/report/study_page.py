"""The page of a study that is not a grid: its best trials, its figures, and all trials."""

from collections.abc import Mapping, Sequence

from bn_lightning.sweeps.analysis.metric_arms import MetricArm
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
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    html_table,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of
from bn_lightning.sweeps.report.study_figures import drawn_trials

_HEADINGS = {
    "map": "Map",
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
    arms: tuple[Sequence[MetricArm], Sequence[str]] = ((), ()),
) -> str:
    """Return the page of a study that is not a grid.

    Args:
        study: its trials.
        reason: why it is not a grid.
        figures: file name -> figure, as `study_figures` returns them.
        links: number of a trial -> its directory relative to the page, if that exists.
        notes: shown first.
        arms: the arms, and the sentences on them.
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
        *[tag("p", text, class_="lead") for text in arms[1]],
        *notes_of(notes),
        *(_arms(study, arms[0]) if arms[0] else []),
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


def _arms(study: TrialTable, arms: Sequence[MetricArm]) -> list[Html]:
    """Return a table with the best point of each arm."""
    (metric,), (direction,) = study.value_names, study.directions
    tests = list(arms[0].tests)
    rows: list[list[Content]] = [
        [
            arm.label,
            f"{arm.trials:,}",
            f"{arm.mean:.4g}",
            arm.best.text(".4g"),
            *(arm.tests[name].text(".4g") for name in tests),
            f"{arm.best.n}",
            arm.point_text or "–",
        ]
        for arm in arms
    ]
    head = ["arm", "trials", f"{metric}, mean of all", f"{metric}, best", *tests, "seeds", "point"]
    caption = (
        f"{metric} is {direction}d. Best: the point with the best mean over its seeds, ± standard "
        "deviation, with the test metrics there"
    )
    return [tag("h2", "Arms"), html_table(head, rows, caption, "text")]


def _remarks(study: TrialTable, name: str) -> list[Html]:
    """Return what a reader of a figure must know."""
    texts = []
    drawn, count = len(drawn_trials(study)), len(study.complete)
    if name not in ("importances", "map") and drawn < count:
        texts.append(f"{drawn:,} of {count:,} trials with a result, evenly chosen.")
    if name == "importances" and is_planned(study.about) is False:
        texts.append(
            "The sampler chose the points by their results, so these shares are those of the "
            "region that it searched, not of the whole space."
        )
    return [tag("p", text, class_="soft") for text in texts]
