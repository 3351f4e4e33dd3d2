"""The base of data modules that hold whole data sets in tensors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from bn_lightning.data.base import LoadedDataModule
from bn_lightning.data.batches import TensorBatches, Transform, check_integer
from bn_lightning.data.errors import DataError
from bn_lightning.data.prediction_images import find_images, fixed_size_batches, names_for_csv
from bn_lightning.data.protocol import OnFailures, PredictionInputs

# The same splits in all runs, whatever their `seed`, so that runs can be compared.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Arrays:
    """A data set as published, before the validation split.

    Attributes:
        train_inputs: (N, ...), uint8 in [0, 255], which will be scaled to [0, 1]; or floating
            point, which will not be scaled.
        train_targets: (N,) integers in [0, classes).
        test_inputs: (M, ...), like `train_inputs`.
        test_targets: (M,), like `train_targets`.
        classes: number of classes.
        source: name of the data, for run records.
        root: folder of the data, for run records.
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


class TensorDataModule(LoadedDataModule, ABC):
    """A small data set with one tensor per split, on the trainer's device, batched by index.

    The validation set is split from the training set by a fixed permutation; the official test set
    stays whole. A subclass implements `load`.

    Args:
        batch_size: number of training samples in a batch of one rank, at least 1.
        eval_batch_size: largest number of samples in a validation or test batch of one rank, at
            least 1.
        validation_fraction: share of the training samples used for validation, in (0, 1); rounded
            to a whole number of samples.
        seed: of the order of the training batches, at least 0. It does not change the split.
        test_curve: return the test set from `val_dataloader` too, second, to plot test accuracy
            against steps. Use only the first, validation, to choose a checkpoint.
        train_samples: number of training samples to use, at least 1, the same random ones whatever
            `seed`; None for all that validation leaves.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """

    input_shape: tuple[int, ...] | None = None
    """Shape of one input, (C, H, W) of an image; None if only the data determine it."""

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        *,
        test_curve: bool = False,
        train_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("eval_batch_size", eval_batch_size, 1)
        check_integer("seed", seed, 0)
        if train_samples is not None:
            check_integer("train_samples", train_samples, 1)
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"expected `validation_fraction` to be in (0, 1), got {validation_fraction}"
            )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.validation_fraction, self.seed = validation_fraction, seed
        self.test_curve, self.train_samples = test_curve, train_samples
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load(self) -> Arrays:
        """Read the arrays from disk; called once in each process.

        Raises:
            DataError: the data are absent or wrong.
        """

    def transform(self, split: str) -> Transform | None:
        """Return a transform for each batch of "train", "validation" or "test", or None.

        With a transform, inputs keep the dtype from `load`; without, they are float32.
        """
        return None

    def evaluated(self, inputs: np.ndarray) -> Tensor:
        """Preprocess other samples like those of the test set.

        Args:
            inputs: (N, ...), uint8 or floating point, as in the data's files.

        Returns:
            Inputs for the network, (N, ...) float32.
        """
        transform = self.transform("test")
        if transform is None:
            return _scaled(inputs)
        return transform(torch.from_numpy(inputs), torch.arange(len(inputs)), 0)

    def prediction_inputs(self, path: Path, on_failures: OnFailures) -> PredictionInputs:
        """Load the image at `path`, or all images of a folder, see `find_images`.

        Each must have the size of `input_shape`.

        Raises:
            DataError: `path` has no image, or the inputs of this data module are no images.
        """
        shape = self.input_shape
        if shape is not None and len(shape) == 3 and shape[0] in (1, 3):
            files = find_images(path)
            size = self.eval_batch_size
            batches = fixed_size_batches(files, shape, size, self.evaluated, on_failures)
            return PredictionInputs("path", "images", names_for_csv(files), batches)
        raise DataError(
            f"expected `ckpt_path` to be trained on images, got the data of {type(self).__name__};"
            " predict in a script"
        )

    @override
    def setup(self, stage: str) -> None:
        """Read, check and split the data in the first call.

        Args:
            stage: ignored.

        Raises:
            DataError: the data are absent, wrong, too few for a validation sample, or fewer than
                `train_samples`.
        """
        if self.is_loaded:
            return
        arrays = self.load()
        check_arrays(arrays)
        self._check_same_on_all_ranks(arrays.source, arrays.root, arrays.sha256)
        train, validation = split_samples(
            len(arrays.train_inputs), self.validation_fraction, "validation_fraction"
        )
        if self.train_samples is not None:
            train = _some_of(train, self.train_samples)
        parts = {
            "train": (arrays.train_inputs[train], arrays.train_targets[train]),
            "validation": (arrays.train_inputs[validation], arrays.train_targets[validation]),
            "test": (arrays.test_inputs, arrays.test_targets),
        }
        self._splits = {
            split: (
                _scaled(inputs) if self.transform(split) is None else torch.from_numpy(inputs),
                torch.from_numpy(targets.astype(np.int64)),
            )
            for split, (inputs, targets) in parts.items()
        }
        self._info = {
            "source": arrays.source,
            "root": arrays.root,
            "sha256": dict(arrays.sha256),
            "classes": arrays.classes,
            **{name: len(targets) for name, (_, targets) in self._splits.items()},
        }

    @override
    def train_dataloader(self) -> TensorBatches:
        """Return full batches, shuffled in each epoch."""
        # `overfit_batches` needs the same batches in each epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        return self._batches("train", self.batch_size, shuffle=shuffle, drop_last=True)

    @override
    def val_dataloader(self) -> TensorBatches | list[TensorBatches]:
        """Return validation, and with `test_curve` also test, in the order of the files."""
        validation = self._batches("validation", self.eval_batch_size)
        return [validation, self.test_dataloader()] if self.test_curve else validation

    @override
    def test_dataloader(self) -> TensorBatches:
        """Return the whole official test set, in the order of its file."""
        return self._batches("test", self.eval_batch_size)

    def _batches(
        self, split: str, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
    ) -> TensorBatches:
        self._require_setup()
        device, ranks = self._placement()
        inputs, targets = self._splits[split]
        # Kept on the device, so that fit, validate and test share one copy.
        self._splits[split] = inputs, targets = inputs.to(device), targets.to(device)
        return TensorBatches(
            inputs,
            targets,
            batch_size,
            transform=self.transform(split),
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            **ranks,
        )


def split_samples(samples: int, fraction: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Split samples into two parts, the same in each call.

    Args:
        samples: number of samples.
        fraction: share of the second part, in (0, 1); rounded to a whole number of samples.
        name: of the argument that has the fraction, for the error message.

    Returns:
        Indices of the first and the second part, both ascending.

    Raises:
        DataError: one of the parts would be empty.
    """
    count = round(samples * fraction)
    if not 0 < count < samples:
        raise DataError(
            f"expected `{name}` to leave samples in both parts, got {fraction} of {samples}"
            f" samples, which is {count}; set another fraction, or give more samples"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(samples)
    return np.sort(order[count:]), np.sort(order[:count])


def _some_of(indices: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the indices, ascending, the same in each call."""
    if count > len(indices):
        raise DataError(
            f"expected `train_samples` to be at most {len(indices)}, the training samples that "
            f"validation leaves, got {count}; use fewer"
        )
    return np.sort(np.random.default_rng(_SPLIT_SEED).permutation(indices)[:count])


def check_arrays(arrays: Arrays) -> None:
    """Raise an error if the data cannot be trained on.

    Raises:
        DataError: there are no samples, not as many targets as inputs, an input that is not
            finite, or a target outside [0, classes).
    """
    for split, inputs, targets in (
        ("training", arrays.train_inputs, arrays.train_targets),
        ("test", arrays.test_inputs, arrays.test_targets),
    ):
        where = f"{arrays.source} ({split}, {arrays.root})"
        if len(inputs) != len(targets) or not len(inputs):
            raise DataError(
                f"{where}: expected at least one input and as many targets, got {len(inputs)}"
                f" inputs and {len(targets)} targets"
            )
        if inputs.dtype.kind == "f" and not (finite := np.isfinite(inputs)).all():
            samples = np.flatnonzero(~finite.reshape(len(inputs), -1).all(axis=1))
            raise DataError(
                f"{where}: expected finite inputs, got {np.count_nonzero(~finite)} values that"
                f" are NaN or infinite in {len(samples)} samples, first at {samples[:5].tolist()}"
            )
        foreign = np.flatnonzero((targets < 0) | (targets >= arrays.classes))
        if len(foreign):
            raise DataError(
                f"{where}: expected targets in [0, {arrays.classes}), got {targets[foreign[0]]}"
                f" and {len(foreign) - 1} more outside, first at {foreign[:5].tolist()}"
            )


def _scaled(inputs: np.ndarray) -> Float[Tensor, "N ..."]:
    if inputs.dtype == np.uint8:
        # Written into the result directly: another float copy would cost 172 MB for MNIST.
        return torch.from_numpy(np.divide(inputs, 255, dtype=np.float32))
    return torch.from_numpy(np.array(inputs, dtype=np.float32))
