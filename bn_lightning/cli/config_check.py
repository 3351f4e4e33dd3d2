"""What people type, checked before anything is built from it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bn_lightning.runs.machine import MOST_PROCESSES
from bn_lightning.sweeps.engine.environment import in_trial


def _integer(low: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer of at least {low}", lambda value: type(value) is int and value >= low


def _number(text: str, allowed: Callable[[float], bool]) -> tuple[str, Callable[[Any], bool]]:
    return text, lambda value: _is_number(value) and allowed(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_POSITIVE = _number("a positive number", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)

_ABSENT = object()

_Check = tuple[str, Callable[[Any], bool]]

_TEXT: _Check = ("text", lambda value: isinstance(value, str) and value != "")
_BOOLEAN: _Check = ("true or false", lambda value: type(value) is bool)
_GROUP: _Check = ("keys with values", lambda value: isinstance(value, Mapping))
_BUILT: _Check = (
    "a `_target_` and its arguments, with `_partial_` true or false",
    lambda value: (
        isinstance(value, Mapping)
        and "_target_" in value
        and type(value.get("_partial_", False)) is bool
    ),
)
_SEVERAL: _Check = (
    "names, each null or with a `_target_` and its arguments",
    lambda value: (
        isinstance(value, Mapping)
        and all(node is None or _BUILT[1](node) for node in value.values())
    ),
)


def _or_null(check: _Check) -> _Check:
    text, allowed = check
    return f"{text}, or null", lambda value: value is None or allowed(value)


_NODES: dict[str, _Check] = {
    "task_name": _TEXT,
    "ckpt_path": _or_null(_TEXT),
    "trusted": (
        "a list of beginnings of names",
        lambda value: isinstance(value, list) and all(map(_TEXT[1], value)),
    ),
    "paths": _GROUP,
    "paths.output_dir": _TEXT,
    "extras": _GROUP,
    "extras.num_threads": (
        f"an integer from 1 to {MOST_PROCESSES}, or null",
        lambda value: value is None or (type(value) is int and 1 <= value <= MOST_PROCESSES),
    ),
    "extras.figures": _BOOLEAN,
    "extras.batch_norms": _BOOLEAN,
    "extras.step_table": _BOOLEAN,
    "data": _BUILT,
    "model": _BUILT,
    "model.network": _BUILT,
    "model.optimizer": _or_null(_BUILT),
    "model.scheduler": _or_null(_BUILT),
    "norm": _or_null(_BUILT),
    "init": _BUILT,
    "optimizer": _BUILT,
    "scheduler": _or_null(_BUILT),
    "trainer": _BUILT,
    "callbacks": _SEVERAL,
    "logger": _SEVERAL,
}

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


def check_nodes(resolved: Mapping[str, Any]) -> None:
    """Refuse a configuration that has something else where the command looks for a part of it.

    Args:
        resolved: composed from `conf/train.yaml`, as plain values.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    for key, (expected, allowed) in _NODES.items():
        value: Any = resolved
        for name in key.split("."):
            value = value.get(name)
        if not allowed(value):
            raise ValueError(f"`{key}` expected {expected}, got {value!r}")


def check_config(config: DictConfig) -> None:
    """Refuse numbers that no run can use, and a GPU that is not there.

    A run may end before its first validation, unless it is a trial of a sweep for a number of that.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    for key, (expected, allowed) in _CHECKS.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is not _ABSENT and not allowed(value):
            raise ValueError(f"`{key}` expected {expected}, got {value!r}")
    devices = config.trainer.get("devices", 1)
    if type(devices) is int and devices > MOST_PROCESSES:
        raise ValueError(f"`trainer.devices` expected at most {MOST_PROCESSES}, got {devices}")
    gpu = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    if config.trainer.accelerator == "gpu" and not gpu:
        raise ValueError(
            "`trainer.accelerator=gpu` expected a GPU, torch sees none; use trainer=cpu"
        )
    if _is_chosen_by_validation() and _never_validates(config.trainer):
        steps = config.trainer.max_steps
        raise ValueError(
            f"`trainer.max_steps={steps}` ends this trial before its first validation, by which it "
            f"is chosen, of trainer.val_check_interval={config.trainer.val_check_interval}; set "
            f"trainer.val_check_interval={steps} or less"
        )


def _never_validates(trainer: DictConfig) -> bool:
    """Whether the steps are over before the interval, which is of steps where epochs set none."""
    interval, steps = trainer.get("val_check_interval"), trainer.get("max_steps")
    return (
        type(interval) is int
        and type(steps) is int
        and interval > steps
        and trainer.get("check_val_every_n_epoch", 1) is None
        and not trainer.get("fast_dev_run")
    )


def _is_chosen_by_validation() -> bool:
    """Whether this is a trial of a sweep for a metric such as `val/accuracy`."""
    if not in_trial() or not HydraConfig.initialized():
        return False
    metric = HydraConfig.get().sweeper.get("metric")
    names = [metric] if isinstance(metric, str) else metric or []
    return any(str(name).startswith("val/") for name in names)
