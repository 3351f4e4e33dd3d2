"""The page of a grid of learning rates and initializations."""

from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.sweeps.analysis.arms import style_of
from bn_lightning.sweeps.analysis.edges import EdgeSummary, edge_sentences
from bn_lightning.sweeps.analysis.summary import (
    Summary,
    decades,
    measures_of,
    plain,
    sentences,
    shown,
)
from bn_lightning.sweeps.analysis.trials import TrialTable
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.grid_figures import init_label, init_name
from bn_lightning.sweeps.report.page_parts import best_of, counts_of, notes_of, provenance_of
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    Plot,
    html_table,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of

_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆"}
_HELP = "Point at a cell, click it, or reach a map by the tab key and move by the arrow keys."


def grid_page(
    study: TrialTable,
    found: Summary,
    figures: Mapping[str, Figure],
    cells: Mapping[str, Any],
    links: Mapping[int, str],
    notes: Sequence[str],
    edges: EdgeSummary | None = None,
) -> str:
    """Return the page of a study of learning rates and initializations.

    Args:
        study: its trials.
        found: its numbers.
        figures: file name -> figure, as `grid_figures` returns them.
        cells: as `cells_json` returns them.
        links: number of a trial -> its directory relative to the page, if that exists.
        notes: shown first.
        edges: where training begins and ends, if the study searched for that.
    """
    plots = {name: plots_of(figure) for name, figure in figures.items()}
    rates, shares = plots.get("rates", []), plots.get("importances", [])
    widths = plots.get("widths", [])
    body = [
        tag("h1", f"What trains: {study.name}"),
        *[tag("p", text, class_="lead") for text in sentences(found)],
        *notes_of([*notes, *found.notes]),
        tag("p", _budget_line(study, found), class_="soft"),
        _measures(found),
        tag("h2", f"Accuracy over learning rate and {init_label(found.grid)}"),
        tag("p", _HELP, class_="soft screen"),
        places_for(plots["accuracy"]),
        tag("div", tag("span", _HELP), id="cell", aria_live="polite", class_="screen"),
        tag("h2", "What became of the trials"),
        places_for(plots["outcomes"]),
        *([tag("h2", "Accuracy against learning rate")] if rates else []),
        *([_rates_note(found, rates), places_for(rates, "17rem")] if rates else []),
        *([tag("h2", "Tolerance"), places_for(widths)] if widths else []),
        _inits(found, bool(widths)),
        *(_edges(found, edges) if edges is not None else []),
        *([tag("h2", "Importances"), places_for(shares)] if shares else []),
        *best_of(study, links),
        *counts_of(study),
        _all_trials(found),
        *provenance_of(study, found.grid.levels),
    ]
    drawn = [plot for several in plots.values() for plot in several]
    return render_page(f"What trains: {study.name}", body, drawn, cells)


def _budget_line(study: TrialTable, found: Summary) -> str:
    runs = study.about.get("runs") or {}
    budget = f"{' and '.join(runs['steps'])} steps a trial" if "steps" in runs else "budget unknown"
    data = " and ".join(runs["data"]) if "data" in runs else "data unknown"
    grid = found.grid
    seeds = f"{len(grid.seeds)} seed{'s' if len(grid.seeds) > 1 else ''}"
    inits = f"{len(grid.inits)} {init_label(grid)}{'s' if len(grid.inits) > 1 else ''}"
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
            cells += [decades(of_init.width, unit="")] if has_widths else []
            cells += [plain(rate) if rate.seeds else "none trains"]
            cells += [plain(of_init.rate_sensitivity) if of_init.rate_sensitivity.seeds else "–"]
        rows.append(cells)
    heads = [init_label(found.grid)]
    for arm in found.arms.values():
        heads += [f"width (decades), {arm.label}"] if has_widths else []
        heads += [f"largest learning rate that trains, {arm.label}"]
        heads += [f"sensitivity (nats), {arm.label}"]
    return html_table(
        heads,
        rows,
        f"Each {init_label(found.grid)} by itself; the largest learning rate is the geometric mean "
        "of the seeds that train",
    )


def _edges(found: Summary, edges: EdgeSummary) -> list[Html]:
    rows: list[list[Content]] = []
    for i, init in enumerate(found.grid.inits):
        cells: list[Content] = [init_name(init)]
        for name, arm in edges.arms.items():
            of = arm.inits[i]
            begins = f"{'≤ ' * of.begins_below}{plain(of.begins)}"
            cells += [decades(found.arms[name].inits[i].width, unit="")]
            cells += [f"{decades(of.width, unit='')} ± {of.resolution / 2:.3f}"]
            cells += [begins if of.begins.seeds else "none trains"]
            cells += [plain(of.ends) if of.ends.seeds else "none trains"]
            cells += [f"{of.holes} of {of.width.seeds} seeds" if of.holes else "none"]
        rows.append(cells)
    heads = [init_label(found.grid)]
    for arm_summary in found.arms.values():
        heads += [
            f"{head}, {arm_summary.label}"
            for head in ("grid (decades)", "searched (decades)", "begins at", "ends at", "holes")
        ]
    caption = (
        "Width of the learning rates that train, on the grid and with each edge searched; ± half "
        "the widest interval that contains an edge, for each of the edges. Rates are geometric "
        "means of the seeds that train. A hole is a range that does not train between two that do."
    )
    return [
        tag("h2", "Where training begins and ends"),
        *[tag("p", text) for text in edge_sentences(found, edges)],
        html_table(heads, rows, caption),
    ]


def _rates_note(found: Summary, drawn: Sequence[Plot]) -> Html:
    text = (
        "Mean over seeds, and the band from the lowest seed to the highest; dotted: "
        f"{found.grid.levels.trained:g}."
    )
    if len(drawn) < len(found.grid.inits):
        text += (
            f" {len(drawn)} of {len(found.grid.inits)} {init_label(found.grid)}s, evenly chosen."
        )
    styles = [style_of(name, found.arms) for name in found.arms]
    arms: list[Content] = []
    for style, arm in zip(styles, found.arms.values(), strict=True):
        glyph = f" {_GLYPHS[style.marker]} "
        arms += [tag("span", glyph, style=f"color: {style.color}"), arm.label]
    return tag("p", text, *arms, class_="soft")


def _all_trials(found: Summary) -> Html:
    head = ["trial", "arm", init_label(found.grid), "learning rate", "seed", "accuracy", ""]
    empty = html_table(head, [], "All trials of the grid")
    more = tag("button", "200 more", type="button")
    return tag(
        "details", tag("summary", "All trials"), empty, more, id="all-trials", class_="screen"
    )
