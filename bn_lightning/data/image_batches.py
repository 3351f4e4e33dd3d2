"""Resumable batches of image files that worker processes decode and augment."""

import math
import os
import signal
import weakref
from collections.abc import Iterator, Sequence
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

from bn_lightning.data.batches import Batches, LabeledBatch, check_integer, mixed_seed
from bn_lightning.data.image_file import ImageFileError, read_image
from bn_lightning.data.image_transforms import ImageTransform
from bn_lightning.data.protocol import ImageFailure, OnFailures

# One in use, one prefetched by Lightning, one being built, one spare for a slow consumer.
_KEPT_BUFFERS = 4


@dataclass(frozen=True)
class ImageFiles:
    """The image files of one split, in arrays that worker processes share.

    Attributes:
        folder: base of the names.
        names: (N,) encoded paths, "class/file".
        targets: (N,) int64, the classes.
    """

    folder: Path
    names: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the name of an image, "class/file"."""
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.folder, self.name(index))


class Decoded(NamedTuple):
    """A batch from a worker process.

    Attributes:
        pixels: (B, 3, S, S) uint8, of the images that could be read.
        targets: (B,) int64, of the same images.
        failures: the other images.
    """

    pixels: UInt8[Tensor, "B 3 S S"]
    targets: Int[Tensor, "B"]
    failures: list[ImageFailure]


class DecodedBatches(Dataset[Decoded]):
    """Decodes batches; the result depends on the key alone, not on the process.

    Args:
        files: the images.
        transform: from an image to its pixels.
        seed: of the augmentation, at least 0.
    """

    def __init__(self, files: ImageFiles, transform: ImageTransform, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed
        self._buffers = Buffers(np.uint8)

    def __getitem__(self, key: tuple[int, Int[np.ndarray, "B"]]) -> Decoded:
        """Decode the images with these indices for an epoch; `key` is (epoch, indices)."""
        epoch, indices = key
        size = self.transform.size
        pixels = self._buffers.take((len(indices), 3, size, size))
        read: list[int] = []
        failures: list[ImageFailure] = []
        for index in indices.tolist():
            try:
                image = read_image(self.files.path(index))
            except ImageFileError as error:
                failures.append(ImageFailure(self.files.name(index), str(error)))
                continue
            # One random stream per sample and epoch, so that workers, batches and ranks do not
            # matter. Creating a NumPy generator takes 40 microseconds, half as long as decoding
            # 32x32 pixels.
            random = Random(f"{self.seed} {epoch} {index}")
            pixels[len(read)] = self.transform(image, random).transpose(2, 0, 1)
            read.append(index)
        targets = self.files.targets[read]
        return Decoded(torch.from_numpy(pixels)[: len(read)], torch.from_numpy(targets), failures)


class ImageBatches(Batches):
    """Batches of images, (B, 3, S, S) float32 and contiguous, which workers prepare in advance.

    The batches are the same bits for any number of workers. With `fixed_batches`, samples are
    assigned to batches once and each epoch only permutes the batches, like a training set whose
    shards are shuffled but not the examples within. The samples that fill no batch are then also
    the same in each epoch.

    Args:
        decoded: the images.
        batch_size: largest number of samples in a batch of one rank, at least 1. Images that
            cannot be read make a batch smaller.
        on_failures: see `OnFailures`; if it raises, the iteration ends.
        mean: of each channel, for pixels in [0, 1]; subtracted.
        std: of each channel, for pixels in [0, 1]; the pixels are divided by it.
        num_workers: number of decoding processes, at least 0; 0 decodes in this process.
        device: device of the batches.
        keep_workers: keep the workers from one epoch to the next.
        fixed_batches: permute whole batches, not samples.
        skip_empty: skip a batch without a readable image instead of raising.
        options: `shuffle`, `seed`, `drop_last`, `rank` and `world_size` of `Batches`.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range, or a batch would have no sample.
    """

    def __init__(
        self,
        decoded: DecodedBatches,
        batch_size: int,
        *,
        on_failures: OnFailures,
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
        # Scaled for pixels in [0, 255], which saves one of three passes over a batch.
        self._mean = (255 * torch.tensor(mean, dtype=torch.float32)).view(shape).to(device)
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float32))).view(shape).to(device)
        self._buffers = Buffers(np.float32)
        self._keys = _Keys()
        self._loader: DataLoader[Decoded] | None = None

    def __copy__(self) -> Self:
        # Persistent workers serve one iteration at a time, so a copy gets workers of its own.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _keys=_Keys(), _loader=None)
        return other

    @override
    def _batches_from(self, position: int) -> Iterator[LabeledBatch]:
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
                    f"expected a batch with readable images, got {len(decoded.failures)} that"
                    f" cannot be read, first {decoded.failures[0].message}"
                )
            targets = decoded.targets.to(self.device, non_blocking=True)
            yield self._normalized(decoded.pixels), targets

    def _normalized(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        if self.device.type != "cpu":
            inputs = pixels.to(self.device, non_blocking=True).float()
            return inputs.sub_(self._mean).mul_(self._scale)
        inputs = torch.from_numpy(self._buffers.take(pixels.shape))
        for image, result in zip(pixels, inputs, strict=True):  # one image fits the cache
            result.copy_(image).sub_(self._mean).mul_(self._scale)
        return inputs

    @override
    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "fixed_batches": self.fixed_batches}

    def indices(self) -> Sequence[Int[Tensor, "B"]]:
        """Return the sample indices of each batch of this rank in the current epoch."""
        if not self.shuffle:
            return self._parts(torch.arange(self.samples))
        if not self.fixed_batches:
            return self._parts(self._permutation())
        once = torch.Generator().manual_seed(mixed_seed(self.seed, 0))
        parts = self._parts(torch.randperm(self.samples, generator=once))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self._epoch))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def _new_loader(self) -> DataLoader[Decoded]:
        return DataLoader(
            self.decoded,
            sampler=self._keys,
            batch_size=None,  # a key already stands for a batch
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its unused seed is not drawn from the run's
            persistent_workers=self.keep_workers and self.num_workers > 0,
            worker_init_fn=_ignore_signals,
        )


class Buffers:
    """Arrays whose memory is reused after they have been freed.

    malloc either returns large blocks to the system, which costs a page fault for every 4 KiB of
    the next array, or keeps them and fragments: up to 1.5 GiB with batches of 32x3x224x224.

    Args:
        dtype: of the arrays.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """Return an uninitialized array; a tensor that shares its memory keeps it in use."""
        size = math.prod(shape)
        buffer = self._free.pop() if self._free else np.empty(0, self.dtype)
        if buffer.size < size:
            buffer = np.empty(size, self.dtype)
        array = buffer[:size].reshape(shape)
        weakref.finalize(array, self._release, buffer).atexit = False
        return array

    def _release(self, buffer: np.ndarray) -> None:
        if len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)


class _Keys(Sampler[tuple[int, np.ndarray]]):
    """The keys of the next iteration's batches."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _ignore_signals(worker: int) -> None:
    # A signal to the process group is for the training process, which needs more batches before it
    # ends. SIGTERM from the training process itself still ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not report the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
