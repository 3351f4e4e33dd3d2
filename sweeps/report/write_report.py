"""Write the report of a sweep or of runs: its page, numbers, table and pictures."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bn_lightning.runs.atomic_write import write_atomically, write_json
from bn_lightning.runs.record import training_seconds
from bn_lightning.sweeps.analysis.arms import ordered
from bn_lightning.sweeps.analysis.columns import (
    Columns,
    GridTrials,
    NoGrid,
    grid_trials,
    has_accuracy,
    metric_trials,
)
from bn_lightning.sweeps.analysis.compared_runs import (
    read_runs,
    runtime_sentences,
    runtimes,
    width_growth,
)
from bn_lightning.sweeps.analysis.edges import (
    EdgeSummary,
    edge_sentences,
    searched_rates,
    searched_threshold,
    summarize_edges,
)
from bn_lightning.sweeps.analysis.importances import study_importances
from bn_lightning.sweeps.analysis.metric_arms import MetricArm, arm_sentences, metric_arms
from bn_lightning.sweeps.analysis.paper_curves import is_paper_experiment
from bn_lightning.sweeps.analysis.provenance import (
    classes_of,
    is_planned,
    mixed,
    with_provenance,
)
from bn_lightning.sweeps.analysis.run_list import text_table
from bn_lightning.sweeps.analysis.seed_groups import ArmTable, seed_groups
from bn_lightning.sweeps.analysis.sources import (
    SUMMARY_FILE,
    SUMMARY_SCHEMA_VERSION,
    read_sweep,
    runs_in,
)
from bn_lightning.sweeps.analysis.summary import Summary, sentences, summarize
from bn_lightning.sweeps.analysis.tolerance import FULL_ENOUGH, TRAINED, Grid, Levels, coverage
from bn_lightning.sweeps.analysis.trials import TABLE_FILE, Cell, TrialRow, TrialTable, to_csv
from bn_lightning.sweeps.engine.passwords import redacted
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.grid_figures import cells_json, grid_figures, metric_map_figure
from bn_lightning.sweeps.report.grid_page import grid_page
from bn_lightning.sweeps.report.matplotlib_renderer import figures_folder, save
from bn_lightning.sweeps.report.run_figures import (
    COMPARED,
    comparison_figure,
    figures_of_groups,
)
from bn_lightning.sweeps.report.runs_page import runs_page
from bn_lightning.sweeps.report.study_figures import study_figures
from bn_lightning.sweeps.report.study_page import study_page

PAGE_FILE = "report.html"
MOST_PLACES = 2
"""Runs that an error names for each budget."""

_THRESHOLD = "threshold"  # key in the `about` of a summary


@dataclass(frozen=True)
class ReportOptions:
    """The options of a report.

    Attributes:
        output: the folder to write to; None for the folder that is reported on, the only source.
        study: name of the study, if a storage has several.
        columns: parameters that are not found by their names.
        allow_mixed: whether trials of different data or budgets are reported together.
        threshold: accuracy at which a cell of a sweep has trained; None for that of the earlier
            report if there is one, else .90. Of another metric the value at which a trial has
            trained, at most this where it is minimized; None for none.
    """

    output: Path | None = None
    study: str | None = None
    columns: Columns = Columns()
    allow_mixed: bool = False
    threshold: float | None = None


def write_report(sources: Sequence[str], options: ReportOptions = ReportOptions()) -> Path:
    """Write the report of a sweep or of runs, and return the path of its page.

    The same data give the same files, byte for byte.

    Args:
        sources: one sweep, or runs.
        options: what to write, and where.

    Raises:
        ValueError: a source is neither, its content cannot be reported together, or there are
            several sources or a URL and no `options.output`.
    """
    runs = {source: runs_in(source) for source in sources}
    if all(runs.values()):
        output = options.output or _folder_of(sources)
        return _report_runs([run for found in runs.values() for run in found], output, options)
    if len(sources) > 1:
        others = [redacted(source, source) for source in sources if not runs[source]]
        raise ValueError(
            f"expected one sweep, or runs, got {len(sources)} places, and no run in "
            f"{', '.join(others)}; report a sweep by itself"
        )
    output = options.output or _folder_of(sources)
    base, table = read_sweep(sources[0], options.study)
    return _report_study(table, base, output, options)


def _folder_of(sources: Sequence[str]) -> Path:
    """Return the folder that a report is about, and so is written to.

    Raises:
        ValueError: there is no such folder.
    """
    if len(sources) > 1 or "://" in sources[0]:
        what = f"{len(sources)} runs" if len(sources) > 1 else "a storage URL"
        raise ValueError(
            f"expected `--output`, the folder to write to, for {what}, got none; add --output DIR"
        )
    path = Path(sources[0])
    return path.parent if path.is_file() else path


def _report_study(table: TrialTable, base: Path, output: Path, options: ReportOptions) -> Path:
    if options.threshold is not None:
        table = replace(table, about={**table.about, _THRESHOLD: options.threshold})
    counts = table.counts()
    complete = table.complete
    notes = [*table.notes, *_mixture_notes(complete, options.allow_mixed)]
    unfinished = counts["running"] + counts["waiting"]
    if unfinished:
        notes.append(f"The sweep is not over: {unfinished:,} trials run or wait.")
    content = _content("study", table) | {"counts": counts, "notes": notes}
    output.mkdir(parents=True, exist_ok=True)
    if not complete:
        page = study_page(table, "", {}, {}, notes)
        return _write(
            output, table, content, page, [f"no trial of {len(table.rows):,} has finished"]
        )
    try:
        columns, trials, found = _grid_of(table, options.columns)
    except NoGrid as reason:
        shares, count = study_importances(table)
        figures = _figures_of_study(table, options.columns, shares, count)
        _save_all(figures, output)
        threshold = table.about.get(_THRESHOLD)
        arms = _arms_of_study(table, options.columns, threshold)
        texts = arm_sentences(table, arms, threshold) if arms else []
        content |= {
            "reason": str(reason),
            "metrics": table.value_names,
            "arms": [arm.as_json() for arm in arms],
            "sentences": texts,
            "importances": {"shares": shares, "trials": count},
        }
        links = _page_links(table, base, output)
        page = study_page(table, str(reason), figures, links, notes, (arms, texts))
        return _write(output, table, content, page, [f"no map of what trains: {reason}", *texts])
    if counts["pruned"]:
        notes.append(
            f"{counts['pruned']:,} trials were pruned, the worst at their time: shares and widths "
            "are those of the others. A map of what trains needs a sweep without a pruner."
        )
    if trials.repeated:
        notes.append(f"{trials.repeated:,} trials repeat a point of another: the first counts.")
    if classes_of(table.about) is None:
        notes.append(
            "The number of classes is unknown, so that nothing is said of cells that fail, or of "
            "sensitivity. A data module's `info` tells it: "
            "{'source': NAME, ..., 'classes': NUMBER}."
        )
    content |= {
        "kind": "grid",
        "roles": asdict(columns),
        "metric": trials.metric,
        **found.as_json(),
        "notes": [*notes, *found.notes],
    }
    figures = _figures_of_grid(table, trials, found)
    _save_all(figures, output)
    edges = _edges_of(table, columns, found)
    if edges is not None:
        content["edges"] = edges.as_json()
    cells = cells_json(found.grid, trials.numbers, _links(table, base), _relative(base, output))
    links = _page_links(table, base, output)
    page = grid_page(table, found, figures, cells, links, notes, edges)
    lines = [
        *sentences(found),
        *(edge_sentences(found, edges) if edges is not None else []),
        *notes,
        f"A cell trains from an accuracy of {found.grid.levels.trained:.2f} on; "
        "--threshold asks for another.",
    ]
    return _write(output, table, content, page, lines)


def sweep_figures(table: TrialTable) -> dict[str, Figure]:
    """Describe the figures of a sweep by name: its map if it is a grid, else its parameters'."""
    try:
        _, trials, found = _grid_of(table, Columns())
    except NoGrid:
        return _figures_of_study(table, Columns(), *study_importances(table))
    return _figures_of_grid(table, trials, found)


def _figures_of_study(
    table: TrialTable, given: Columns, shares: Mapping[str, float], count: int
) -> dict[str, Figure]:
    """Return the figures of a study; a grid of a metric that is no accuracy has its map."""
    figures = study_figures(table, shares, count)
    if len(table.directions) > 1 or has_accuracy(table):
        return figures
    try:
        trials = metric_trials(table, Columns.of(table, given))
    except NoGrid:
        return figures
    if coverage(trials.numbers.values()) < FULL_ENOUGH:
        return figures
    grid = Grid.of(trials.numbers.values())
    grid = replace(grid, arms={name: grid.arms[name] for name in ordered(grid.arms)})
    metric = trials.metric.replace("/", " ")
    return {"map": metric_map_figure(grid, metric, table.directions[0]), **figures}


def _arms_of_study(table: TrialTable, given: Columns, threshold: float | None) -> list[MetricArm]:
    """Return the arms of a study, [] if it has several values or no parameter names them."""
    if len(table.directions) > 1:
        return []
    try:
        return metric_arms(table, Columns.named(table, given), threshold)
    except NoGrid:
        return []


def _figures_of_grid(table: TrialTable, trials: GridTrials, found: Summary) -> dict[str, Figure]:
    metric = trials.metric.replace("/", " ")
    return grid_figures(found, metric, _caption(table, found, metric))


def _grid_of(table: TrialTable, given: Columns) -> tuple[Columns, GridTrials, Summary]:
    columns = Columns.of(table, given)
    trials = grid_trials(table, columns)
    planned = is_planned(table.about)
    rates = searched_rates(table.about, columns.lr)
    if rates is not None:
        on_grid = {n: trial for n, trial in trials.numbers.items() if trial.lr in rates}
        trials, planned = replace(trials, numbers=on_grid), True
    filled = coverage(trials.numbers.values())
    if filled < FULL_ENOUGH:
        raise NoGrid(
            f"its {len(trials.numbers):,} trials fill {filled:.1%} of a grid of "
            "their learning rates, initializations and seeds"
        )
    if planned is False:
        raise NoGrid(
            "its sampler chose the points by their results, so that their share says little"
        )
    classes = classes_of(table.about)
    threshold = table.about.get(_THRESHOLD) or searched_threshold(table.about) or TRAINED
    levels = Levels.of(classes, threshold)
    chance_loss = math.log(classes) if classes else math.nan
    found = summarize(trials.numbers.values(), chance_loss, planned, levels)
    if found.comparisons and not any(pair.cells for pair in found.comparisons):
        raise NoGrid("its arms have no learning rate and initialization in common")
    return columns, trials, found


def _edges_of(table: TrialTable, columns: Columns, found: Summary) -> EdgeSummary | None:
    """Return the edges that a sweep searched, None if it searched none."""
    if searched_rates(table.about, columns.lr) is None:
        return None
    return summarize_edges(grid_trials(table, columns).numbers.values(), found)


def _caption(table: TrialTable, found: Summary, metric: str) -> str:
    runs = table.about.get("runs") or {}
    data = [" and ".join(runs["data"])] if "data" in runs else []
    steps = [f"{' and '.join(runs['steps'])} steps"] if "steps" in runs else []
    seeds = len(found.grid.seeds)
    return ", ".join([metric, *data, *steps, f"{seeds} seed{'s' * (seeds > 1)}"])


def _links(table: TrialTable, base: Path) -> dict[int, str]:
    """Return number of a trial -> its directory relative to `base`, if that exists."""
    links = {}
    for row in table.rows:
        directory = row.attributes.get("directory")
        if isinstance(directory, str) and directory and (base / directory).is_dir():
            links[row.number] = _relative(base / directory, base)
    return links


def _page_links(table: TrialTable, base: Path, output: Path) -> dict[int, str]:
    """Return number of a trial -> its directory relative to the page, if that exists."""
    return {n: _relative(base / path, output) for n, path in _links(table, base).items()}


def _relative(path: Path, base: Path) -> str:
    return os.path.relpath(path, base).replace(os.sep, "/")


def _report_runs(directories: list[Path], output: Path, options: ReportOptions) -> Path:
    runs = read_runs(directories)
    groups = seed_groups(runs)
    rows = tuple(run.as_row(number, output) for number, run in enumerate(runs))
    notes = _mixture_notes(rows, options.allow_mixed, [str(run.directory) for run in runs])
    left_out = [run.label for run in runs if not run.has_result]
    if left_out:
        notes.append(f"Left out of means, because they have no result: {'; '.join(left_out)}.")
    table = with_provenance(TrialTable("runs", (), rows), output, is_of_sweep=False)
    arms = ArmTable.of(groups)
    content = _content("runs", table) | {
        "arms": arms.as_json(),
        "runs": [
            {
                "label": run.label,
                "arm": run.arm,
                "status": run.record["status"],
                "seed": run.record.get("seed"),
                "steps": run.record.get("steps"),
                "metrics": run.record.get("metrics") or {},
                "width_growth": width_growth(run),
                "seconds": training_seconds(run.record),
                "steps_per_second": run.record.get("steps_per_second"),
            }
            for run in runs
        ],
        "seconds": runtimes(runs),
        "notes": notes,
    }
    with_paper = all(is_paper_experiment(run.record) for run in runs)
    figures = figures_of_groups(groups, with_paper)
    _save_all(figures, output)
    lines = [text_table(arms.head(), arms.rows()), *runtime_sentences(runs)]
    if figures.keys() & COMPARED:
        save(comparison_figure(figures), output / "comparison")
        lines.append(str(output / "comparison.png"))
    page = runs_page(arms, table, figures, with_paper, notes)
    return _write(output, table, content, page, lines)


def _mixture_notes(
    rows: Sequence[TrialRow], allow_mixed: bool, places: Sequence[str] = ()
) -> list[str]:
    """Return a note for each of data and budget that differs among the rows.

    Raises:
        ValueError: something differs, and `allow_mixed` is false.
    """
    found = {
        name.removeprefix("run/").replace("max_steps", "budgets in steps"): (name, values)
        for name, values in mixed(rows).items()
    }
    if found and not allow_mixed:
        texts = [
            f"{shown}: " + "; ".join(f"{value}{_at(value, name, rows, places)}" for value in values)
            if places
            else f"{shown}: {', '.join(map(str, values))}"
            for shown, (name, values) in found.items()
        ]
        raise ValueError(
            f"expected results of the same data and budget, got {'; '.join(texts)}; report them by "
            "themselves, or together with --allow-mixed"
        )
    return [
        "Results of different data or budgets stand side by side "
        f"({shown}: {', '.join(map(str, values))})."
        for shown, (_, values) in found.items()
    ]


def _at(value: Cell, name: str, rows: Sequence[TrialRow], places: Sequence[str]) -> str:
    """Return the places of the rows with this value, the first of them by name."""
    found = [
        place for row, place in zip(rows, places, strict=True) if row.attributes.get(name) == value
    ]
    more = f" and {len(found) - MOST_PLACES:,} more" if len(found) > MOST_PLACES else ""
    return f" in {', '.join(found[:MOST_PLACES])}{more}"


def _content(kind: str, table: TrialTable) -> dict[str, Any]:
    """Return what each summary.json begins with."""
    return {
        "schema_version": SUMMARY_SCHEMA_VERSION,
        "kind": kind,
        "study": {
            "name": table.name,
            "directions": table.directions,
            "about": table.about,
            "notes": table.notes,
        },
    }


def _save_all(figures: Mapping[str, Figure], output: Path) -> None:
    folder = figures_folder(output)
    for name, figure in figures.items():
        save(figure, folder / name)


def _write(
    output: Path, table: TrialTable, content: dict[str, Any], page: str, lines: Sequence[str]
) -> Path:
    """Write the files of a report, and print what it says."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / TABLE_FILE, to_csv(table))
    write_json(output / SUMMARY_FILE, content)
    write_atomically(output / PAGE_FILE, page)
    print(*lines, output / PAGE_FILE, sep="\n")
    return output / PAGE_FILE
