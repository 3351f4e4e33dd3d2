"""The accuracy curves of the BatchNorm paper.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 1(a), digitized from the vector paths of the
PDF; paper_figure1a.json has all points.
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
    """Return arm -> (step, test accuracy) points of the paper's Figure 1(a)."""
    file = files("bn_lightning.sweeps.analysis").joinpath("paper_figure1a.json")
    curves = json.loads(file.read_text(encoding="utf-8"))["acc"]
    return {arm: tuple((step, value) for step, value in curves[key]) for key, arm in _ARMS.items()}


STEPS = 50_000
"""The budget of the paper's Figure 1."""


def is_paper_experiment(record: Mapping[str, Any]) -> bool:
    """Return whether a run repeats the experiment of the paper's Figure 1.

    That is MNIST, three hidden layers of 100 sigmoid units, 60 examples a step, `STEPS` steps, and
    BatchNorm, if any, before the sigmoids.

    Args:
        record: the content of the run's run.json.
    """
    config = record.get("config") or {}
    network = (config.get("model") or {}).get("network") or {}
    return (
        (record.get("data") or {}).get("source") == "mnist"
        and list(network.get("widths") or []) == [100, 100, 100]
        and network.get("activation") == "sigmoid"
        and network.get("norm_position") == "before"
        and (config.get("data") or {}).get("batch_size") == 60
        and (config.get("trainer") or {}).get("max_steps") == STEPS
    )
