"""Check the configuration of `bn_lightning.train` before anything is built or written.

Constructors of this project check their own arguments. Here is what they cannot say: values that
torch, Lightning or Hydra accept or refuse without the name of the key, and nodes of another kind.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig

from bn_lightning.cli.command import in_sweep, is_typed
from bn_lightning.runs.machine import MAX_PROCESSES
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.sweeps.engine.processes import is_called

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
    """Refuse values that no run can use, a GPU that is not there, and a sweep without -m.

    Args:
        config: composed from `conf/train.yaml`, resolved, as plain dictionaries and lists.

    Raises:
        ValueError: names the key, what was expected and what came.
    """
    _check_values(config)
    if config["trainer"].get("accelerator") == "gpu":
        from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

        if not (CUDAAccelerator.is_available() or MPSAccelerator.is_available()):
            raise ValueError(
                "expected `trainer.accelerator=gpu` to find a GPU, got none that torch sees; use"
                " trainer=cpu"
            )
    if in_trial():
        _check_objective(config)
    else:
        _refuse_single_run_of_sweep()


def check_trial(config: Mapping[str, Any]) -> None:
    """Refuse a sweep whose first trial could only fail, for `hydra.sweeper.check`.

    The trials may run on other machines, so no GPU is looked for.

    Args:
        config: of the first trial, as for `check_config`.

    Raises:
        ValueError: as from `check_config`.
    """
    _check_values(config)
    _check_objective(config)


def _check_values(config: Mapping[str, Any]) -> None:
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
    for name, node in config["callbacks"].items():
        monitor = str((node or {}).get("monitor"))
        if monitor.startswith("val/") and str(node["_target_"]).endswith(".EarlyStopping"):
            _check_validates(trainer, f"callbacks.{name} stops the run by its {monitor}")


def _check_objective(config: Mapping[str, Any]) -> None:
    """Refuse a trial that ends before the metric of its sweep is measured."""
    if not HydraConfig.initialized():
        return
    metric = HydraConfig.get().sweeper.get("metric")
    names = [metric] if isinstance(metric, str) else metric or []
    for name in names:
        if str(name).startswith("val/"):
            _check_validates(config["trainer"], f"the sweep chooses trials by their {name}")


def _check_validates(trainer: Mapping[str, Any], reason: str) -> None:
    """Refuse a budget that ends before the first validation.

    Whether a run of epochs is validated after a number of steps depends on the data, too.
    """
    if trainer.get("fast_dev_run"):
        return
    if trainer.get("limit_val_batches") in (0, 0.0):
        raise ValueError(
            f"expected `trainer.limit_val_batches` to be above 0, as {reason}, got 0; leave it out"
        )
    limit, key = "max_epochs", "check_val_every_n_epoch"
    if trainer.get(key, 1) is None:  # steps are counted across epochs
        limit, key = "max_steps", "val_check_interval"
    most, interval = trainer.get(limit), trainer.get(key, 1)
    if type(interval) is int and type(most) is int and interval > most > 0:
        raise ValueError(
            f"expected `trainer.{limit}` to be at least trainer.{key}={interval}, as {reason}, "
            f"got {most}; set trainer.{key}={most} or less"
        )


def _refuse_single_run_of_sweep() -> None:
    """Refuse `+sweep=NAME` in a single run, unless each key of the sweep has a typed value.

    The command that repeats a trial is of that kind.
    """
    if not is_typed("sweep") or in_sweep():
        return
    hydra = HydraConfig.get()
    missing = [key for key in hydra.sweeper.get("params") or () if not is_typed(key)]
    if missing:
        name = hydra.runtime.choices.get("sweep")
        advice = "call run_sweep" if is_called() else "add -m"
        raise ValueError(
            f"expected `+sweep={name}` to be of a multirun, got a single run without a value of "
            f"{', '.join(missing)}; {advice}, or leave +sweep={name} out"
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
