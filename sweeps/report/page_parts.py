"""The parts that the pages of a report share: notes, counts of trials, and how it was measured."""

from collections.abc import Sequence
from typing import Any

from bn_lightning.sweeps.analysis.tolerance import Levels
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.report.page_skeleton import Content, Html, definitions, html_table, tag

MOST_FAILED = 50  # failed trials that a page lists


def notes_of(notes: Sequence[str]) -> list[Html]:
    """Return a paragraph for each note."""
    return [tag("p", text, class_="note") for text in notes]


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
        parts.append(
            tag(
                "p",
                f"A cell trains if its accuracy at the end of its budget is {levels.trained:.2f} "
                f"or more. It fails if its accuracy is below {levels.at_chance:.2f}, or if its "
                "training diverged. A width is the sum of the decades that the trained learning "
                "rates stand for, ≥ where one at the edge of the grid trains. Every number is "
                "computed for each seed, then averaged; its interval is the percentile bootstrap "
                "over seeds, paired where both arms have the same seeds. Sensitivity: mean loss "
                "over learning rates minus the best.",
            )
        )
    parts.append(definitions(items))
    if "command" in about:
        parts += [tag("p", "Made by"), tag("pre", tag("code", str(about["command"])), tabindex="0")]
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
