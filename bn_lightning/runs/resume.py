"""What a run goes on from, and whether it is the same run."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.runs.directory import LAST
from bn_lightning.runs.record import FILE_NAME, RunRecord, read_run
from bn_lightning.runs.trust import check_plain

# A run is one configuration: resuming may change how it is run and watched, not what is trained.
_FREE_ON_RESUME = {
    "callbacks",
    "ckpt_path",
    "extras",
    "logger",
    "paths",
    "resume",
    "task_name",
    "trainer",
    "trusted",
}

_FREE_DATA = ("root", "num_workers")

_KEPT_ON_RESUME = ("started", "resumed_at", "data", "metrics", "steps", "seconds")


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run goes on."""

    path: Path
    content: dict[str, Any]
    record: dict[str, Any] | None  # of the run that goes on, None for a new one


def go_on(config: DictConfig, record: RunRecord, directory: Path) -> Start:
    """Take over what the run's record already holds, if there is something to go on with.

    What the configuration derives from the trainer's, such as a schedule over trainer.max_steps,
    becomes in `config` what it was when the run began.

    Returns:
        The checkpoint of `config.ckpt_path`.

    Raises:
        ValueError: the run is at its end already, or the configuration is another one.
        UntrustedError: what the run began with has interpolations, which would be evaluated.
    """
    from bn_lightning.runs.checkpoint import load_checkpoint

    path = directory / LAST if config.ckpt_path == "last" else Path(config.ckpt_path)
    checkpoint = load_checkpoint(path)
    before = read_run(directory) if (directory / "run.json").exists() else None
    start = Start(path, checkpoint, copy.deepcopy(before))
    steps, max_steps = checkpoint["global_step"], config.trainer.max_steps
    # With all its steps and without its test, a run was stopped in between.
    is_over = before is None or before["status"] in ("completed", "diverged", "pruned")
    if steps > max_steps or (steps == max_steps and is_over):
        raise ValueError(
            f"`ckpt_path` expected a checkpoint with less than trainer.max_steps={max_steps} "
            f"steps, got {steps} in {path}; raise trainer.max_steps, or leave ckpt_path out "
            "to start a new run"
        )
    if before is None:
        return start  # The checkpoint lies outside a run: a new one starts from it.
    begun = before["config"]
    check_plain(begun, str(directory / FILE_NAME))
    with_its_trainer = OmegaConf.merge(config, {"trainer": begun["trainer"]})
    compared: Any = OmegaConf.to_container(with_its_trainer, resolve=True)
    old, new = (
        {key: value for key, value in content.items() if key not in _FREE_ON_RESUME}
        for content in (begun, compared)
    )
    for part in (old, new):
        # The same files may lie elsewhere by now; their hashes are in the checkpoint.
        part["data"] = {k: v for k, v in part["data"].items() if k not in _FREE_DATA}
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(
            f"`ckpt_path` expected the configuration that the run in {directory} began with, got "
            f"another {', '.join(changed)}; repeat its overrides, or leave ckpt_path out to start "
            "a new run"
        )
    resolved = record.content["config"]
    for key in old.keys() - {"data"}:
        if resolved[key] != begun[key]:
            resolved[key] = config[key] = begun[key]
            print(f"{key} stays as the run began with it: {begun[key]}")
    record.content.update({key: before[key] for key in _KEPT_ON_RESUME if key in before})
    return start
