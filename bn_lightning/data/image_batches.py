"""Batches of image files, decoded and augmented by worker processes, resumable."""

import math
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from bn_lightning.data.batches import Batch, Batches, check_integer, mixed_seed
from bn_lightning.data.image_file import ImageFileError, read_image
from bn_lightning.data.image_transforms import ImageTransform

# A batch in use, one that Lightning holds ready, one that is made, one for whoever is late.
_KEPT_BUFFERS = 4


@dataclass(frozen=True)
class ImageFiles:
    """The image files of one split. A million of them are two arrays, which workers share.

    Args:
        folder: what the names are relative to.
        names: (N,) encoded paths, "class/file".
        targets: (N,) int64, the classes.
    """

    folder: Path
    names: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The name of the image of this index, for messages."""
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Where the image of this index lies."""
        return os.path.join(self.folder, self.name(index))


class Decoded(NamedTuple):
    """A batch as a worker hands it over: what could be read of it, and what could not.

    Args:
        pixels: (B, 3, S, S).
        targets: (B,) int64.
        failures: of the others, name (class/file) and what is wrong.
    """

    pixels: UInt8[Tensor, "B 3 S S"]
    targets: Int[Tensor, "B"]
    failures: list[tuple[str, str]]


class DecodedBatches(Dataset[Decoded]):
    """Decodes batches, in whatever process: what an image becomes depends on its key alone.

    Args:
        files: the images.
        transform: makes the pixels of one of them.
        seed: of the augmentation, at least 0.
    """

    def __init__(self, files: ImageFiles, transform: ImageTransform, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed
        self._buffers = Buffers(np.uint8)

    def __getitem__(self, key: tuple[int, Int[np.ndarray, "B"]]) -> Decoded:
        """The batch of an epoch and of these samples."""
        epoch, indices = key
        size = self.transform.size
        pixels = self._buffers.take((len(indices), 3, size, size))
        read: list[int] = []
        failures: list[tuple[str, str]] = []
        for index in indices.tolist():
            try:
                image = read_image(self.files.path(index))
            except ImageFileError as error:
                failures.append((self.files.name(index), str(error)))
                continue
            # A stream for each sample in each epoch: no worker, batch or rank can tell. NumPy's
            # generators take 40 microseconds to make, half of what decoding 32x32 pixels takes.
            random = Random(f"{self.seed} {epoch} {index}")
            pixels[len(read)] = self.transform(image, random).transpose(2, 0, 1)
            read.append(index)
        targets = self.files.targets[read]
        return Decoded(torch.from_numpy(pixels)[: len(read)], torch.from_numpy(targets), failures)


class ImageBatches(Batches):
    """Batches of images, (B, 3, S, S) float32 and contiguous, that workers prepare beforehand.

    The same batches come, bit for bit, from any number of workers. With `fixed_batches` the samples
    are dealt into batches once, and only the order of these is new in each epoch: the same samples
    always appear together, as in a training set whose shards are shuffled and their examples not.
    The samples over that fill no batch are then the same ones in each epoch, too.

    Args:
        decoded: how images become pixels.
        batch_size: the most samples a batch of one rank has, at least 1; fewer where images
            cannot be read.
        on_failures: called with name and error of each image of a batch that cannot be read;
            what it raises ends the iteration.
        mean: of each channel, for pixels on [0, 1]; taken from them.
        std: of each channel, for pixels on [0, 1]; they are divided by it.
        num_workers: processes that decode, at least 0; 0 decodes in this one.
        device: where the batches go.
        keep_workers: let them live from one epoch to the next.
        fixed_batches: permute whole batches, not samples.
        skip_empty: leave out a batch of which no image can be read, in place of raising.
        options: `shuffle`, `seed`, `drop_last`, `rank` and `world_size` of `Batches`.

    Raises:
        TypeError: an integer was expected and something else came.
        ValueError: an argument is out of range, or some batch would have no sample.
    """

    def __init__(
        self,
        decoded: DecodedBatches,
        batch_size: int,
        *,
        on_failures: Callable[[list[tuple[str, str]]], None],
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        keep_workers: bool = False,
        fixed_batches: bool = False,
        skip_empty: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(len(decoded.files), batch_size, **options)
        check_integer("num_workers", num_workers, 0)
        self.num_workers, self.keep_workers = num_workers, keep_workers
        self.fixed_batches, self.skip_empty = fixed_batches, skip_empty
        self.device = torch.device(device)
        self.decoded, self._on_failures = decoded, on_failures
        shape = (3, 1, 1)
        # For pixels on [0, 255]: two passes over a batch instead of three.
        self._mean = (255 * torch.tensor(mean, dtype=torch.float32)).view(shape).to(device)
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float32))).view(shape).to(device)
        self._buffers = Buffers(np.float32)
        self._keys = _Keys()
        self._loader: DataLoader[Decoded] | None = None

    def __copy__(self) -> Self:
        # Workers that live on serve one iteration at a time: a second reader gets its own.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _keys=_Keys(), _loader=None)
        return other

    @override
    def _from(self, position: int) -> Iterator[Batch]:
        indices = self.indices()[position:]
        self._keys.keys = [(self._epoch, index.numpy()) for index in indices]
        if self._loader is None:
            self._loader = self._new_loader()
        for decoded in self._loader:
            if decoded.failures:
                self._on_failures(decoded.failures)
            if len(decoded.targets) == 0:
                if self.skip_empty:
                    continue
                raise ImageFileError(
                    f"none of the {len(decoded.failures)} images of a batch can be read, the first"
                    f" of them: {decoded.failures[0][1]}"
                )
            targets = decoded.targets.to(self.device, non_blocking=True)
            yield self._normalized(decoded.pixels), targets

    def _normalized(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        if self.device.type != "cpu":
            inputs = pixels.to(self.device, non_blocking=True).float()
            return inputs.sub_(self._mean).mul_(self._scale)
        inputs = torch.from_numpy(self._buffers.take(pixels.shape))
        for image, result in zip(pixels, inputs, strict=True):  # an image stays in the cache
            result.copy_(image).sub_(self._mean).mul_(self._scale)
        return inputs

    @override
    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "fixed_batches": self.fixed_batches}

    def indices(self) -> Sequence[Int[Tensor, "B"]]:
        """The samples of each of this rank's batches in this epoch."""
        if not self.shuffle:
            return self._parts(torch.arange(self.samples))
        if not self.fixed_batches:
            return self._parts(self._permutation())
        once = torch.Generator().manual_seed(mixed_seed(self.seed, 0))
        parts = self._parts(torch.randperm(self.samples, generator=once))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self._epoch))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def _new_loader(self) -> DataLoader[Decoded]:
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {"persistent_workers": self.keep_workers, "worker_init_fn": _outlive_signals}
        return DataLoader(
            self.decoded,
            sampler=self._keys,
            batch_size=None,  # a key is a batch already
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed that nobody needs: not from the run's
            **workers,
        )


class Buffers:
    """Arrays whose memory is used again when nobody holds them any more.

    Memory of a size that malloc fetches from the system and gives back each time costs a page fault
    for every 4 KiB, or else, once malloc keeps it, grows by fragments: to 1.5 GiB with batches of
    32x3x224x224.

    Args:
        dtype: of the arrays.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """An array with whatever values it has; a tensor made of it holds it."""
        size = math.prod(shape)
        buffer = self._free.pop() if self._free else np.empty(0, self.dtype)
        if buffer.size < size:
            buffer = np.empty(size, self.dtype)
        array = buffer[:size].reshape(shape)
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return array

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)


class _Keys(Sampler[tuple[int, np.ndarray]]):
    """The keys of the batches that the next iteration decodes."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    # Sent to a whole process group, they are for the run to answer, which takes some batches more
    # before it ends. What the run itself sends, its worker obeys.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent one
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
