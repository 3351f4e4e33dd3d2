"""The text of a report's pages: of a grid, of another study, and of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.runs.record import training_seconds
from bn_lightning.sweeps.analysis.compared_runs import (
    ComparedRun,
    runtime_sentences,
    width_growth,
)
from bn_lightning.sweeps.analysis.paper_curves import SOURCE
from bn_lightning.sweeps.analysis.summary import (
    Summary,
    decades,
    measures_of,
    plain,
    sentences,
    shown,
)
from bn_lightning.sweeps.analysis.tolerance import Levels
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.grid_figures import init_label, init_name
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    Plot,
    definitions,
    html_table,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of

# Rows of the page's tables: failed trials, trials of a study that is not a grid, and its best.
MOST_FAILED = 50
MOST_LISTED = 500
MOST_BEST = 10

_HELP = "Point at a cell, click it, or reach a map by the tab key and move by the arrow keys."


def grid_page(
    study: TrialTable,
    found: Summary,
    figures: Mapping[str, Figure],
    cells: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """Return the page of a study of learning rates and initializations.

    Args:
        study: its trials.
        found: its numbers.
        figures: file name -> figure, as `grid_figures` returns them.
        cells: as `cells_json` returns them.
        notes: shown first.
    """
    plots = {name: plots_of(figure) for name, figure in figures.items()}
    rates, shares = plots.get("rates", []), plots.get("importances", [])
    widths = plots.get("widths", [])
    body = [
        tag("h1", f"What trains: {study.name}"),
        *[tag("p", text, class_="lead") for text in sentences(found)],
        *_notes([*notes, *found.notes]),
        tag("p", _budget_line(study, found), class_="soft"),
        _measures(found),
        tag("h2", "Accuracy over learning rate and initialisation"),
        tag("p", _HELP, class_="soft screen"),
        places_for(plots["accuracy"]),
        tag("div", tag("span", _HELP), id="cell", aria_live="polite", class_="screen"),
        tag("h2", "What became of the trials"),
        places_for(plots["outcomes"]),
        *([tag("h2", "Accuracy against learning rate")] if rates else []),
        *([_rates_note(found, rates), places_for(rates, "17rem")] if rates else []),
        *([tag("h2", "Tolerance"), places_for(widths)] if widths else []),
        _inits(found, bool(widths)),
        *([tag("h2", "Importances"), places_for(shares)] if shares else []),
        *_counts(study),
        _all_trials(found),
        *_measured(study, found.grid.levels),
    ]
    drawn = [plot for several in plots.values() for plot in several]
    return render_page(f"What trains: {study.name}", body, drawn, cells)


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
        *_notes(notes),
        *([tag("h2", "Best trials"), _trials(study, _best(study, complete))] if complete else []),
        *([tag("h2", "Optuna's plots"), _plots_note(counts, len(complete))] if drawn else []),
        *([places_for(drawn, "32rem")] if drawn else []),
        *_counts(study),
        *([tag("h2", "Trials"), _trials(study, study.rows)] if study.rows else []),
        *_measured(study),
    ]
    return render_page(f"Study {study.name}", body, drawn)


def runs_page(
    runs: Sequence[ComparedRun],
    study: TrialTable,
    figures: Mapping[str, Figure],
    with_paper: bool,
    notes: Sequence[str],
) -> str:
    """Return the page of runs side by side.

    Args:
        runs: at least one.
        study: the runs as a table.
        figures: file name -> figure.
        with_paper: whether the paper's curves are in the figures.
        notes: shown first.
    """
    drawn = [plot for figure in figures.values() for plot in plots_of(figure)]
    rows: list[list[Content]] = []
    for run in runs:
        record, metrics = run.record, run.record.get("metrics") or {}
        growth = width_growth(run)
        rows.append(
            [
                run.label,
                str(record["status"]),
                _number(record.get("steps"), ",.0f"),
                _number(metrics.get("test/accuracy"), ".4f"),
                _number(metrics.get("test/loss"), ".4f"),
                _number(growth, ".3g"),
                _number(training_seconds(record), ",.0f"),
                _number(record.get("steps_per_second"), ",.0f"),
                tag("code", str(run.directory)),
            ]
        )
    head = ["run", "status", "steps", "test accuracy", "test loss", "width ×", "s", "steps/s"]
    head.append("directory")
    body = [
        tag("h1", "Runs side by side"),
        *_notes(notes),
        *([tag("p", f"The small circles are the paper's: {SOURCE}, digitised.")] * with_paper),
        html_table(
            head,
            rows,
            "Loss in nats; width ×: how much wider the 15th to 85th percentile of the last "
            "activation's inputs became, the median over its units",
            "text",
        ),
        *[tag("p", text) for text in runtime_sentences(runs)],
        places_for(drawn, "26rem"),
        *_measured(study),
    ]
    return render_page("Runs side by side", body, drawn)


def _notes(notes: Sequence[str]) -> list[Html]:
    return [tag("p", text, class_="note") for text in notes]


def _budget_line(study: TrialTable, found: Summary) -> str:
    runs = study.about.get("runs") or {}
    budget = f"{' and '.join(runs['steps'])} steps a trial" if "steps" in runs else "budget unknown"
    data = " and ".join(runs["data"]) if "data" in runs else "data unknown"
    grid = found.grid
    seeds = f"{len(grid.seeds)} seed{'s' if len(grid.seeds) > 1 else ''}"
    inits = f"{len(grid.inits)} initialisation{'s' if len(grid.inits) > 1 else ''}"
    return (
        f"{data}, {budget}, {inits} × {len(grid.rates)} learning rates × {seeds} for each arm. "
        f"A cell trains from an accuracy of {grid.levels.trained:.2f} on. "
        "In brackets the 95% interval of the bootstrap over seeds."
    )


def _measures(found: Summary) -> Html:
    rows: list[list[Content]] = []
    names = list(next(iter(found.arms.values())).measures)
    texts = measures_of(found.grid.levels)
    for name in names:
        rows.append(
            [
                texts[name],
                *[shown(name, arm.measures[name]) for arm in found.arms.values()],
                *[shown(name, pair.differences[name], True) for pair in found.comparisons],
            ]
        )
    heads = [arm.label for arm in found.arms.values()]
    for pair in found.comparisons:
        how = "paired" if pair.is_paired else "unpaired"
        heads.append(
            f"{found.arms[pair.first].label} minus {found.arms[pair.second].label} ({how})"
        )
    return html_table(["", *heads], rows, "The measures of tolerance")


def _inits(found: Summary, has_widths: bool) -> Html:
    rows: list[list[Content]] = []
    for i, init in enumerate(found.grid.inits):
        cells: list[Content] = [init_name(init)]
        for arm in found.arms.values():
            of_init = arm.inits[i]
            rate = of_init.largest_rate
            cells += [decades(of_init.width)] if has_widths else []
            cells += [plain(rate) if rate.seeds else "none trains"]
            cells += [plain(of_init.rate_sensitivity) if of_init.rate_sensitivity.seeds else "–"]
        rows.append(cells)
    heads = [init_label(found.grid)]
    for arm in found.arms.values():
        heads += [f"width, {arm.label}"] if has_widths else []
        heads += [f"largest rate that trains, {arm.label}", f"sensitivity (nats), {arm.label}"]
    return html_table(
        heads,
        rows,
        "Each initialisation by itself; the largest rate is the geometric mean of seeds that train",
    )


def _rates_note(found: Summary, drawn: Sequence[Plot]) -> Html:
    text = (
        "Mean over seeds, and the band from the lowest seed to the highest; dotted: "
        f"{found.grid.levels.trained:g}."
    )
    if len(drawn) < len(found.grid.inits):
        text += f" {len(drawn)} of {len(found.grid.inits)} initialisations, evenly chosen."
    labels = ", ".join(arm.label for arm in found.arms.values())
    return tag("p", f"{text} Arms: {labels}.", class_="soft")


def _plots_note(counted: int, complete: int) -> Html:
    text = "By optuna.visualization"
    text += (
        f", of {counted:,} of {complete:,} trials, evenly chosen." if counted < complete else "."
    )
    return tag("p", text, class_="soft")


def _counts(study: TrialTable) -> list[Html]:
    counts = study.counts()
    failed = [row for row in study.rows if row.state == "FAIL"]
    rows = [
        [
            f"{row.number}",
            _params(row),
            str(row.attributes.get("error") or "no error was recorded").strip(),
        ]
        for row in failed[:MOST_FAILED]
    ]
    parts = [
        tag("h2", "How many trials, and how they ended"),
        html_table(list(counts), [[f"{count:,}" for count in counts.values()]]),
        tag(
            "p",
            "Retried: failed, and followed by another trial of the same point. Lost: points with "
            "failed trials only. Diverged: complete, as a run that diverged is a result.",
            class_="soft",
        ),
    ]
    if rows:
        more = f" The first {MOST_FAILED} of {len(failed):,}." if len(failed) > MOST_FAILED else ""
        parts.append(html_table(["trial", "point", "error"], rows, f"Failed trials.{more}", "text"))
    return parts


def _all_trials(found: Summary) -> Html:
    head = ["trial", "arm", init_label(found.grid), "learning rate", "seed", "accuracy", ""]
    empty = html_table(head, [], "All trials of the grid")
    more = tag("button", "200 more", type="button")
    return tag(
        "details", tag("summary", "All trials"), empty, more, id="all-trials", class_="screen"
    )


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


def _measured(study: TrialTable, levels: Levels | None = None) -> list[Html]:
    about = study.about
    items: dict[str, Content] = {}
    for name, counts in (about.get("runs") or {}).items():
        many = len(counts) > 1
        items[name] = "; ".join(f"{v} ({n:,} runs)" if many else v for v, n in counts.items())
    seconds = [row.attributes.get("seconds") for row in study.rows]
    numbers = [s for s in seconds if isinstance(s, int | float)]
    if numbers:
        what = "trials" if study.directions else "runs"
        items["time"] = f"{_duration(sum(numbers))} over all {what}"
    if "first_started" in about:
        items["run"] = f"{about['first_started']} to {about['last_ended']}"
    if "sampler" in about:
        items["sampler"] = str(about["sampler"])
    sweep = about.get("sweep") or {}
    if sweep.get("overrides"):
        items["fixed"] = " ".join(map(str, sweep["overrides"]))
    parts = [tag("h2", "How it was measured")]
    if levels is not None:
        parts.append(
            tag(
                "p",
                f"A cell trains if its accuracy at the end of its budget is {levels.trained:.2f} "
                f"or more; below {levels.at_chance:.2f} it is at chance, and so counts a trial "
                "that diverged. A width is the sum of the decades that the trained rates stand "
                "for, ≥ where a rate at the edge of the grid trains. Every number is computed for "
                "each seed, then averaged; its interval is the percentile bootstrap over seeds, "
                "paired where both arms have the same seeds. Sensitivity: mean loss over rates "
                "minus the best.",
            )
        )
    parts.append(definitions(items))
    if "command" in about:
        parts += [tag("p", "Made by"), tag("pre", tag("code", str(about["command"])), tabindex="0")]
    return parts


def _duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, with at most two digits before the point."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _params(row: TrialRow) -> str:
    return ", ".join(f"{key}={value}" for key, value in row.params.items())


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"
