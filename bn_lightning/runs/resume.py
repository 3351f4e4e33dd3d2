"""Resume a run: read its checkpoint, and check that the configuration is the one it began with."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import bn_lightning
from bn_lightning.runs.directory import RUN_FILE, resumed_checkpoint
from bn_lightning.runs.record import RunRecord, read_run, stop_sentence
from bn_lightning.runs.trust import check_plain

# A run is one configuration. Resuming it may change how it is run and watched, not what it trains.
_FREE = {"callbacks", "ckpt_path", "extras", "logger", "paths", "resume", "task_name", "trainer"}
_FREE |= {"trusted"}  # a key of version 0.1.0
_FREE_DATA = {"root", "num_workers"}
# A copied checkpoint may start a run of another configuration, but not where that would have no
# effect: the checkpoint's state replaces what these make.
_REPLACED = {"init", "optimizer", "scheduler"}

_KEPT = ("started", "resumed_at", "data", "metrics", "stack", "steps", "seconds")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from.

    Attributes:
        path: the checkpoint file.
        content: from `load_checkpoint`.
        record: run.json as the resumed run left it; None if a new run starts from the checkpoint.
    """

    path: Path
    content: dict[str, Any]
    record: dict[str, Any] | None


def read_resume_point(config: DictConfig, record: RunRecord, directory: Path) -> ResumePoint:
    """Read the checkpoint of `config.ckpt_path`, and copy the past of its run into `record`.

    What the configuration derives from the trainer's, such as a schedule over trainer.max_steps,
    becomes in `config` what it was when the run began.

    Raises:
        ValueError: the run has ended, the configuration is not the one that it began with, or the
            checkpoint lacks the optimizer's state, as the best.ckpt of a stack's member does.
        UntrustedError: the configuration of the run contains interpolations, which would be
            evaluated.
    """
    from bn_lightning.runs.checkpoint import CONFIG_KEY, load_checkpoint

    path = resumed_checkpoint(config.ckpt_path, directory)
    checkpoint = load_checkpoint(path)
    before = read_run(directory) if (directory / RUN_FILE).exists() else None
    if "optimizer_states" not in checkpoint:
        in_stack = before is not None and "stack" in before
        raise ValueError(
            "expected `ckpt_path` to be a checkpoint with the optimizer's state, got "
            f"{path}{' of a run in a stack' * in_stack} without; "
            f"{'name its last.ckpt, or ' * in_stack}leave ckpt_path out to start a new run"
        )
    _refuse_ended(path, checkpoint["global_step"], config, before, directory)
    resume_point = ResumePoint(path, checkpoint, copy.deepcopy(before))
    resolved = record.content["config"]
    if before is not None:
        version = (before.get("versions") or {}).get("bn-lightning")
        file = directory / RUN_FILE
        _restore_derived_values(config, resolved, before["config"], file, version)
        record.content.update({key: before[key] for key in _KEPT if key in before})
    elif CONFIG_KEY in checkpoint.get("hyper_parameters", {}):
        begun = checkpoint["hyper_parameters"][CONFIG_KEY]
        _restore_derived_values(config, resolved, begun, path)
    return resume_point


def _refuse_ended(
    path: Path, steps: int, config: DictConfig, before: dict[str, Any] | None, directory: Path
) -> None:
    """Refuse the checkpoint of a run that would end at once.

    Args:
        path: of the checkpoint.
        steps: of the checkpoint.
        config: with which the run is resumed.
        before: run.json of the run, None if there is none.
        directory: of the run.
    """
    max_steps = config.trainer.max_steps
    status = None if before is None else before["status"]
    is_end = before is not None and steps >= before.get("steps", 0)
    if before is not None and is_end and status == "completed":
        begun = before["config"]["trainer"]
        budget = ("max_steps", "max_epochs", "max_time")
        has_its_steps = steps >= max_steps > 0
        if has_its_steps or all(begun.get(k) == config.trainer.get(k) for k in budget):
            key = f"trainer.max_steps above {steps}" if has_its_steps else "trainer.max_epochs"
            raise ValueError(
                f"expected `ckpt_path` to name a run that is not finished, got {directory}, which "
                f"completed its {steps:,} steps; raise {key} to train it further, or leave "
                "ckpt_path out to start a new run"
            )
    # A run with all its steps but another status was stopped before its test.
    is_over = status in (None, "completed", "diverged", "pruned")
    if steps > max_steps > 0 or (steps == max_steps and is_over):
        raise ValueError(
            f"expected `ckpt_path` to be a checkpoint of fewer than trainer.max_steps={max_steps} "
            f"steps, got {steps} in {path}; raise trainer.max_steps, or leave ckpt_path out to "
            "start a new run"
        )
    if before is None or not is_end:
        return
    begun = before["config"]
    is_same_stop = begun["callbacks"].keys() <= config.callbacks.keys() and (
        begun["trainer"].get("max_time") == config.trainer.get("max_time")
    )
    if status == "stopped early" and is_same_stop:
        # Lightning restores the state and the patience of what stopped it.
        raise ValueError(
            f"expected `ckpt_path` to be a checkpoint of a run that has not ended, got {path} of "
            f"one that {stop_sentence(before)}; leave out what stopped it, or leave ckpt_path out"
            " to start a new run"
        )


def _restore_derived_values(
    config: DictConfig,
    resolved: dict[str, Any],
    begun: dict[str, Any],
    file: Path,
    version: str | None = None,
) -> None:
    """Give numbers that are derived from the trainer's the values that the run began with.

    Args:
        config: with which training continues.
        resolved: the same, resolved.
        begun: the configuration of the run.
        file: which has that: the run's run.json, or a copied checkpoint.
        version: of this package, which began the run, if that is known.

    Raises:
        ValueError: the configuration is another one.
        UntrustedError: as for `read_resume_point`.
    """
    check_plain(begun, str(file))
    numbers = {k: v + 1 for k, v in config.trainer.items() if type(v) in (int, float)}
    other_trainer = OmegaConf.merge(config, {"trainer": numbers})
    other: Any = OmegaConf.to_container(other_trainer, resolve=True)
    keys = (begun.keys() | resolved.keys()) - _FREE if file.name == RUN_FILE else _REPLACED
    changed = [
        key
        for key in sorted(keys)
        if not _is_same(_fixed(begun, key), _fixed(resolved, key), _fixed(other, key))
    ]
    if changed:
        is_old = version not in (None, bn_lightning.__version__)
        raise ValueError(
            f"expected `ckpt_path` to be resumed with the configuration that the run of {file} "
            f"began with, got another {', '.join(changed)}; "
            + f"resume it with bn_lightning {version}, which wrote it, " * is_old
            + "repeat its overrides, or leave ckpt_path out to start a new run"
        )
    for key in keys & begun.keys() - {"data"}:
        if resolved[key] != begun[key]:
            config[key] = begun[key]
            print(f"{key} stays as the run began with it: {begun[key]}")
    final: Any = OmegaConf.to_container(config, resolve=True)
    resolved.update(final)


def _is_same(begun: Any, now: Any, other: Any) -> bool:
    """Return whether a value of the configuration is what it was when the run began.

    A number that is derived from the trainer's is `other` with another trainer, and may differ. A
    node in its place could name what to build.
    """
    if isinstance(begun, dict) and isinstance(now, dict):
        keys = begun.keys()
        return keys == now.keys() and all(_is_same(begun[k], now[k], other[k]) for k in keys)
    is_derived = now != other and isinstance(begun, int | float)
    return begun == now or is_derived


def _fixed(config: dict[str, Any], key: str) -> Any:
    """Return a value of a configuration, without what may change."""
    if key == "data":
        # The files may have moved; their hashes are in the checkpoint.
        return {k: v for k, v in config["data"].items() if k not in _FREE_DATA}
    return config.get(key)
