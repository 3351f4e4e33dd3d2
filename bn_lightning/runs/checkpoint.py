"""Reading checkpoints: never a pickle, and never into a network they do not fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.runs.trust import OF_CHECKPOINTS, UntrustedError, check_plain, check_trusted

CONFIG_KEY = "config"
"""The hyperparameter under which `train.py` keeps the run's resolved configuration."""


METRICS_KEY = "metrics"
"""Where a checkpoint of `RunCheckpoints` holds the metrics known at its step, as plain numbers."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that does not fit."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint onto the CPU with `weights_only=True`.

    Raises:
        CheckpointError: there is no such file, or it is no Lightning checkpoint.
    """
    if not Path(path).is_file():
        found = "no such file"
        if str(path) == "last":
            found += "; `last` is what bn-train goes on with, elsewhere give the path"
        elif Path(path).is_dir():
            best = [*Path(path).glob("best.ckpt"), *Path(path).glob("checkpoints/best.ckpt")]
            found = "a directory" + "".join(f"; give {file}" for file in best)
        raise CheckpointError(f"`ckpt_path` expected a checkpoint file, got {path}: {found}")
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                # Of the format before torch 1.6: some bytes of it can ask for gigabytes.
                raise ValueError("no zip archive")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over in a file that is no pickle
        raise CheckpointError(
            f"`ckpt_path` expected a checkpoint of plain tensors, got {path}, which is none or is "
            "damaged; give another"
        ) from error
    missing = {"state_dict", "global_step"} - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise CheckpointError(
            f"`ckpt_path` expected a Lightning checkpoint, got {path}, which has no "
            f"{' and no '.join(sorted(missing, reverse=True))}"
        )
    return checkpoint


def check_fits(checkpoint: dict[str, Any], module: nn.Module, path: str | Path) -> None:
    """Compare names and shapes of the weights with the module's.

    Raises:
        CheckpointError: naming the first that differs.
    """
    found, wanted = (
        {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        for state in (checkpoint["state_dict"], module.state_dict())
    )
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"`ckpt_path` expected a checkpoint of this network, got one of another in {path}: "
                f"{name} is {_shape(found, name)} there and {_shape(wanted, name)} here; use the "
                "model and norm it was trained with"
            )


def trained_model(checkpoint: dict[str, Any], run_config: dict[str, Any], path: str | Path) -> Any:
    """Builds the LightningModule that a checkpoint was written of, and gives it the weights.

    Args:
        checkpoint: from `load_checkpoint`.
        run_config: from `trusted_config`.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: its weights are of another network than its configuration builds.
    """
    from hydra.utils import instantiate

    model = instantiate(run_config["model"])
    check_fits(checkpoint, model, path)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def class_names(checkpoint: dict[str, Any], datamodule: Any, count: int) -> list[str]:
    """Names of the outputs: what the checkpoint keeps of its data's classes, else their numbers.

    Args:
        checkpoint: from `load_checkpoint`.
        datamodule: built from its configuration.
        count: of the outputs; those above the number of classes have numbers.
    """
    state = checkpoint.get(type(datamodule).__qualname__) or {}
    names = [str(name) for name in state.get("classes", ())][:count]
    return names + [str(i) for i in range(len(names), count)]


def check_data(checkpoint: dict[str, Any], datamodule: Any) -> None:
    """Let a data module compare what the checkpoint keeps of the one it was trained with.

    Nothing is compared where that was one of another class.

    Raises:
        ValueError: the data module's own, now or when it is set up.
    """
    # Where Lightning keeps it.
    state = checkpoint.get(type(datamodule).__qualname__)
    if state is not None:
        datamodule.load_state_dict(state)


def trusted_config(checkpoint: dict[str, Any], trusted: Sequence[str], path: str) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, whose data and network are trusted.

    Its data's `archive` is left out: the data have to be there, or be given anew.

    Args:
        checkpoint: from `load_checkpoint`.
        trusted: what it may build beside `OF_CHECKPOINTS`, see `check_trusted`.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: `bn_lightning.train` did not write it.
        UntrustedError: it would build something that it may not.
    """
    hyper_parameters = checkpoint.get("hyper_parameters")
    config = hyper_parameters.get(CONFIG_KEY) if isinstance(hyper_parameters, dict) else None
    if not isinstance(config, dict) or not {"data", "model"} <= config.keys():
        raise CheckpointError(
            f"`ckpt_path` expected a checkpoint that bn_lightning.train wrote, got {path}, which "
            "holds no configuration of data and model"
        )
    built = {key: config[key] for key in ("data", "model")}
    check_plain(built, path)
    check_trusted(built, OF_CHECKPOINTS, trusted, path)
    data = config["data"]
    if not isinstance(data, dict) or "_args_" in data:
        raise UntrustedError(f"`data` in {path} expected arguments by name, got {data}")
    if data.get("archive") is not None:
        # It would be unpacked wherever a stranger's checkpoint says.
        config = {**config, "data": {**data, "archive": None}}
    return config


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "absent"
