"""The parts that the pages of a report share: notes, counts of trials, and how it was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.sweeps.analysis.tolerance import Levels
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable
from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.engine.processes import command_of_trial
from bn_lightning.sweeps.engine.space import to_overrides
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    definitions,
    html_table,
    link,
    tag,
)

_TESTS = ("test/accuracy", "test/loss")

MOST_FAILED = 50  # failed trials that a page lists
MOST_LISTED = 500  # trials of a study
MOST_BEST = 10  # the best of them


def notes_of(notes: Sequence[str]) -> list[Html]:
    """Return a paragraph for each note."""
    return [tag("p", text, class_="note") for text in notes]


def best_of(study: TrialTable, links: Mapping[int, str]) -> list[Html]:
    """Return the best trials, and the command that repeats the best of them.

    Args:
        study: with at least one complete trial.
        links: number of a trial -> its directory relative to the page, if that exists.
    """
    complete, front = study.complete, best_trials(study.complete, study.optuna_directions)
    rows = front
    if len(study.directions) == 1:
        sign = -1 if study.directions[0] == "maximize" else 1
        rows = sorted(complete, key=lambda row: (sign * row.values[0], row.number))
    title = "Best trials" if len(study.directions) == 1 else "Best trials: the Pareto front"
    parts = [tag("h2", title), trials_table(study, rows[:MOST_BEST], links)]
    command, sweep = study.about.get("command"), study.about.get("sweep") or {}
    if isinstance(command, str) and command:
        best = front[0]
        overrides = [*map(str, sweep.get("overrides") or ()), *to_overrides(best.params)]
        text = command_of_trial(command, overrides)
        parts += [tag("p", f"Trial {best.number} again, as a run of its own:"), code_block(text)]
    return parts


def trials_table(study: TrialTable, rows: Sequence[TrialRow], links: Mapping[int, str]) -> Html:
    """Return a table of trials: state, values by name, test metrics, and parameters."""
    value_names = study.value_names
    found = {name for row in study.rows for name in row.attributes} - {*value_names}
    tests = [name for name in _TESTS if name in found]
    if _TESTS[0] not in {*found, *value_names}:
        tests = sorted(name for name in found if name.startswith("test/"))
    names = list(dict.fromkeys(key for row in study.rows for key in row.params))
    made: list[list[Content]] = []
    for row in rows[:MOST_LISTED]:
        number = str(row.number)
        values = [f"{value:.6g}" for value in row.values] or ["–"] * len(value_names)
        made.append(
            [
                link(links[row.number], number) if row.number in links else number,
                row.state.lower(),
                *values,
                *(number_text(row.attributes.get(name), ".6g") for name in tests),
                *(_value_text(row.params.get(name, "–")) for name in names),
            ]
        )
    more = f"The first {MOST_LISTED} of {len(rows):,}" if len(rows) > MOST_LISTED else ""
    return html_table(["trial", "state", *value_names, *tests, *names], made, more)


def _value_text(value: Cell) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def code_block(text: str) -> Html:
    """Return a command in a block of its own."""
    return tag("pre", tag("code", text), tabindex="0")


def counts_of(study: TrialTable) -> list[Html]:
    """Return how many trials there are in each state, and the errors of those that failed."""
    counts = study.counts()
    failed = [row for row in study.rows if row.state == "FAIL"]
    rows = [
        [
            f"{row.number}",
            point_text(row),
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


def provenance_of(study: TrialTable, levels: Levels | None = None) -> list[Html]:
    """Return how trials or runs were made: data, budget, hardware, versions, command.

    Args:
        study: the trials or runs.
        levels: the accuracies between outcomes, for a grid.
    """
    about = study.about
    items: dict[str, Content] = {}
    for name, counts in (about.get("runs") or {}).items():
        many = len(counts) > 1
        items[name] = "; ".join(f"{v} ({n:,} runs)" if many else v for v, n in counts.items())
    seconds = [row.attributes.get("seconds") for row in study.rows]
    numbers = [s for s in seconds if isinstance(s, int | float)]
    if numbers:
        what = "trials" if study.directions else "runs"
        items["time"] = f"{duration_text(sum(numbers))} over all {what}"
    if "first_started" in about:
        items["run"] = f"{about['first_started']} to {about['last_ended']}"
    if "sampler" in about:
        items["sampler"] = str(about["sampler"])
    sweep = about.get("sweep") or {}
    if sweep.get("overrides"):
        items["fixed"] = " ".join(map(str, sweep["overrides"]))
    parts = [tag("h2", "How it was measured")]
    if levels is not None:
        fails = (
            f"It fails if its accuracy is below {levels.at_chance:.2f}, or if its training "
            "diverged. "
            if levels.at_chance
            else ""
        )
        parts.append(
            tag(
                "p",
                f"A cell trains if its accuracy at the end of its budget is {levels.trained:.2f} "
                f"or more. {fails}A width is the sum of the decades that the trained learning "
                "rates stand for, ≥ where one at the edge of the grid trains. Every number is "
                "computed for each seed, then averaged; its interval is the percentile bootstrap "
                "over seeds, paired where both arms have the same seeds. Sensitivity: mean loss "
                "over learning rates minus the best.",
            )
        )
    parts.append(definitions(items))
    if "command" in about:
        parts += [tag("p", "Made by"), code_block(str(about["command"]))]
    return parts


def duration_text(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, with at most two digits before the point."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def point_text(row: TrialRow) -> str:
    """Return the parameters of a trial as text."""
    return ", ".join(f"{key}={value}" for key, value in row.params.items())


def number_text(value: Any, form: str) -> str:
    """Return a number in a format of Python's, – for anything else."""
    return format(value, form) if isinstance(value, int | float) else "–"
