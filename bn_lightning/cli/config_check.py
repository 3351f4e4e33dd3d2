"""Check the configuration of `bn_lightning.train` before anything is built or written.

Constructors of this project check their own arguments. Here is what they cannot say: values that
torch, Lightning or Hydra accept or refuse without the name of the key, and nodes of another kind.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig

from bn_lightning.runs.machine import MAX_PROCESSES
from bn_lightning.sweeps.engine.environment import in_trial

_ABSENT = object()


class _Check(NamedTuple):
    """A rule for the value of a key.

    Attributes:
        expected: completes "expected `key` to be ...".
        allows: whether the rule allows a value.
    """

    expected: str
    allows: Callable[[Any], bool]


def _integer(least: int, most: float = math.inf) -> _Check:
    expected = f"an integer of at least {least}"
    return _Check(
        expected if most == math.inf else f"an integer from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _or_null(check: _Check) -> _Check:
    return _Check(f"{check.expected}, or null", lambda value: value is None or check.allows(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_node(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and "_target_" in value
        and type(value.get("_partial_", False)) is bool
    )


_POSITIVE = _Check("a positive number", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = _Check("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_TEXT = _Check("text", lambda value: isinstance(value, str) and value != "")
_BOOLEAN = _Check("true or false", lambda value: type(value) is bool)
_LIMIT = _Check(
    "an integer of at least 1, or -1 for no limit",
    lambda value: type(value) is int and (value >= 1 or value == -1),
)
_NODE = _Check("a `_target_` and its arguments, with `_partial_` true or false", _is_node)
_NODES = _Check(
    "names, each null or with a `_target_` and its arguments",
    lambda value: (
        isinstance(value, Mapping)
        and all(node is None or _is_node(node) for node in value.values())
    ),
)

_CHECKS: dict[str, _Check] = {
    "task_name": _TEXT,
    "seed": _integer(0),
    "ckpt_path": _or_null(_TEXT),
    "paths.output_dir": _TEXT,
    "extras.num_threads": _or_null(_integer(1, MAX_PROCESSES)),
    "extras.figures": _BOOLEAN,
    "extras.batch_norms": _BOOLEAN,
    "extras.step_table": _BOOLEAN,
    "data": _NODE,
    "model": _NODE,
    "model.network": _NODE,
    "norm": _or_null(_NODE),
    "init": _or_null(_NODE),
    "init.std": _NOT_NEGATIVE,
    "init.bound": _NOT_NEGATIVE,
    "optimizer": _NODE,
    "optimizer.lr": _POSITIVE,
    "scheduler": _or_null(_NODE),
    "scheduler.T_max": _POSITIVE,  # -1 where it follows trainer.max_steps=-1
    "trainer": _NODE,
    "trainer.max_steps": _LIMIT,
    "trainer.max_epochs": _or_null(_LIMIT),
    "trainer.val_check_interval": _POSITIVE,
    "callbacks": _NODES,
    "logger": _NODES,
}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse values that no run can use, and a GPU that is not there.

    Args:
        config: composed from `conf/train.yaml`, resolved, as plain dictionaries and lists.

    Raises:
        ValueError: names the key, what was expected and what came.
    """
    for key, check in _CHECKS.items():
        value = _select(config, key)
        if value is _ABSENT and (check in (_POSITIVE, _NOT_NEGATIVE) or key == "model.network"):
            continue  # an argument that not every class has
        value = None if value is _ABSENT else value
        if not check.allows(value):
            raise ValueError(f"expected `{key}` to be {check.expected}, got {value!r}")
    trainer = config["trainer"]
    if trainer["max_steps"] == -1 and not _ends_otherwise(trainer):
        raise ValueError(
            "expected `trainer.max_steps` to be at least 1 where nothing else ends the run, got -1;"
            " set it, or trainer.max_epochs"
        )
    devices = trainer.get("devices")
    if type(devices) is int and devices > MAX_PROCESSES:
        raise ValueError(f"expected `trainer.devices` to be at most {MAX_PROCESSES}, got {devices}")
    if trainer.get("accelerator") == "gpu":
        from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

        if not (CUDAAccelerator.is_available() or MPSAccelerator.is_available()):
            raise ValueError(
                "expected `trainer.accelerator=gpu` to find a GPU, got none that torch sees; use"
                " trainer=cpu"
            )
    if _never_validates(trainer) and _is_chosen_by_validation():
        steps, interval = trainer["max_steps"], trainer["val_check_interval"]
        raise ValueError(
            f"expected `trainer.max_steps` to be at least trainer.val_check_interval={interval}, as"
            f" this trial is chosen by its validation, got {steps}; set "
            f"trainer.val_check_interval={steps} or less"
        )


def _select(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _ends_otherwise(trainer: Mapping[str, Any]) -> bool:
    """Return whether a run without a number of steps has another end."""
    epochs = trainer.get("max_epochs")
    has_epochs = type(epochs) is int and epochs >= 1
    return has_epochs or bool(trainer.get("max_time")) or bool(trainer.get("fast_dev_run"))


def _never_validates(trainer: Mapping[str, Any]) -> bool:
    """Return whether the budget ends before an interval that counts steps across epochs."""
    interval = trainer.get("val_check_interval")
    return (
        type(interval) is int
        and interval > trainer["max_steps"] > 0
        and trainer.get("check_val_every_n_epoch", 1) is None
        and not trainer.get("fast_dev_run")
    )


def _is_chosen_by_validation() -> bool:
    """Return whether this is a trial of a sweep over a metric such as `val/accuracy`."""
    if not in_trial() or not HydraConfig.initialized():
        return False
    metric = HydraConfig.get().sweeper.get("metric")
    names = [metric] if isinstance(metric, str) else metric or []
    return any(str(name).startswith("val/") for name in names)
