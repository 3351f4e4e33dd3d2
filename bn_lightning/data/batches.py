"""Batches by index, resumable: which samples make each one, and those cut from whole tensors."""

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

Batch = tuple[Float[Tensor, "B ..."], Int[Tensor, "B"]]
"""Inputs and targets."""

Transform = Callable[[Tensor, Tensor, int], Tensor]
"""From the inputs of a batch, their indices and the epoch to what the batch holds."""


class Batches(ABC):
    """Iterates over `(inputs, targets)`, every sample at most once an epoch.

    The order of a shuffled epoch depends on `seed` and the epoch alone: not on the device, not on
    the global random stream, not on earlier epochs. As with torch's `DistributedSampler` it is
    `set_epoch` that changes the epoch; Lightning calls it, through `sampler`. Lightning also keeps
    `state_dict` in its checkpoints, so that a run resumed within an epoch goes on at the batch
    after the last one it took.

    Across ranks all take the same permutation and disjoint parts of it, in the same number of
    batches: batch b of all ranks together is batch b of one process with `world_size` times the
    `batch_size`. With `drop_last` every batch has `batch_size` samples; without it the samples are
    dealt evenly over the fewest batches that hold them all, so that no batch is left with the one
    sample that BatchNorm cannot normalise.

    Args:
        samples: number of samples.
        batch_size: the most samples a batch of one rank has, at least 1.
        shuffle: permute the samples anew in each epoch.
        seed: of the permutations, at least 0.
        drop_last: leave out the samples that do not fill a batch on every rank.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share the samples.

    Raises:
        TypeError: `batch_size` or `seed` is not an integer.
        ValueError: an argument is out of range, or some batch would have no sample.
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
            raise ValueError(
                f"Expected `rank` in [0, {world_size}), the `world_size`, but got {rank}"
            )
        together = batch_size * world_size
        length = samples // together if drop_last else -(-samples // together)
        used = length * together if drop_last else samples
        if length == 0 or used < length * world_size:
            raise ValueError(
                f"Expected `batch_size` and `world_size` to leave each rank a sample in each batch,"
                f" but got `batch_size` {batch_size} and `world_size` {world_size}"
                f" for {samples} samples"
            )
        self.samples = samples
        self.batch_size, self.seed = batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._length, self._used = length, used
        self._epoch = 0
        self._position = 0  # batches of this epoch already handed out
        self._start = 0  # where the next iteration begins

    def __len__(self) -> int:
        """Number of batches in a whole epoch, the same on every rank."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A generator's body waits for the first `next`. It must: Lightning creates its iterator
        # before it calls `set_epoch`, and creates one more only to see whether it can.
        self._position, self._start = self._start, 0
        for batch in self._from(self._position):
            self._position += 1  # before `yield`, so that it counts the batch now in use
            yield batch

    @abstractmethod
    def _from(self, position: int) -> Iterator[Batch]:
        """This rank's batches of the epoch, without the first `position`."""

    @property
    def sampler(self) -> "Batches | SequentialSampler":
        """Where Lightning looks for `set_epoch`, and for the kind of order."""
        return self if self.shuffle else SequentialSampler(range(self.samples))

    @property
    def batch_sampler(self) -> "Batches":
        """Lightning takes whatever has a `sampler` for a loader that has this as well."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration takes, from its beginning.

        Args:
            epoch: at least 0. The present one again changes nothing, so that a position that was
                loaded stays.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._position = self._start = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on: plain numbers, equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on after the last batch that was handed out.

        Args:
            state: from `state_dict`, of a run with the same data, seed, batch size and ranks.

        Raises:
            ValueError: it comes from a run that differs in one of these, so that the position
                means nothing here.
        """
        identity = self._identity()
        if others := [
            f"{key} {state.get(key)!r}, now {value!r}"
            for key, value in identity.items()
            if state.get(key) != value
        ]:
            raise ValueError(
                f"Expected to resume with the data and batches of the checkpoint, but it has"
                f" {'; '.join(others)}. Resume with the same ones, or start a new run"
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
        """This rank's batches of `whole`, as views."""
        parts = whole[: self._used].tensor_split(self._length * self.world_size)
        return parts[self.rank :: self.world_size]


class TensorBatches(Batches):
    """Batches of `(inputs[index], targets[index])`: no workers, no per-sample collation.

    Without `shuffle` and `transform` they are views of the tensors, not copies.

    Args:
        inputs: all inputs, on any device.
        targets: all targets, on the same device.
        batch_size: as the rest, see `Batches`.
        transform: called with the inputs of a batch, their indices, both on the device, and the
            epoch; returns what the batch holds instead.

    Raises:
        ValueError: not as many targets as inputs, and see `Batches`.
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
                f"Expected as many `targets` as `inputs`, but got {len(targets)} and {len(inputs)}"
            )
        self.inputs, self.targets = inputs, targets
        self.transform = transform

    @override
    def _from(self, position: int) -> Iterator[Batch]:
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
    """One seed of 64 bits from several numbers: (0, 1) and (1, 0) give different ones.

    Args:
        numbers: each at least 0.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def check_integer(name: str, value: object, least: int) -> None:
    """Refuses what is not an integer of at least `least`.

    Args:
        name: of the argument, for the message.
        value: the argument.
        least: the smallest value allowed.

    Raises:
        TypeError: `value` is not an integer (a bool is none here).
        ValueError: `value` is below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, but got {value!r}")
    if value < least:
        raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}")
