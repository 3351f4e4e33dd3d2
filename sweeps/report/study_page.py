"""The page of a study that is not a grid: its trials and Optuna's plots."""

from collections.abc import Sequence

from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.report.page_parts import counts_of, notes_of, provenance_of
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    Plot,
    html_table,
    places_for,
    render_page,
    tag,
)

# Rows of the tables: trials, and the best of them.
MOST_LISTED = 500
MOST_BEST = 10


def study_page(
    study: TrialTable, reason: str, drawn: Sequence[Plot], counts: int, notes: Sequence[str]
) -> str:
    """Return the page of a study that is not a grid: its trials and Optuna's plots.

    Args:
        study: its trials.
        reason: why it is not a grid.
        drawn: Optuna's plots.
        counts: number of trials in these plots.
        notes: shown first.
    """
    complete = [row for row in study.rows if row.is_complete]
    lead = (
        f"{len(complete):,} of {len(study.rows):,} trials have a result."
        if complete
        else f"No trial has finished: of {len(study.rows):,} trials none has a result to report."
    )
    body = [
        tag("h1", f"Study {study.name}"),
        tag("p", lead, class_="lead"),
        *([tag("p", f"There is no map of what trains: {reason}.")] if reason else []),
        *notes_of(notes),
        *([tag("h2", "Best trials"), _trials(study, _best(study, complete))] if complete else []),
        *([tag("h2", "Optuna's plots"), _plots_note(counts, len(complete))] if drawn else []),
        *([places_for(drawn, "32rem")] if drawn else []),
        *counts_of(study),
        *([tag("h2", "Trials"), _trials(study, study.rows)] if study.rows else []),
        *provenance_of(study),
    ]
    return render_page(f"Study {study.name}", body, drawn)


def _plots_note(counted: int, complete: int) -> Html:
    text = "By optuna.visualization"
    text += (
        f", of {counted:,} of {complete:,} trials, evenly chosen." if counted < complete else "."
    )
    return tag("p", text, class_="soft")


def _trials(study: TrialTable, rows: Sequence[TrialRow]) -> Html:
    values = len(study.directions)
    names = list(dict.fromkeys(key for row in study.rows for key in row.params))
    made: list[list[Content]] = []
    for row in rows[:MOST_LISTED]:
        numbers = [f"{value:.6g}" for value in row.values] or ["–"] * values
        params = [str(row.params.get(name, "–")) for name in names]
        made.append([str(row.number), row.state.lower(), *numbers, *params])
    heads = (
        ["value"] if values == 1 else [f"value {i} ({d})" for i, d in enumerate(study.directions)]
    )
    more = f"The first {MOST_LISTED} of {len(rows):,}" if len(rows) > MOST_LISTED else ""
    return html_table(["trial", "state", *heads, *names], made, more)


def _best(study: TrialTable, complete: Sequence[TrialRow]) -> list[TrialRow]:
    if len(study.directions) > 1:
        return best_trials(complete, study.optuna_directions)[:MOST_BEST]
    sign = -1 if study.directions[0] == "maximize" else 1
    return sorted(complete, key=lambda row: (sign * row.values[0], row.number))[:MOST_BEST]
