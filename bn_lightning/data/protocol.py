"""The contract between a data module and the commands.

A data module is a `LightningDataModule` with `train_dataloader`, `val_dataloader` and
`test_dataloader`; no command needs more to load its batches, `(inputs, targets)`. These members are
optional:

- `info`: `train` and `evaluate` write it to run.json, and `callbacks.SameData` compares its
  `sha256`. If there is an `info`, it must have all of `INFO_KEYS`.
- `input_shape`: `export` reads it unless `input_shape` is configured; `train` reads it to explain
  a failure.
- `num_classes`: `models.Classifier` compares it with the number of outputs.
- `prediction_inputs`: `predict` requires it. Neither it nor `sample_inputs` can rely on `setup`:
  before them, commands only call `load_state_dict`, if the checkpoint has a state.
- `sample_inputs`: `export` compares the program with the network on these inputs instead of
  standard normal ones.
- `state_dict()["classes"]`: `predict` labels the outputs with these names instead of numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

INFO_KEYS = ("source", "sha256", "train", "validation", "test", "classes")
"""The keys that `info` must have."""


class DataModuleError(TypeError):
    """A data module that does not have what a command needs."""


class ImageFailure(NamedTuple):
    """An image that cannot be used.

    Attributes:
        name: path of the image, relative to the folder that was searched.
        message: what is wrong, with the full path.
    """

    name: str
    message: str


OnFailures = Callable[[Sequence[ImageFailure]], None]
"""Called with the images of a batch that cannot be used. If it returns, they are left out."""


class PredictionInputs(NamedTuple):
    """The samples in a file or folder, in batches for `predict`.

    Attributes:
        column: heading of the names in predictions.csv, such as "path".
        kind: plural noun for the samples, such as "images".
        names: of all samples, by index.
        batches: pairs of inputs (B, ...) float32 and indices (B,) int64 into `names`.
    """

    column: str
    kind: str
    names: Sequence[Any]
    batches: Iterable[tuple[Float[Tensor, "B ..."], Int[Tensor, "B"]]]


@runtime_checkable
class DescribedData(Protocol):
    """A data module that describes what it has loaded."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Plain values for run.json, available after `setup`.

        `source` (name of the data), `sha256` (name -> hexadecimal SHA-256 of what was read), the
        number of samples in `train`, `validation` and `test`, the number of `classes`, and any
        other keys.
        """


@runtime_checkable
class ShapedData(Protocol):
    """A data module whose inputs have one shape."""

    input_shape: tuple[int, ...] | None
    """Shape of one input, without the batch; None if only the data determine it."""


@runtime_checkable
class PredictionData(Protocol):
    """A data module that loads other samples for its network."""

    def prediction_inputs(self, path: Path, on_failures: OnFailures) -> PredictionInputs:
        """Load the samples of a file or folder, preprocessed like test samples."""


@runtime_checkable
class SampledData(ShapedData, Protocol):
    """A data module that generates inputs similar to its own."""

    def sample_inputs(self, samples: int) -> Float[Tensor, "N ..."]:
        """Return random inputs (samples, *input_shape) float32, the same in each call."""


def check_data_module(datamodule: object, *members: str) -> None:
    """Raise an error if `datamodule` is no data module or lacks what a command needs.

    Args:
        datamodule: what the configuration's `data` builds.
        members: names of the members that the command needs.

    Raises:
        DataModuleError: names the class of `datamodule` and the missing members.
    """
    kind = type(datamodule).__qualname__
    if not isinstance(datamodule, LightningDataModule):
        raise DataModuleError(
            f"expected `data` to be a LightningDataModule, got `{kind}`; derive `{kind}` from it"
        )
    if missing := [name for name in members if not _has(datamodule, name)]:
        raise DataModuleError(
            f"expected `data` to have `{'`, `'.join(missing)}`, got `{kind}` without; add it as"
            " docs/your_own.md describes"
        )


def _has(datamodule: LightningDataModule, name: str) -> bool:
    """Return whether it has a member; Lightning's own `test_dataloader`, for one, is none."""
    if hasattr(LightningDataModule, name):
        return is_overridden(name, datamodule)
    return hasattr(datamodule, name)


def data_info(datamodule: object) -> dict[str, Any] | None:
    """Return the `info` of a data module after `setup`, or None if it has no `info`.

    Raises:
        DataModuleError: `info` is not a mapping, or some of `INFO_KEYS` are missing.
    """
    if not isinstance(datamodule, DescribedData):
        return None
    info, kind = datamodule.info, type(datamodule).__qualname__
    if not isinstance(info, Mapping):
        raise DataModuleError(
            f"expected `data` to have a dictionary as `info`, got {info!r} from `{kind}`; return"
            f" one with the keys {', '.join(INFO_KEYS)}, or rename it"
        )
    if missing := [key for key in INFO_KEYS if key not in info]:
        raise DataModuleError(
            f"expected `data` to have `info` with the keys {', '.join(INFO_KEYS)}, got `{kind}`"
            f" without {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}"
        )
    return dict(info)


class InfoCheck(Callback):
    """Checks `info` with `data_info` on every rank, before the first batch."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning has set the data module up before.
        data_info(trainer.datamodule)  # type: ignore[attr-defined]  # set by a connector
