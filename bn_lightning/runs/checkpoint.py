"""Read a checkpoint without unpickling it, and build what it was written from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.runs.trust import UntrustedError, check_plain, check_trusted

CONFIG_KEY = "config"
"""The hyperparameter under which a checkpoint holds the run's resolved configuration."""

METRICS_KEY = "metrics"
"""The key under which a checkpoint of `RunCheckpoints` holds the metrics logged so far."""

SECONDS_KEY = "seconds"
"""The key under which a checkpoint of `RunCheckpoints` holds the seconds of training so far."""


class CheckpointError(ValueError):
    """A file is not a checkpoint, or its content does not fit."""


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint that `bn_lightning.train` wrote, whose configuration may be built.

    Attributes:
        path: the checkpoint file, for messages.
        content: from `load_checkpoint`.
        config: the configuration of the run, from `trusted_config`.
    """

    path: str
    content: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: str, trusted: Sequence[str]) -> Self:
        """Read a checkpoint file. Raises what `load_checkpoint` and `trusted_config` raise."""
        content = load_checkpoint(path)
        return cls(path, content, trusted_config(content, trusted, path))

    def build_model(self) -> Any:
        """Build the LightningModule and load its weights.

        Raises:
            CheckpointError: the weights do not fit the network of the configuration.
        """
        model = self._build("model")
        check_fits(self.content, model, self.path)
        model.load_state_dict(self.content["state_dict"])
        return model

    def build_data(self, config: Any = None) -> Any:
        """Build the data module and give it its state from the checkpoint.

        Args:
            config: of another data module; None builds the one of the run. A data module of
                another class than the run's gets no state.

        Raises:
            ValueError: the data module refuses the state, here or in its `setup`.
        """
        from hydra.utils import instantiate

        datamodule = instantiate(config) if config else self._build("data")
        state = self._data_state(datamodule)
        if state is not None:
            datamodule.load_state_dict(state)
        return datamodule

    def class_names(self, datamodule: Any, count: int) -> list[str]:
        """Return a name for each of `count` outputs: of the data's classes, else the number."""
        state = self._data_state(datamodule) or {}
        names = [str(name) for name in state.get("classes", ())][:count]
        return names + [str(i) for i in range(len(names), count)]

    def _data_state(self, datamodule: Any) -> Any:
        return self.content.get(type(datamodule).__qualname__)  # where Lightning stores it

    def _build(self, key: str) -> Any:
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        try:
            return instantiate(self.config[key])
        except InstantiationException as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise CheckpointError(
                f"expected `{key}` in {self.path} to have arguments that this version of"
                f" bn_lightning knows, got: {error.__cause__}; use the version that wrote it"
            ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint onto the CPU with `weights_only=True`.

    Raises:
        CheckpointError: there is no such file, or it is no Lightning checkpoint.
    """
    if not Path(path).is_file():
        found = "no such file"
        if Path(path).is_dir():
            best = Path(path, "best.ckpt")
            found = "a directory; give " + (str(best) if best.exists() else "that of a run")
            if Path(path, RUN_FILE).exists():
                found = "a run that wrote none"
        raise CheckpointError(f"expected `ckpt_path` to be a checkpoint file, got {path}: {found}")
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                # A few bytes of the format before torch 1.6 can make torch allocate gigabytes.
                raise ValueError("no zip archive")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything for a file that is no pickle
        raise CheckpointError(
            f"expected `ckpt_path` to be a checkpoint of plain tensors, got {path}, which is none "
            "or is damaged; give another"
        ) from error
    missing = {"state_dict", "global_step"} - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise CheckpointError(
            f"expected `ckpt_path` to be a Lightning checkpoint, got {path}, which has no "
            f"{' and no '.join(sorted(missing, reverse=True))}"
        )
    return checkpoint


def check_fits(checkpoint: dict[str, Any], module: nn.Module, path: str | Path) -> None:
    """Compare the names and shapes of a checkpoint's weights with those of a module.

    Raises:
        CheckpointError: names the first weight that differs.
    """
    found, wanted = (
        {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        for state in (checkpoint["state_dict"], module.state_dict())
    )
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            there, here = (str(shapes.get(name, "absent")) for shapes in (found, wanted))
            raise CheckpointError(
                f"expected `ckpt_path` to be a checkpoint of this network, got {path}, in "
                f"which {name} is {there} there and {here} here; use the model and norm it was "
                "trained with"
            )


def trusted_config(checkpoint: dict[str, Any], trusted: Sequence[str], path: str) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint, once it may be built.

    The `archive` of its data is set to None: it would be unpacked where the checkpoint says.

    Args:
        checkpoint: from `load_checkpoint`.
        trusted: as for `check_trusted`.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: `bn_lightning.train` did not write the checkpoint.
        UntrustedError: `data` or `model` would build something that they may not build.
    """
    hyper_parameters = checkpoint.get("hyper_parameters")
    config = hyper_parameters.get(CONFIG_KEY) if isinstance(hyper_parameters, dict) else None
    if not isinstance(config, dict) or not {"data", "model"} <= config.keys():
        raise CheckpointError(
            f"expected `ckpt_path` to be a checkpoint that bn_lightning.train wrote, got {path}, "
            "which holds no configuration of data and model"
        )
    built = {key: config[key] for key in ("data", "model")}
    check_plain(built, path)
    check_trusted(built, trusted, path)
    data = config["data"]
    if not isinstance(data, dict) or "_args_" in data:
        raise UntrustedError(
            f"expected `data` in {path} to have arguments by name, got {data}; use a checkpoint"
            " that bn_lightning.train wrote"
        )
    if data.get("archive") is not None:
        config = {**config, "data": {**data, "archive": None}}
    return config
