"""Which runs can be trained as one stack: read from their configurations."""

import json
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.same_architecture import NotStackableError

RUN_CHECKPOINTS = "bn_lightning.callbacks.RunCheckpoints"
LOSS_GUARD = "bn_lightning.callbacks.DivergenceGuard"
PROGRESS_BAR = "bn_lightning.callbacks.StepProgress"
PROBE = "bn_lightning.callbacks.ActivationPercentiles"
STEPS_TO_ACCURACY = "bn_lightning.callbacks.StepsToAccuracy"
OPTUNA_PRUNING = "bn_lightning.callbacks.OptunaPruning"
EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
NO_PROFILER = "bn_lightning.plugins.no_profiler.NoProfiler"
CSV_LOGGER = "bn_lightning.plugins.metrics_logger.MetricsCSVLogger"

# A stack is not resumed and shows no bar for a member.
_CALLBACKS = {
    RUN_CHECKPOINTS,
    LOSS_GUARD,
    PROBE,
    STEPS_TO_ACCURACY,
    EARLY_STOPPING,
    OPTUNA_PRUNING,
    "bn_lightning.callbacks.SameData",
    PROGRESS_BAR,
}
_TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer")
# Forwards under autocast to bf16.
MIXED = ("bf16-mixed", "bf16")
PRECISIONS = ("32-true", "64-true", *MIXED)
# Arguments of the Trainer whose every value a stack follows, or that change no result.
_FOLLOWED = {
    "_target_",
    "accelerator",
    "default_root_dir",
    "enable_model_summary",
    "gradient_clip_val",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "num_sanity_val_steps",
}
_ANY_NUMBER = "a number of each member"


def stack_key(config: Mapping[str, Any]) -> str:
    """Return a text that runs which can be one stack have in common.

    They may differ in the seed, in `init` and its numbers, in the numbers of the optimizer and the
    scheduler, and in `model.network.dropout`.

    Args:
        config: composed from `conf/train.yaml`, resolved, as plain dictionaries and lists.

    Raises:
        NotStackableError: no other run can be in a stack with this one; the message says why.
    """
    _check_trainer(config["trainer"])
    for group, known in (("callbacks", _CALLBACKS), ("logger", {CSV_LOGGER})):
        for name, node in config[group].items():
            if node is not None and node["_target_"] not in known:
                raise NotStackableError(f"`{group}.{name}` needs a run of its own")
            # Lightning's default checks once an epoch if validations are as rare.
            if node is not None and node.get("check_on_train_epoch_end", False) is not False:
                raise NotStackableError(f"`{group}.{name}` stops at the end of an epoch")
    if config.get("ckpt_path") is not None:
        raise NotStackableError("`ckpt_path` resumes a run")
    if config["model"].get("compile"):
        raise NotStackableError("`model.compile` compiles a single network")
    shared = {key: value for key, value in config.items() if key not in _FREE}
    shared["data"] = {key: value for key, value in config["data"].items() if key != "seed"}
    shared["model"] = model = dict(config["model"])
    for part in (shared, model):
        part |= {key: _without_numbers(part.get(key)) for key in ("optimizer", "scheduler")}
    network = model.get("network")
    if isinstance(network, Mapping) and isinstance(network.get("dropout"), int | float):
        model["network"] = {**network, "dropout": _ANY_NUMBER}
    shared = _without_directory(shared, str(config["paths"]["output_dir"]))
    return json.dumps(shared, sort_keys=True, default=repr)


def _without_directory(value: Any, directory: str) -> Any:
    """Return a configuration in which the run's directory is "."."""
    if isinstance(value, Mapping):
        return {key: _without_directory(item, directory) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_directory(item, directory) for item in value]
    if isinstance(value, str) and (value == directory or value.startswith(f"{directory}/")):
        return "." + value[len(directory) :]
    return value


_FREE = {"ckpt_path", "init", "paths", "resume", "seed", "task_name"}


def check_module(module: object) -> Classifier:
    """Return a LightningModule whose training a stack repeats.

    Raises:
        NotStackableError: it is no Classifier, trains in its own way, or has tensors besides those
            of its network and metrics.
    """
    kind = type(module)
    if not isinstance(module, Classifier):
        raise NotStackableError(f"`model` is {kind.__name__}, not a Classifier")
    for name in vars(LightningModule) | {"_evaluate": None}:
        is_step = name.startswith("on_") or name.endswith("_step") or name in _OWN_WAY
        if is_step and getattr(kind, name, None) is not getattr(Classifier, name, None):
            raise NotStackableError(f"`model` is {kind.__name__}, which has a `{name}` of its own")
    for name in module.state_dict():
        if not name.startswith(("network.", "evaluations.")):
            raise NotStackableError(f"`model` is {kind.__name__}, which has a tensor `{name}`")
    return module


_OWN_WAY = {"backward", "configure_gradient_clipping", "configure_optimizers", "forward"}
_OWN_WAY |= {"lr_scheduler_step", "optimizer_zero_grad", "setup", "configure_model"}


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    expected = {
        "check_val_every_n_epoch": trainer.get("check_val_every_n_epoch", 1) is None,
        "devices": trainer.get("devices") in (1, "1", [0]),
        "precision": trainer.get("precision", PRECISIONS[0]) in PRECISIONS,
        "val_check_interval": type(trainer.get("val_check_interval")) is int,
    }
    profiler = trainer.get("profiler") or {"_target_": NO_PROFILER}
    expected["profiler"] = isinstance(profiler, Mapping) and profiler["_target_"] == NO_PROFILER
    for name, is_followed in expected.items():
        if not is_followed:
            raise NotStackableError(f"`trainer.{name}` is {trainer.get(name)!r}")
    if trainer["max_steps"] < 0 and (trainer.get("max_epochs") or -1) < 0:
        raise NotStackableError("`trainer.max_steps` is unlimited")
    if trainer["_target_"] not in _TRAINERS:
        raise NotStackableError(f"`trainer` is {trainer['_target_']}")
    others = sorted(trainer.keys() - _FOLLOWED - expected.keys())
    others = [name for name in others if trainer[name] is not None]
    if others:
        raise NotStackableError(f"`trainer.{others[0]}` is {trainer[others[0]]!r}")


def _without_numbers(node: Any) -> Any:
    if isinstance(node, bool) or not isinstance(node, int | float | Mapping | list):
        return node
    if isinstance(node, Mapping):
        return {key: _without_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_numbers(value) for value in node]
    return _ANY_NUMBER
