"""The page of the ledger, and the same as Markdown."""

from collections.abc import Mapping
from typing import Any

from bn_lightning.claims.verdict_text import bound_text, effect_text, outcome_text
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.page_parts import duration_text, notes_of
from bn_lightning.sweeps.report.page_skeleton import (
    Content,
    Html,
    definitions,
    html_table,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of

_TITLE = "The claims for Batch Normalization, put to the test"
_HEAD = ("claim", "tested", "effect", "rule", "seeds inside", "outcome")
_CAPTION = (
    "Mean over seeds with its 95% bootstrap interval, and how many seeds are by themselves inside "
    "the rule, which was written before the run"
)


def claims_page(content: Mapping[str, Any], figures: Mapping[str, Figure], overview: Figure) -> str:
    """Return the page.

    Args:
        content: of summary.json.
        figures: name of a claim -> its figure.
        overview: of all claims.
    """
    plots = {name: plots_of(figure) for name, figure in figures.items()}
    first = plots_of(overview)
    body: list[Html] = [
        tag("h1", _TITLE),
        *notes_of(content["notes"]),
        html_table(("claim", "verdict"), [_verdict(e) for e in content["claims"].values()]),
        places_for(first, "21rem"),
    ]
    for name, entry in content["claims"].items():
        least = "30rem" if figures[name].columns == 2 else "24rem"  # as in the picture
        rows: list[list[Content]] = [list(row) for row in _rows(entry)]
        body += [
            tag("h2", f"{name}: {entry['text']}"),
            tag("p", entry["sentence"], class_="lead"),
            html_table(_HEAD[1:], rows, _CAPTION, "text"),
            places_for(plots[name], least),
            definitions(_about(entry)),
        ]
    setups = "; ".join(map(_setup_text, content["setups"]))
    body += [tag("h2", "How it was measured"), tag("p", setups)]
    drawn = [*first, *(plot for found in plots.values() for plot in found)]
    return render_page(_TITLE, body, drawn)


def claims_markdown(content: Mapping[str, Any]) -> str:
    """Return the ledger as Markdown: a table of verdicts, then each claim with its conditions.

    Args:
        content: of summary.json.
    """
    lines = [f"# {_TITLE}", "", *(f"{note}\n" for note in content["notes"])]
    lines += ["| claim | verdict |", "|---|---|"]
    lines += [f"| {' | '.join(_verdict(entry))} |" for entry in content["claims"].values()]
    lines += ["", "![overview](figures/overview.png)"]
    for name, entry in content["claims"].items():
        lines += ["", f"## {name}: {entry['text']}", "", f"{entry['sentence']}", ""]
        lines += [f"| {' | '.join(_HEAD[1:])} |", "|" + "---|" * len(_HEAD[1:])]
        lines += [f"| {' | '.join(row)} |" for row in _rows(entry)]
        lines += ["", f"![{name}](figures/{name}.png)", ""]
        lines += [f"{term.capitalize()}: {text}\n" for term, text in _about(entry).items()]
    lines += ["", "; ".join(map(_setup_text, content["setups"]))]
    return "\n".join(lines) + "\n"


def _verdict(entry: Mapping[str, Any]) -> list[str]:
    return [entry["sentence"], entry["text"]]


def _rows(entry: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"{number}. {condition['statement']}{' (control)' * condition['is_control']}",
            effect_text(condition),
            bound_text(condition),
            f"{condition['effect']['inside']} of {condition['effect']['seeds']}",
            outcome_text(condition),
        ]
        for number, condition in enumerate(entry["conditions"], 1)
    ]


def _about(entry: Mapping[str, Any]) -> dict[str, str]:
    return {
        "source": entry["source"],
        "not varied": entry["not_varied"],
        "what would change the verdict": entry["would_change"],
        "processor time": duration_text(entry["seconds"]),
    }


def _setup_text(setup: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in setup["versions"].items())
    typed = " ".join(setup["overrides"])
    data = setup["data"]["source"]
    return f"{versions}; data {data}; budget {setup['budget']}{f'; {typed}' if typed else ''}"
