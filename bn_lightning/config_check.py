"""What people type, checked before anything is built from it."""

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf


def _integer(low: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer of at least {low}", lambda value: type(value) is int and value >= low


def _number(text: str, allowed: Callable[[float], bool]) -> tuple[str, Callable[[Any], bool]]:
    return text, lambda value: _is_number(value) and allowed(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_POSITIVE = _number("a positive number", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)

_ABSENT = object()

_CHECKS = {
    "seed": _integer(0),
    "data.batch_size": _integer(1),
    "optimizer.lr": _POSITIVE,
    "optimizer.momentum": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "norm.eps": _POSITIVE,
    "norm.momentum": (
        "a number in [0, 1], or null",
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    ),
    "init.std": _NOT_NEGATIVE,
    "init.bound": _NOT_NEGATIVE,
    "trainer.max_steps": _integer(1),
    "trainer.val_check_interval": _POSITIVE,
    "trainer.log_every_n_steps": _integer(0),
}


def check_config(config: DictConfig) -> None:
    """Refuse numbers that no run can use, and a GPU that is not there.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    for key, (expected, allowed) in _CHECKS.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is not _ABSENT and not allowed(value):
            raise ValueError(f"`{key}` expected {expected}, got {value!r}")
    gpu = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    if config.trainer.accelerator == "gpu" and not gpu:
        raise ValueError(
            "`trainer.accelerator=gpu` expected a GPU, torch sees none; use trainer=cpu"
        )
