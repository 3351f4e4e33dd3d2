"""Conditions and verdicts in words: for the terminal, summary.json, the page, and figures."""

import math
from collections.abc import Mapping
from typing import Any

from bn_lightning.claims.verdict import HOLDS, HOLDS_IF


def effect_text(condition: Mapping[str, Any]) -> str:
    """Return an effect with its interval and unit: 1.20 [1.19, 1.21] a layer.

    Args:
        condition: of summary.json.
    """
    effect, unit = condition["effect"], condition["unit"]
    if effect["value"] is None or math.isnan(effect["value"]):
        return "nothing measured"
    interval = ""
    if effect["seeds"] > 1 and effect["low"] is not None and not math.isnan(effect["low"]):
        interval = f" [{effect['low']:.3g}, {effect['high']:.3g}]"
    least = "at least " * effect["at_least"]
    return f"{least}{effect['value']:.3g}{interval}{f' {unit}' if unit else ''}"


def bound_text(condition: Mapping[str, Any]) -> str:
    """Return what the rule asks for: at least 2, at most 0.1, 1.18 to 1.22.

    Args:
        condition: of summary.json.
    """
    least, most = condition["least"], condition["most"]
    if least is None:
        return f"at most {most:.3g}"
    return f"at least {least:.3g}" if most is None else f"{least:.3g} to {most:.3g}"


def outcome_text(condition: Mapping[str, Any]) -> str:
    """Return the outcome of a condition, with the reason if it is not decided.

    Args:
        condition: of summary.json.
    """
    reason = condition["reason"]
    return f"{condition['outcome']}: {reason}" if reason else condition["outcome"]


def short_verdict(entry: Mapping[str, Any]) -> str:
    """Return a verdict in a few words: holds in 2 of 3 conditions.

    Args:
        entry: of a claim in summary.json.
    """
    if entry["verdict"] != HOLDS_IF:
        return entry["verdict"]
    outcomes = [c["outcome"] for c in entry["conditions"] if not c["is_control"]]
    return f"holds in {outcomes.count(HOLDS)} of {len(outcomes)} conditions"


def verdict_row(name: str, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return a claim's name, verdict, and the effect and rule of its first condition.

    Args:
        name: of the claim.
        entry: of the claim in summary.json.
    """
    first = entry["conditions"][0]
    return name, entry["text"], f"{first['statement']}: {effect_text(first)}", bound_text(first)
