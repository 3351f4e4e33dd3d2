"""The paper's own curves, to draw beside ours.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1(a), digitised from the vector paths of the
PDF; paper_figure1a.json holds every point.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SOURCE = "Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1(a)"

_ARMS = {"bn": "batch", "nobn": "none"}


@cache
def paper_accuracy() -> dict[str, tuple[tuple[int, float], ...]]:
    """Arm -> the (step, test accuracy) points of the paper's Figure 1(a)."""
    text = (
        files("bn_lightning.sweeps.analysis")
        .joinpath("paper_figure1a.json")
        .read_text(encoding="utf-8")
    )
    curves = json.loads(text)["acc"]
    return {arm: tuple((step, value) for step, value in curves[key]) for key, arm in _ARMS.items()}


def is_paper_experiment(record: Mapping[str, Any]) -> bool:
    """Whether a run is the experiment of the paper's Figure 1.

    MNIST, three hidden layers of 100 sigmoid units, 60 examples a step, and BatchNorm, if any,
    before the sigmoids.

    Args:
        record: the run's run.json.
    """
    config = record.get("config") or {}
    network = (config.get("model") or {}).get("network") or {}
    return (
        (record.get("data") or {}).get("source") == "mnist"
        and list(network.get("widths") or []) == [100, 100, 100]
        and network.get("activation") == "sigmoid"
        and network.get("norm_position") == "before"
        and (config.get("data") or {}).get("batch_size") == 60
    )
