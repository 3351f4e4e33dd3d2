"""The arms of a comparison: their labels, order, colors and line styles."""

from collections.abc import Iterable
from dataclasses import dataclass

BASELINE = "none"
"""The arm that the others are compared with."""

# Okabe & Ito's colors, distinct for color-blind readers and in grayscale. Gray takes the place of
# their black, which is invisible on a dark page.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")

_LABELS = {
    "batch": "with BatchNorm",
    BASELINE: "without BatchNorm",
    "torch": "with torch's BatchNorm",
}


@dataclass(frozen=True)
class Style:
    """The color, line and marker of an arm.

    Attributes:
        color: hexadecimal.
        line: matplotlib's name of a line style.
        marker: matplotlib's name of a marker.
    """

    color: str
    line: str = "-"
    marker: str = "o"


def label_of(arm: str) -> str:
    """Return the name of an arm in sentences and legends."""
    return _LABELS.get(arm, arm)


def ordered(arms: Iterable[str]) -> list[str]:
    """Return the distinct arms: those of `norm` in a fixed order, then the others by name."""
    known = list(_LABELS)
    found = set(arms)
    return [arm for arm in known if arm in found] + sorted(found.difference(known))


def style_of(arm: str, arms: Iterable[str] = (), turn: int = 0) -> Style:
    """Return the style of an arm, which does not depend on the order of `arms`.

    Args:
        arm: its name.
        arms: all arms of the figure; unknown ones get colors in the order of their names.
        turn: 1, 2, ... for the second, third, ... line of this arm, which gets another line style.
    """
    known = list(_LABELS)
    others = [name for name in ordered([*arms, arm]) if name not in known]
    place = known.index(arm) if arm in known else len(known) + others.index(arm)
    style = place // len(COLORS) if arm not in known else place
    return Style(
        COLORS[place % len(COLORS)],
        LINES[(style + turn) % len(LINES)],
        MARKERS[(place + turn) % len(MARKERS)],
    )
