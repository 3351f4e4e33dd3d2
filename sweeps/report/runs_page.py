"""The page of runs side by side."""

from collections.abc import Mapping, Sequence

from bn_lightning.runs.record import result_names
from bn_lightning.sweeps.analysis.compared_runs import runtime_sentences, width_growth
from bn_lightning.sweeps.analysis.paper_curves import SOURCE
from bn_lightning.sweeps.analysis.seed_groups import ArmTable
from bn_lightning.sweeps.analysis.trials import TrialTable
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.page_parts import notes_of, number_text, provenance_of
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    html_table,
    link,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of


def runs_page(
    arms: ArmTable,
    study: TrialTable,
    figures: Mapping[str, Figure],
    with_paper: bool,
    notes: Sequence[str],
) -> str:
    """Return the page of runs side by side.

    Args:
        arms: the runs, those that differ in seed alone as one.
        study: the runs as a table, with their directories relative to the page.
        figures: file name -> figure.
        with_paper: whether the paper's curves are in the figures.
        notes: shown first.
    """
    runs = [run for group in arms.groups for run in group.runs]
    tasks = {run.task for run in runs}
    title = f"Runs of {tasks.pop()}" if len(tasks) == 1 and "" not in tasks else "Runs side by side"
    drawn = [plot for figure in figures.values() for plot in plots_of(figure)]
    directories = {str(row.attributes["label"]): row.attributes["directory"] for row in study.rows}
    body = [
        tag("h1", title),
        *notes_of(notes),
        *([tag("p", f"The small circles are the paper's: {SOURCE}, digitized.")] * with_paper),
        html_table(
            arms.head(),
            arms.rows(),
            "Runs that differ in seed alone: mean ± standard deviation. Loss in nats, time of "
            "training with its evaluations",
        ),
        *[tag("p", text) for text in runtime_sentences(runs)],
        *([tag("p", _CURVES, class_="soft")] if len(runs) > len(arms.groups) else []),
        places_for(drawn, "26rem"),
        tag("h2", "The runs"),
        _runs(arms, {label: str(directory) for label, directory in directories.items()}),
        *provenance_of(study),
    ]
    return render_page(title, body, drawn)


_CURVES = (
    "Curves are means over seeds, with a band from the lowest seed to the highest; percentiles are "
    "those of the first seed."
)


def _runs(arms: ArmTable, directories: Mapping[str, str]) -> Html:
    rows: list[list[Content]] = []
    for run in (run for group in arms.groups for run in group.runs):
        record, metrics = run.record, run.record.get("metrics") or {}
        rows.append(
            [
                run.group,
                str(record.get("seed", "–")),
                str(record["status"]),
                number_text(record.get("steps"), ",.0f"),
                number_text(
                    metrics.get(arms.metric or next(iter(result_names(record)), "")), ".4f"
                ),
                *(number_text(metrics.get(name), ".4f") for name in arms.tests),
                number_text(width_growth(run), ".3g"),
                number_text(record.get("steps_per_second"), ",.0f"),
                link(directories[run.label], directories[run.label]),
            ]
        )
    is_accuracy = not arms.metric or arms.metric.endswith("/accuracy")
    names = ["accuracy" if is_accuracy else arms.metric, *arms.tests]
    head = ["arm", "seed", "status", "steps", *(name.replace("/", " ") for name in names)]
    head += ["width ×", "steps/s"]
    about = "Accuracy of the test, else of the validation; " if is_accuracy else ""
    return html_table(
        [*head, "directory"],
        rows,
        f"{about}width ×: how much wider the 15th to 85th percentile of the last activation's "
        "inputs became, the median over its units",
        "text",
    )
