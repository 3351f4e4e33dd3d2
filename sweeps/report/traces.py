"""Lines and bands as plotly's traces, in the styles of the static figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.sweeps.analysis.arms import Style

MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond"}
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
MARGIN = {"l": 60, "r": 10, "t": 10, "b": 55}


def line(
    x: Sequence[float], y: Sequence[float], name: str, style: Style, mode: str = ""
) -> list[dict[str, Any]]:
    """A curve, with `mode` "markers+" with points on it, with "markers" the points alone."""
    mode = mode if mode == "markers" else f"{mode}lines"
    return [
        {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": list(map(rounded, x)),
            "y": list(map(rounded, y)),
            "line": {"color": style.colour, "dash": DASHES[style.line], "width": 2},
            "marker": {"color": style.colour, "symbol": MARKERS[style.marker], "size": 6},
        }
    ]


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], line: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What lies between two curves, in the colour of a line."""
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [rounded(value) for value in (*x, *x[::-1])],
            "y": [rounded(value) for value in (*high, *low[::-1])],
            "fill": "toself",
            "fillcolor": line["line"]["color"] + "33",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def rounded(value: float) -> float:
    """Six digits, which is more than any figure shows."""
    return float(f"{value:.6g}")
