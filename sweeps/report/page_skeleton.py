"""The skeleton of a report's page, one HTML file without other files, and the escaping of its text.

Names and errors of trials come from configurations, which anybody may have written. So all text is
escaped when it becomes HTML, the data are a block of JSON in which no tag can begin or end, and the
page's policy allows only the two scripts whose hashes it contains.
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
from urllib.parse import quote

from plotly.offline import get_plotlyjs

from bn_lightning.runs.atomic_write import json_values


@dataclass(frozen=True)
class Html:
    """Text that is HTML and is not escaped again."""

    text: str


@dataclass(frozen=True)
class Plot:
    """A plotly figure.

    Attributes:
        id: of its element: letters, digits and hyphens.
        title: shown above it.
        traces: plotly's traces.
        layout: plotly's layout, without the colors of paper and ink, which the page chooses.
        caption: after the title.
        arms: positions of the arms whose trials a cell lists, for a figure with the grid's cells.
        has_tools: whether plotly's buttons for zooming and saving are shown.
    """

    id: str
    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""
    arms: tuple[int, ...] = ()
    has_tools: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the input of page.js."""
        content = {
            "id": self.id,
            "traces": self.traces,
            "layout": self.layout,
            "tools": self.has_tools,
        }
        return content | ({"cells": {"arms": self.arms}} if self.arms else {})


Content = str | Html


def render_page(
    title: str, body: Iterable[Html], plots: Sequence[Plot], grid: Mapping[str, Any] | None = None
) -> str:
    """Return the whole page as HTML.

    Args:
        title: of the page.
        body: its sections, with the places of the plots, which `places_for` makes.
        plots: the plots.
        grid: the trials of the cells, as `cells_json` returns them.
    """
    scripts = {"plotly": _one_line_end(get_plotlyjs()), "script": _file("page.js")}
    fields = {
        "title": escape(title),
        "body": "\n".join(part.text for part in body),
        "data": json_block({"plots": [plot.as_json() for plot in plots], "grid": grid}),
        "hashes": " ".join(_hash(text) for text in scripts.values()),
        **scripts,
    }
    # In one pass, so that fields in inserted text are not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _file("page_skeleton.html"))


def json_block(content: Any) -> str:
    """Return JSON for a <script> element; NaN and infinity become null."""
    text = json.dumps(json_values(content), separators=(",", ":"))
    # json.dumps escapes all other characters with a meaning in HTML or JavaScript.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def tag(name: str, *content: Content, **attributes: str) -> Html:
    """Return an element with its text escaped; `class_` is its class."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    inner = "".join(part.text if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"<{name}{shown}>{inner}</{name}>")


def link(directory: str, text: str) -> Html:
    """Return a link to a directory, given relative to the page."""
    return tag("a", text, href=quote(directory.rstrip("/")) + "/")


def html_table(
    head: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str = "", last: str = ""
) -> Html:
    """Return a table; `last` is the class of its last column.

    Where it is too wide, page.js shows each row as a list; without JavaScript it scrolls.
    """
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
    """Return a list of terms with their definitions."""
    parts = [part for term, what in items.items() for part in (tag("dt", term), tag("dd", what))]
    return tag("dl", *parts)


def places_for(plots: Sequence[Plot], least: str = "24rem") -> Html:
    """Return elements for plots, side by side if there is room.

    Args:
        plots: the plots.
        least: the least width of a plot beside another one, in CSS.
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
    """Return the text with the line ends that a browser uses, also when it hashes a script."""
    return text.replace("\r\n", "\n")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
