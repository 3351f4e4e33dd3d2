"""What all data modules over whole tensors share: checks, the validation cut, the loaders."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from typing_extensions import override

from bn_lightning.data.batches import TensorBatches, Transform, check_integer
from bn_lightning.data.errors import DataError

# The cut is a property of the data, not of a run: whatever `seed` a run has, it trains and
# validates on the same samples as all others, so that runs can be compared.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Arrays:
    """A data set as it was published, before validation is cut from training.

    Args:
        train_inputs: (N, ...), uint8, then read as [0, 255] and scaled to [0, 1]; or floating
            point, then taken as they are.
        train_targets: (N,) integers in [0, classes).
        test_inputs: (M, ...), as `train_inputs`.
        test_targets: (M,), as `train_targets`.
        classes: number of classes.
        source: name of the data, for run records.
        root: where they lie, for run records.
        sha256: name of each file or array -> SHA-256 of its decompressed payload.
    """

    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray
    classes: int
    source: str
    root: str
    sha256: dict[str, str]


class TensorDataModule(LightningDataModule, ABC):
    """Whole small data sets in one tensor a split, on the trainer's device, batched by index.

    Validation is cut from training, by a permutation that no argument changes; the official test
    set stays whole. A subclass says in `load` where the arrays come from.

    Args:
        batch_size: training samples in a batch of one rank, at least 1.
        eval_batch_size: the most samples in a validation or test batch of one rank, at least 1.
        validation_fraction: share of the training samples cut off for validation, in (0, 1);
            rounded to a whole number of samples.
        seed: of the order of the training batches, at least 0. It does not change the split.
        test_curve: let `val_dataloader` return the test set too, second, so that test accuracy can
            be drawn against steps. Only the first, validation, may choose between checkpoints.

    Raises:
        TypeError: an integer was expected and something else came.
        ValueError: a value is out of its range.
    """

    input_shape: tuple[int, ...] | None = None
    """Of one input, (channels, rows, columns) of an image; None where the data alone know it."""

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        test_curve: bool = False,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("eval_batch_size", eval_batch_size, 1)
        check_integer("seed", seed, 0)
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"Expected `validation_fraction` in (0, 1), but got {validation_fraction}"
            )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.validation_fraction, self.seed = validation_fraction, seed
        self.test_curve = test_curve
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}
        self._info: dict[str, Any] = {}
        self._num_classes = 0

    @abstractmethod
    def load(self) -> Arrays:
        """Reads the arrays from disk; called once in each process.

        Raises:
            DataError: what is there cannot be trusted, or nothing is there.
        """

    def transform(self, split: str) -> Transform | None:
        """What the inputs of each batch of "train", "validation" or "test" go through.

        With one, inputs are kept as `load` returned them, bytes as bytes.
        """
        return None

    def evaluated(self, inputs: np.ndarray) -> Tensor:
        """Makes of other samples what a test batch holds of the data's own.

        Args:
            inputs: (N, ...), uint8 or floating point, as the data have them before anything that
                an argument of this class says is done to them.

        Returns:
            Inputs for the network, (N, ...) float32.
        """
        transform = self.transform("test")
        if transform is None:
            return _scaled(inputs)
        return transform(torch.from_numpy(inputs), torch.arange(len(inputs)), 0)

    @override
    def setup(self, stage: str) -> None:
        """Reads, checks and cuts, the first time it is called.

        Args:
            stage: ignored: each stage takes its split of the same cut.

        Raises:
            DataError: the data is absent or wrong, or too small for a validation sample.
        """
        if self.is_loaded:
            return
        arrays = self.load()
        check_arrays(arrays)
        check_same_on_all_ranks(self.trainer, arrays.source, arrays.root, arrays.sha256)
        train, validation = split_validation(len(arrays.train_inputs), self.validation_fraction)
        parts = {
            "train": (arrays.train_inputs[train], arrays.train_targets[train]),
            "validation": (arrays.train_inputs[validation], arrays.train_targets[validation]),
            "test": (arrays.test_inputs, arrays.test_targets),
        }
        self._splits = {
            split: _tensors(*part, scaled=self.transform(split) is None)
            for split, part in parts.items()
        }
        self._num_classes = arrays.classes
        self._info = {
            "source": arrays.source,
            "root": arrays.root,
            "sha256": dict(arrays.sha256),
            "classes": arrays.classes,
            **{name: len(targets) for name, (_, targets) in self._splits.items()},
        }

    @property
    def is_loaded(self) -> bool:
        """Whether `setup` has run in this process."""
        return bool(self._splits)

    @property
    def num_classes(self) -> int:
        """How many classes there are, known after `setup`."""
        return self._num_classes

    @property
    def info(self) -> dict[str, Any]:
        """What a run record says of the data, as plain values.

        `source` (its name), `root`, `sha256` (of each decompressed payload), the number of
        `classes`, and the number of samples in `train`, `validation` and `test`.

        Raises:
            RuntimeError: `setup` has not run yet.
        """
        if not self._info:
            raise RuntimeError("Expected `setup` to have run before `info` is read")
        return {**self._info, "sha256": dict(self._info["sha256"])}

    @override
    def train_dataloader(self) -> TensorBatches:
        """Full batches in an order of their own for each epoch."""
        # `overfit_batches` asks for the same few batches in every epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        return self._batches("train", self.batch_size, shuffle=shuffle, drop_last=True)

    @override
    def val_dataloader(self) -> TensorBatches | list[TensorBatches]:
        """Validation, or with `test_curve` validation and test, in the order of the files."""
        validation = self._batches("validation", self.eval_batch_size)
        return [validation, self.test_dataloader()] if self.test_curve else validation

    @override
    def test_dataloader(self) -> TensorBatches:
        """The whole official test set, in the order of its file."""
        return self._batches("test", self.eval_batch_size)

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """The batch as it is: it is cut from tensors that already lie on the device."""
        return batch

    def _batches(
        self, split: str, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
    ) -> TensorBatches:
        if not self.is_loaded:
            raise RuntimeError("Expected `setup` to have run before the data loaders are made")
        device, ranks = torch.device("cpu"), None
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            ranks = self.trainer.distributed_sampler_kwargs
        inputs, targets = self._splits[split]
        # Kept on the device, so that fit, validate and test move it once and hold it once.
        self._splits[split] = inputs, targets = inputs.to(device), targets.to(device)
        return TensorBatches(
            inputs,
            targets,
            batch_size,
            transform=self.transform(split),
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            rank=ranks["rank"] if ranks else 0,
            world_size=ranks["num_replicas"] if ranks else 1,
        )


def check_same_on_all_ranks(
    trainer: Trainer | None, source: str, root: str, sha256: dict[str, str]
) -> None:
    """Refuses ranks that found other files than rank 0.

    Args:
        trainer: the data module's, or None, which is one process.
        source: name of the data, for the message.
        root: where they lie, for the message.
        sha256: what tells the files apart.

    Raises:
        DataError: on the ranks that differ.
    """
    if trainer is None or trainer.world_size == 1:
        return
    if trainer.strategy.broadcast(sha256) != sha256:
        raise DataError(
            f"Expected the same data on all ranks, but rank {trainer.global_rank} found"
            f" {source!r} in {root} and rank 0 other files; place the same files on each machine"
        )


def split_validation(samples: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Cuts validation from training, always at the same samples.

    Args:
        samples: number of training samples before the cut.
        fraction: share of them to cut off, in (0, 1); rounded to a whole number.

    Returns:
        Indices of training and of validation, each in rising order.

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(samples * fraction)
    if not 0 < count < samples:
        raise DataError(
            f"Expected `validation_fraction` to leave samples for training and for validation,"
            f" but got {fraction} of {samples} samples, which is {count}"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(samples)
    return np.sort(order[count:]), np.sort(order[:count])


def check_arrays(arrays: Arrays) -> None:
    """Refuses data that no run should be trained on.

    Args:
        arrays: the data.

    Raises:
        DataError: inputs and targets differ in number, there are none, an input is not finite, or
            a target is no class.
    """
    for split, inputs, targets in (
        ("training", arrays.train_inputs, arrays.train_targets),
        ("test", arrays.test_inputs, arrays.test_targets),
    ):
        where = f"{arrays.source} ({split}, {arrays.root})"
        if len(inputs) != len(targets) or not len(inputs):
            raise DataError(
                f"{where}: expected as many targets as inputs, and some, but got {len(inputs)}"
                f" inputs and {len(targets)} targets"
            )
        if inputs.dtype.kind == "f" and not (finite := np.isfinite(inputs)).all():
            samples = np.flatnonzero(~finite.reshape(len(inputs), -1).all(axis=1))
            raise DataError(
                f"{where}: expected finite inputs, but got {np.count_nonzero(~finite)} values that"
                f" are NaN or infinite, in {len(samples)} samples, the first of them at"
                f" {_few(samples)}"
            )
        foreign = np.flatnonzero((targets < 0) | (targets >= arrays.classes))
        if len(foreign):
            raise DataError(
                f"{where}: expected targets in [0, {arrays.classes}), but got"
                f" {targets[foreign[0]]} and {len(foreign) - 1} more outside, the first of them at"
                f" {_few(foreign)}"
            )


def _few(indices: np.ndarray) -> str:
    return ", ".join(str(index) for index in indices[:5])


def _tensors(
    inputs: np.ndarray, targets: np.ndarray, scaled: bool
) -> tuple[Shaped[Tensor, "N ..."], Int[Tensor, "N"]]:
    values = _scaled(inputs) if scaled else torch.from_numpy(inputs)
    return values, torch.from_numpy(targets.astype(np.int64))


def _scaled(inputs: np.ndarray) -> Float[Tensor, "N ..."]:
    if inputs.dtype == np.uint8:
        # Into the result at once: a float copy of its own would cost MNIST 172 MB.
        return torch.from_numpy(np.divide(inputs, 255, dtype=np.float32))
    return torch.from_numpy(np.array(inputs, dtype=np.float32))
