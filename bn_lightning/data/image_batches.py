"""Batches of image files, decoded and augmented by worker processes, resumable."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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

    def path(self, index: int) -> Path:
        """Where the image of this index lies."""
        return self.folder / self.names[index].decode(errors="surrogateescape")


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

    def __getitem__(self, key: tuple[int, Int[np.ndarray, "B"]]) -> Decoded:
        """The batch of an epoch and of these samples."""
        epoch, indices = key
        pixels, read, failures = [], [], []
        for index in indices.tolist():
            try:
                image = read_image(self.files.path(index))
            except ImageFileError as error:
                name = self.files.names[index].decode(errors="surrogateescape")
                failures.append((name, str(error)))
                continue
            # A stream for each sample in each epoch: no worker, batch or rank can tell.
            random = np.random.default_rng([self.seed, epoch, index])
            pixels.append(self.transform(image, random))
            read.append(index)
        stacked = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        return Decoded(
            torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))),
            torch.from_numpy(self.files.targets[read]),
            failures,
        )


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
        **options: Any,
    ) -> None:
        super().__init__(len(decoded.files), batch_size, **options)
        check_integer("num_workers", num_workers, 0)
        self.num_workers, self.keep_workers = num_workers, keep_workers
        self.fixed_batches = fixed_batches
        self.device = torch.device(device)
        self._decoded, self._on_failures = decoded, on_failures
        shape = (3, 1, 1)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64).view(shape))
        shift = -255 * torch.tensor(mean, dtype=torch.float64).view(shape) * scale
        self._scale, self._shift = scale.float().to(device), shift.float().to(device)
        self._keys = _Keys()
        self._loader: DataLoader[Decoded] | None = None

    def __copy__(self) -> Self:
        # Workers that live on serve one iteration at a time: a second reader gets its own.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _keys=_Keys(), _loader=None)
        return other

    @override
    def _from(self, position: int) -> Iterator[Batch]:
        indices = self._indices()[position:]
        self._keys.keys = [(self._epoch, index.numpy()) for index in indices]
        if self._loader is None:
            self._loader = self._new_loader()
        for decoded in self._loader:
            if decoded.failures:
                self._on_failures(decoded.failures)
            if len(decoded.targets) == 0:
                raise ImageFileError(
                    f"none of the {len(decoded.failures)} images of a batch can be read, the first"
                    f" of them: {decoded.failures[0][1]}"
                )
            pixels = decoded.pixels.to(self.device, non_blocking=True).float()
            inputs: Float[Tensor, "B 3 S S"] = torch.addcmul(
                self._shift, pixels, self._scale, out=pixels
            )
            yield inputs, decoded.targets.to(self.device, non_blocking=True)

    @override
    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "fixed_batches": self.fixed_batches}

    def _indices(self) -> Sequence[Int[Tensor, "B"]]:
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
            self._decoded,
            sampler=self._keys,
            batch_size=None,  # a key is a batch already
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed that nobody needs: not from the run's
            **workers,
        )


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
