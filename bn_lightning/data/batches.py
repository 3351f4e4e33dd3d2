"""Resumable batches by index, and batches cut from whole tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.data import SequentialSampler
from typing_extensions import override

LabeledBatch = tuple[Float[Tensor, "B ..."], Int[Tensor, "B"]]
"""Inputs and targets."""

Transform = Callable[[Tensor, Tensor, int], Tensor]
"""From the inputs of a batch, their indices and the epoch to the inputs for the network."""


class Batches(ABC):
    """Iterates over `(inputs, targets)`, with each sample at most once per epoch.

    The order of a shuffled epoch depends on `seed` and the epoch alone: not on the device, the
    global random state, or earlier epochs. As with torch's `DistributedSampler`, `set_epoch`
    changes the epoch; Lightning calls it through `sampler`. Lightning also saves `state_dict` in
    checkpoints, so that a run resumed within an epoch continues with the next batch.

    All ranks use the same permutation and disjoint parts of it, in the same number of batches:
    batch b of all ranks together is batch b of one process with `world_size` times the
    `batch_size`. With `drop_last`, each batch has `batch_size` samples. Without it, the samples are
    distributed evenly over the smallest possible number of batches, so that no batch has a single
    sample, which BatchNorm cannot normalize.

    Args:
        samples: number of samples.
        batch_size: largest number of samples in a batch of one rank, at least 1.
        shuffle: permute the samples in each epoch.
        seed: of the permutations, at least 0.
        drop_last: omit the samples that do not fill a batch on every rank.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share the samples.

    Raises:
        TypeError: `batch_size` or `seed` is not an integer.
        ValueError: an argument is out of range, or a batch would have no sample.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        if not 0 <= rank < world_size:
            raise ValueError(f"expected `rank` to be in [0, {world_size}), got {rank}")
        together = batch_size * world_size
        length = samples // together if drop_last else -(-samples // together)
        used = length * together if drop_last else samples
        if length == 0 or used < length * world_size:
            raise ValueError(
                "expected `batch_size` to give each rank a sample in each batch, got"
                f" {batch_size} with {samples} samples and `world_size` {world_size}"
            )
        self.samples = samples
        self.batch_size, self.seed = batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._length, self._used = length, used
        self._epoch = 0
        self._position = 0  # batches of this epoch already yielded
        self._start = 0  # batches that the next iteration skips

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same on each rank."""
        return self._length

    def __iter__(self) -> Iterator[LabeledBatch]:
        # A generator, whose body runs at the first `next`: Lightning creates its iterator before it
        # calls `set_epoch`, and creates another one only to check that this works.
        self._position, self._start = self._start, 0
        for batch in self._batches_from(self._position):
            self._position += 1  # before `yield`: counts the batch in use
            yield batch

    @abstractmethod
    def _batches_from(self, position: int) -> Iterator[LabeledBatch]:
        """Yield this rank's batches of the epoch, without the first `position`."""

    @property
    def sampler(self) -> "Batches | SequentialSampler":
        """The object on which Lightning calls `set_epoch`; its type tells whether this shuffles."""
        return self if self.shuffle else SequentialSampler(range(self.samples))

    @property
    def batch_sampler(self) -> "Batches":
        """Lightning expects this beside `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration begin this epoch.

        Args:
            epoch: at least 0. The current epoch changes nothing, so that a position that has been
                loaded is kept.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._position = self._start = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position and all it depends on: plain numbers, equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue after the last batch that was yielded.

        Args:
            state: from `state_dict`, of a run with the same data, seed, batch size and ranks.

        Raises:
            ValueError: the run differs in one of these, so that the position is meaningless.
        """
        identity = self._identity()
        if others := [
            f"{key} {state.get(key)!r}, now {value!r}"
            for key, value in identity.items()
            if state.get(key) != value
        ]:
            raise ValueError(
                "expected `ckpt_path` to have been saved with the same data and batches, got"
                f" {'; '.join(others)}; resume with the same ones, or start a new run"
            )
        self._epoch = state["epoch"]
        self._position = self._start = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "world_size": self.world_size,
        }

    def _permutation(self) -> Int[Tensor, "N"]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self._epoch))
        return torch.randperm(self.samples, generator=generator)

    def _parts(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return this rank's batches of `whole`, as views."""
        parts = whole[: self._used].tensor_split(self._length * self.world_size)
        return parts[self.rank :: self.world_size]


class TensorBatches(Batches):
    """Batches `(inputs[index], targets[index])`, without workers or collation by sample.

    Without `shuffle` and `transform`, batches are views of the tensors.

    Args:
        inputs: all inputs, (N, ...), on any device.
        targets: all targets, (N,), on the same device.
        batch_size: see `Batches`.
        transform: see `Transform`; tensors are on the device.
        options: see `Batches`.

    Raises:
        ValueError: there are not as many targets as inputs, or see `Batches`.
    """

    def __init__(
        self,
        inputs: Shaped[Tensor, "N ..."],
        targets: Int[Tensor, "N ..."],
        batch_size: int,
        *,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        super().__init__(len(inputs), batch_size, **options)
        if len(targets) != len(inputs):
            raise ValueError(
                f"expected `targets` to be as many as `inputs`, got {len(targets)} and"
                f" {len(inputs)}"
            )
        self.inputs, self.targets = inputs, targets
        self.transform = transform

    @override
    def _batches_from(self, position: int) -> Iterator[LabeledBatch]:
        inputs, targets = self.inputs, self.targets
        if not self.shuffle and self.transform is None:
            parts = zip(self._parts(inputs), self._parts(targets), strict=True)
            yield from islice(parts, position, None)
            return
        order = self._permutation() if self.shuffle else torch.arange(self.samples)
        for index in self._parts(order.to(inputs.device))[position:]:
            batch = inputs.index_select(0, index)
            if self.transform is not None:
                batch = self.transform(batch, index, self._epoch)
            yield batch, targets.index_select(0, index)


def mixed_seed(*numbers: int) -> int:
    """Return a 64-bit seed that depends on the numbers, each at least 0, and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def check_integer(name: str, value: object, least: int) -> None:
    """Raise an error unless `value` is an integer of at least `least`.

    Args:
        name: of the argument.
        value: the argument.
        least: smallest valid value.

    Raises:
        TypeError: `value` is not an integer (a bool is not).
        ValueError: `value` is less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` to be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"expected `{name}` to be at least {least}, got {value}")
