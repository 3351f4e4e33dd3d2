"""The arms of a comparison: their labels, order, colors and line styles."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BASELINE = "none"
"""The arm that the others are compared with."""

AS_CONFIGURED = "as configured"
"""The arm of a run without `norm`, and the value of what a study does not vary."""

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

# The callables of conf/norm/ -> arm. Synchronized BatchNorm belongs to the same arm.
_ARMS = {
    "bn_lightning.models.normalization.batch_norm": "batch",
    "bn_lightning.models.normalization.sync_batch_norm": "batch",
    "bn_lightning.models.normalization.ghost_batch_norm": "ghost",
    "bn_lightning.models.normalization.torch_batch_norm": "torch",
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


def arm_of_config(config: Mapping[str, Any]) -> str:
    """Return the arm of a run's `norm`: one of this module, or the name of its callable."""
    if "norm" not in config:
        return AS_CONFIGURED
    norm = config["norm"]
    if norm is None:
        return BASELINE
    name = str(norm.get("_target_", norm) if isinstance(norm, Mapping) else norm)
    return _ARMS.get(name, name)


def title_of(config: Mapping[str, Any]) -> str:
    """Return task, arm and seed of a run's configuration, those that it has, as a title."""
    arm = arm_of_config(config)
    parts = [str(config["task_name"])] if config.get("task_name") else []
    parts += [label_of(arm)] if arm != AS_CONFIGURED else []
    parts += [f"seed {config['seed']}"] if config.get("seed") is not None else []
    return ", ".join(parts)


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
