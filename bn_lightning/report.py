"""Report a sweep, or runs side by side: `bn-report DIR [DIR ...]`.

DIR is a sweep's directory, a storage URL (with --study NAME), the folder of an earlier report (its
trials.csv and summary.json are enough), a run's directory, several of them, or a folder of runs.
Writes report.html, summary.json, trials.csv and figures/ into --output.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bn_lightning.cli.command import run_with_exit_code
from bn_lightning.cli.error_line import FULL_ERROR
from bn_lightning.runs.atomic_write import write_atomically, write_json
from bn_lightning.sweeps.analysis.arms import label_of
from bn_lightning.sweeps.analysis.columns import NoGrid, Roles, Scored, scored
from bn_lightning.sweeps.analysis.compared_runs import (
    Run,
    read_runs,
    runtime_sentences,
    runtimes,
    width_growth,
)
from bn_lightning.sweeps.analysis.paper_curves import is_paper_experiment
from bn_lightning.sweeps.analysis.provenance import (
    classes_of,
    is_planned,
    mixed,
    with_provenance,
)
from bn_lightning.sweeps.analysis.sources import SCHEMA_VERSION, SUMMARY, read_sweep, runs_in
from bn_lightning.sweeps.analysis.summary import Findings, findings, sentences
from bn_lightning.sweeps.analysis.tolerance import FULL_ENOUGH, TRAINED, Levels, coverage
from bn_lightning.sweeps.analysis.trials import TABLE, Cell, Row, Table, to_csv
from bn_lightning.sweeps.engine.passwords import redacted
from bn_lightning.sweeps.report import grid_matplotlib as grid_figures
from bn_lightning.sweeps.report import run_matplotlib as figures
from bn_lightning.sweeps.report.grid_plotly import cells_json
from bn_lightning.sweeps.report.optuna_plotly import optuna_plots
from bn_lightning.sweeps.report.page_text import grid_page, runs_page, study_page

PAGE = "report.html"
MOST_PLACES = 2
"""Of runs that an error names, for each of their budgets."""

_CLASSES = 10  # of the digits, where the runs do not say how many they told apart
_THRESHOLD = "threshold"  # in what a table's summary says about it

EXAMPLES = """\
examples:
  bn-report logs/mnist_bn/sweeps/quick
  bn-report RUN RUN --output comparison
  bn-report postgresql://user@host/database --study lr_init --output map
"""


@dataclass(frozen=True)
class Options:
    """What the command line says beside what is reported.

    Args:
        output: the folder to write to; None for the sweep's directory, or this one for runs.
        study: name of the study, where a storage holds several.
        roles: parameters for the roles that their names do not tell.
        allow_mixed: report trials of different data or budgets together.
        threshold: accuracy from which on a cell of a sweep has trained; None for that of the report
            whose table is read, else .90.
    """

    output: Path | None = None
    study: str | None = None
    roles: Roles = Roles()
    allow_mixed: bool = False
    threshold: float | None = None


def report(sources: Sequence[str], options: Options = Options()) -> Path:
    """Write the report of a sweep or of runs, and return the path of its page.

    The same data give the same files, byte for byte.

    Args:
        sources: one sweep, or runs.
        options: see there.

    Raises:
        ValueError: a source is neither, or what it holds cannot be reported together.
    """
    runs = {source: runs_in(source) for source in sources}
    if all(runs.values()):
        return _report_runs([run for found in runs.values() for run in found], options)
    if len(sources) > 1:
        others = [redacted(source, source) for source in sources if not runs[source]]
        raise ValueError(
            f"expected one sweep, or runs, got {len(sources)} places, and no run in "
            f"{', '.join(others)}; report a sweep by itself"
        )
    base, table = read_sweep(sources[0], options.study)
    return _report_study(table, base, options)


def _report_study(table: Table, base: Path, options: Options) -> Path:
    output = options.output or base
    if options.threshold is not None:
        table = replace(table, about={**table.about, _THRESHOLD: options.threshold})
    complete = [row for row in table.rows if row.is_complete]
    notes = [*table.notes, *_mixture_notes(complete, options.allow_mixed)]
    unfinished = table.counts()["running"] + table.counts()["waiting"]
    if unfinished:
        notes.append(f"The sweep is not over: {unfinished:,} trials run or wait.")
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "study",
        "study": {
            "name": table.name,
            "directions": table.directions,
            "about": table.about,
            "notes": table.notes,
        },
        "counts": table.counts(),
        "notes": notes,
    }
    output.mkdir(parents=True, exist_ok=True)
    if not complete:
        html = study_page(table, "", [], 0, notes)
        said = [f"no trial of {len(table.rows):,} has finished"]
    else:
        try:
            roles, trials, found = _grid_of(table, options.roles)
        except NoGrid as reason:
            plots, count = optuna_plots(table)
            html = study_page(table, str(reason), plots, count, notes)
            said = [f"no map of what trains: {reason}"]
            content["reason"] = str(reason)
        else:
            if trials.repeated:
                notes.append(
                    f"{trials.repeated:,} trials repeat a point of another: the first counts."
                )
            if classes_of(table.about) is None:
                notes.append(
                    "The runs do not say how many classes they told apart: what is at chance, and "
                    f"the loss of a guess, are those of {_CLASSES}."
                )
            content |= {
                "kind": "grid",
                "roles": asdict(roles),
                "metric": trials.metric,
                **found.as_json(),
                "notes": [*notes, *found.notes],
            }
            _draw_grid(table, found, trials.metric, figures.folder_in(output))
            cells = cells_json(found.grid, trials.numbers, _links(table, base), _seen(base, output))
            html = grid_page(table, found, trials.metric, cells, notes)
            said = [
                *sentences(found),
                f"A cell trains from an accuracy of {found.grid.levels.trained:.2f} on; "
                "--threshold asks for another.",
            ]
    return _write(output, table, content, html, said)


def _grid_of(table: Table, given: Roles) -> tuple[Roles, Scored, Findings]:
    roles = Roles.of(table, given)
    trials = scored(table, roles)
    if coverage(trials.trials) < FULL_ENOUGH:
        raise NoGrid(
            f"its {len(trials.trials):,} trials fill {coverage(trials.trials):.1%} of a grid of "
            "their learning rates, initialisations and seeds"
        )
    planned = is_planned(table.about)
    if planned is False:
        raise NoGrid(
            "its sampler chose the points by their results, so that their share says little"
        )
    classes = classes_of(table.about) or _CLASSES
    levels = Levels.of(classes, table.about.get(_THRESHOLD, TRAINED))
    found = findings(trials.numbers, math.log(classes), planned, levels)
    if found.comparisons and not any(pair.cells for pair in found.comparisons):
        raise NoGrid("its arms have no learning rate and initialisation in common")
    return roles, trials, found


def _draw_grid(table: Table, found: Findings, metric: str, folder: Path) -> None:
    arms = {name: label_of(name) for name in found.arms}
    runs = table.about.get("runs") or {}
    facts = [" and ".join(runs[name]) + unit for name, unit in _FACTS.items() if name in runs]
    seeds = f"{len(found.grid.seeds)} seed{'s' * (len(found.grid.seeds) > 1)}"
    caption = ", ".join([metric.replace("/", " "), *facts, seeds])
    draw = [
        ("accuracy", grid_figures.heatmaps_figure),
        ("outcomes", grid_figures.outcomes_figure),
    ]
    if len(found.grid.rates) > 1:
        draw += [("rates", grid_figures.rates_figure), ("widths", grid_figures.widths_figure)]
    for name, make in draw:
        figures.save(make(found.grid, arms, caption), folder / name)
    shares = {name: arm.importances for name, arm in found.arms.items() if arm.importances}
    if shares:
        figures.save(
            grid_figures.importances_figure(shares, {n: arms[n] for n in shares}, caption),
            folder / "importances",
        )


_FACTS = {"data": "", "steps": " steps"}


def _links(table: Table, base: Path) -> dict[int, str]:
    """Number of a trial -> its directory relative to `base`, where it is there."""
    links = {}
    for row in table.rows:
        directory = row.attributes.get("directory")
        if isinstance(directory, str) and directory and (base / directory).is_dir():
            links[row.number] = os.path.relpath(base / directory, base).replace(os.sep, "/")
    return links


def _seen(base: Path, output: Path) -> str:
    return os.path.relpath(base, output).replace(os.sep, "/")


def _report_runs(directories: list[Path], options: Options) -> Path:
    output = options.output or Path(".")
    runs = read_runs(directories)
    rows = tuple(run.as_row(number) for number, run in enumerate(runs))
    directories_of = [str(run.directory) for run in runs]
    notes = _mixture_notes(rows, options.allow_mixed, directories_of)
    table = with_provenance(
        Table(
            "runs",
            (),
            tuple(
                replace(row, attributes={**row.attributes, "directory": str(run.directory)})
                for row, run in zip(rows, runs, strict=True)
            ),
        ),
        Path("."),
        is_of_sweep=False,
    )
    with_paper = any(is_paper_experiment(run.record) for run in runs)
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "runs",
        "study": {
            "name": table.name,
            "directions": [],
            "about": table.about,
            "notes": [],
        },
        "runs": [
            {
                "label": run.label,
                "arm": run.arm,
                "status": run.record["status"],
                "seed": run.record.get("seed"),
                "steps": run.record.get("steps"),
                "metrics": run.record.get("metrics") or {},
                "width_growth": width_growth(run),
                "seconds": run.record.get("seconds"),
                "steps_per_second": run.record.get("steps_per_second"),
            }
            for run in runs
        ],
        "seconds": runtimes(runs),
        "notes": notes,
    }
    _draw_runs(runs, output, with_paper)
    said = [*runtime_sentences(runtimes(runs)), str(output / "comparison.png")]
    return _write(output, table, content, runs_page(runs, table, with_paper, notes), said)


def _draw_runs(runs: list[Run], output: Path, with_paper: bool) -> None:
    metrics = {run.label: run.metrics for run in runs}
    arms = {run.label: run.arm for run in runs}
    folder = figures.folder_in(output)
    figures.save(figures.comparison_figure(metrics, arms, with_paper), output / "comparison")
    accuracy = {label: logged["test/accuracy"] for label, logged in metrics.items()}
    figures.save(figures.accuracy_figure(accuracy, arms, with_paper), folder / "accuracy")
    figures.save(figures.percentiles_figure(metrics, arms), folder / "percentiles")
    losses = {
        label: logged["test/loss"] for label, logged in metrics.items() if "test/loss" in logged
    }
    if losses:
        figures.save(figures.loss_figure(losses, arms), folder / "loss")
    speeds = {
        run.label: run.record["steps_per_second"]
        for run in runs
        if "steps_per_second" in run.record
    }
    if speeds:
        figures.save(figures.throughput_figure(speeds, arms), folder / "throughput")


def _mixture_notes(rows: Sequence[Row], allow_mixed: bool, places: Sequence[str] = ()) -> list[str]:
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


def _at(value: Cell, name: str, rows: Sequence[Row], places: Sequence[str]) -> str:
    """Where the rows with this value lie, the first of them by name."""
    found = [
        place for row, place in zip(rows, places, strict=True) if row.attributes.get(name) == value
    ]
    more = f" and {len(found) - MOST_PLACES:,} more" if len(found) > MOST_PLACES else ""
    return f" in {', '.join(found[:MOST_PLACES])}{more}"


def _write(output: Path, table: Table, content: dict[str, Any], html: str, said: list[str]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / TABLE, to_csv(table))
    write_json(output / SUMMARY, content)
    write_atomically(output / PAGE, html)
    for line in said:
        print(line)
    print(output / PAGE)
    return output / PAGE


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bn-report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="DIR", help="a sweep, or runs")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the sweep's own)")
    parser.add_argument("--study", help="name of the study, where a storage holds several")
    parser.add_argument("--lr", default="", metavar="KEY", help="parameter that is the rate")
    parser.add_argument("--init", default="", metavar="KEY", help="... the initialisation")
    parser.add_argument("--seed", default="", metavar="KEY", help="... the seed")
    parser.add_argument("--arm", default=[], nargs="+", metavar="KEY", help="... the network's arm")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="report different data or budgets together"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="ACCURACY",
        help=f"from which on a cell of a sweep has trained (default: {TRAINED})",
    )
    given = parser.parse_args()
    options = Options(
        given.output,
        given.study,
        Roles(given.lr, given.init, tuple(given.arm), given.seed),
        given.allow_mixed,
        given.threshold,
    )
    full_error = os.environ.get(FULL_ERROR) == "1"
    run_with_exit_code(lambda: report(given.sources, options), full_error=full_error)


if __name__ == "__main__":
    main()
