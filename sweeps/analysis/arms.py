"""The arms of a comparison: what they are called, and the colours they keep in every picture."""

from collections.abc import Iterable
from dataclasses import dataclass

BASELINE = "none"
"""The arm that the others are compared with."""

# Okabe & Ito's colours, told apart by the colour-blind and by their lightness in grey, with a grey
# for their black, which a dark page would hide.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")

_LABELS = {
    "batch": "with BatchNorm",
    BASELINE: "without BatchNorm",
    "torch": "with torch's BatchNorm",
}


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, in matplotlib's words.

    Args:
        colour: hexadecimal.
        line: style of its lines.
        marker: symbol of its points.
    """

    colour: str
    line: str
    marker: str


def label_of(arm: str) -> str:
    """What an arm is called in sentences and legends."""
    return _LABELS.get(arm, arm)


def ordered(arms: Iterable[str]) -> list[str]:
    """The arms without repetition: those of `norm` in a fixed order, then others by name."""
    known = list(_LABELS)
    found = set(arms)
    return [arm for arm in known if arm in found] + sorted(found.difference(known))


def style_of(arm: str, arms: Iterable[str] = (), turn: int = 0) -> Style:
    """The style of an arm, whatever else is drawn beside it and in whatever order.

    Args:
        arm: its name.
        arms: all that are drawn; those unknown here take colours in the order of their names.
        turn: 1, 2, ... for the second, third... line of this arm: another line style.
    """
    known = list(_LABELS)
    others = [name for name in ordered([*arms, arm]) if name not in known]
    place = known.index(arm) if arm in known else len(known) + others.index(arm)
    style = place // len(COLOURS) if arm not in known else place
    return Style(
        COLOURS[place % len(COLOURS)],
        LINES[(style + turn) % len(LINES)],
        MARKERS[(place + turn) % len(MARKERS)],
    )
