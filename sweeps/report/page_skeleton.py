"""One HTML page that needs nothing beside it: the skeleton, and the escaping of all that is put in.

Names and errors of trials come from configurations, which anybody may have written. Text is escaped
where it becomes HTML; data stand in a block of JSON in which no tag can begin or end; and the page
allows no script but the two whose hashes its head names.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from bn_lightning.runs.atomic_write import json_values


@dataclass(frozen=True)
class Html:
    """Text that is HTML already."""

    text: str


@dataclass(frozen=True)
class Plot:
    """A plotly figure.

    Args:
        id: of its element; letters, digits and hyphens.
        title: in words.
        traces: plotly's.
        layout: plotly's, without colours of paper and ink, which the page chooses.
        caption: after the title.
        arms: of a figure whose cells are those of the grid: places of the arms that a cell shows.
        has_tools: whether plotly's buttons to zoom and to save are shown.
    """

    id: str
    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""
    arms: tuple[int, ...] = ()
    has_tools: bool = True

    def as_json(self) -> dict[str, Any]:
        """What page.js draws it from."""
        content = {
            "id": self.id,
            "traces": self.traces,
            "layout": self.layout,
            "tools": self.has_tools,
        }
        return content | ({"cells": {"arms": self.arms}} if self.arms else {})


Content = str | Html


def page(
    title: str, body: Iterable[Html], plots: Sequence[Plot], grid: Mapping[str, Any] | None = None
) -> str:
    """The whole page as text.

    Args:
        title: of the page.
        body: its sections, in which `figure` has made a place for each plot.
        plots: what is drawn.
        grid: the trials of the cells (see grid_plots.cells_json).
    """
    scripts = {"plotly": _one_line_end(get_plotlyjs()), "script": _file("page.js")}
    fields = {
        "title": escape(title),
        "body": "\n".join(part.text for part in body),
        "data": json_block({"plots": [plot.as_json() for plot in plots], "grid": grid}),
        "hashes": " ".join(_hash(text) for text in scripts.values()),
        **scripts,
    }
    # In one pass: what is put in is not looked through for fields again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _file("page.html"))


def json_block(content: Any) -> str:
    """JSON that may stand in a <script> element; numbers that JSON lacks become null."""
    text = json.dumps(json_values(content), separators=(",", ":"))
    # json.dumps leaves no other character that HTML or JavaScript would take for their own.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def tag(name: str, *content: Content, **attributes: str) -> Html:
    """An element; `class_` is its class, and text in it is escaped."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    inner = "".join(part.text if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"<{name}{shown}>{inner}</{name}>")


def html_table(
    head: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str = "", last: str = ""
) -> Html:
    """A table that scrolls by itself where it is too wide; `last` is its last column's class."""
    made = []
    for row in rows:
        first, *others = row
        cells = [tag("th", first, scope="row")]
        for i, cell in enumerate(others):
            is_last = bool(last) and i == len(others) - 1
            cells.append(tag("td", cell, class_=last) if is_last else tag("td", cell))
        made.append(tag("tr", *cells))
    return tag(
        "div",
        tag(
            "table",
            *([tag("caption", caption)] if caption else []),
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *made),
        ),
        class_="wide",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def definitions(items: Mapping[str, Content]) -> Html:
    """A list of terms, each with what it is."""
    parts = [part for term, what in items.items() for part in (tag("dt", term), tag("dd", what))]
    return tag("dl", *parts)


def places_for(plots: Sequence[Plot], least: str = "24rem") -> Html:
    """Places for plots, side by side where there is room.

    Args:
        least: width of a plot from which on two stand beside each other, in CSS.
    """
    return tag("div", *map(_figure, plots), class_="plots", style=f"--least: {least}")


def _figure(plot: Plot) -> Html:
    attributes = {"role": "img", "aria_label": plot.title}
    if plot.arms:
        attributes = {
            "tabindex": "0",
            "role": "application",
            "aria_label": f"{plot.title}; arrow keys move from cell to cell",
            "aria_describedby": "cell",
        }
    height = f"height: {plot.layout.get('height', 360)}px"
    return tag(
        "figure",
        tag("figcaption", tag("strong", plot.title), f" {plot.caption}" if plot.caption else ""),
        tag("div", id=plot.id, class_="plot", style=height, **attributes),
    )


@cache
def _file(name: str) -> str:
    return _one_line_end(
        files("bn_lightning.sweeps.report").joinpath(name).read_text(encoding="utf-8")
    )


def _one_line_end(text: str) -> str:
    """With the line ends for which a browser takes all others, also before it hashes a script."""
    return text.replace("\r\n", "\n")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
