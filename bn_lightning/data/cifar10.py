"""CIFAR-10 from its binary files, which are downloaded if absent."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from bn_lightning.data.archive import unpack
from bn_lightning.data.batches import Transform, mixed_seed
from bn_lightning.data.download import check_sha256, download_file
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.image_transforms import check_statistics
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule

_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes: class; red, green and blue, row by row
_PAD = 4  # pixels on each side


class CIFAR10DataModule(TensorDataModule):
    """CIFAR-10, 50,000 training and 10,000 test images, as (N, 3, 32, 32) float32.

    The six files `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` are in
    `<root>/cifar10/cifar-10-batches-bin/`. If that folder is absent, it is unpacked from
    `<root>/cifar10/cifar-10-binary.tar.gz`, which is downloaded if absent. Archive and files must
    have the published SHA-256: another file is an error and is not changed. Images stay uint8; each
    batch is scaled to [0, 1] and normalized: `mean` is subtracted and the rest divided by `std` in
    each channel. Targets are int64 in [0, 10).

    Args:
        root: folder of all data sets.
        validation_fraction: share of the training images used for validation, in (0, 1); 1/10
            leaves the customary 45,000 and 5,000.
        augment: shift each training image by up to 4 pixels over black and flip half of them, anew
            in each epoch; the result depends on `seed`, the epoch and the image.
        mean: three numbers.
        std: three positive numbers.
        download: download absent files.

    The other arguments are those of `TensorDataModule`.

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; the
    augmentation is that of He et al. 2015, arXiv 1512.03385, section 4.2.
    """

    source: ClassVar[str] = "cifar10"
    input_shape = _SHAPE
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://www.cs.toronto.edu/~kriz/",
        "https://cave.cs.toronto.edu/kriz/",
    )
    archive: ClassVar[str] = "cifar-10-binary.tar.gz"
    # From TensorFlow Datasets; the data set's own page publishes only an MD5.
    archive_sha256: ClassVar[str] = (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    )
    # From torchvision-ruby.
    sha256: ClassVar[dict[str, str]] = {
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    }

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        augment: bool,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        download: bool = True,
        test_curve: bool = False,
        train_samples: int | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            validation_fraction,
            seed,
            test_curve=test_curve,
            train_samples=train_samples,
        )
        check_statistics(mean, std)
        self.folder = Path(root).expanduser().absolute() / self.source / "cifar-10-batches-bin"
        self.augment = augment
        self.mean, self.std = tuple(mean), tuple(std)
        self.download = download
        self._download_error: DataUnavailableError | None = None
        self._shifts = -1, torch.empty(0)  # epoch, and its shifts and flips

    @override
    def prepare_data(self) -> None:
        """Download and unpack absent files; Lightning calls this in one process per machine."""
        if self.is_loaded or self._download_error is not None or self.folder.exists():
            return
        archive = self.folder.parent / self.archive
        try:
            if self.download or archive.exists():
                check = partial(check_sha256, sha256=self.archive_sha256)
                download_file(archive, self.mirrors, check)
                unpack(archive, self.folder)
        except DataUnavailableError as error:
            self._download_error = error  # `load` raises it on all ranks

    @override
    def load(self) -> Arrays:
        absent = [name for name in self.sha256 if not (self.folder / name).is_file()]
        if absent:
            raise self._download_error or DataUnavailableError(
                f"expected {self.folder} to have {', '.join(absent)}, got no such files; put them"
                " there, or remove the folder and set `data.download=true`"
            )
        parts = []
        for name, digest in self.sha256.items():
            path = self.folder / name
            check_sha256(path, digest)
            parts.append(read_records(path))
        images = np.concatenate([images for images, _ in parts[:-1]])
        labels = np.concatenate([labels for _, labels in parts[:-1]])
        test_images, test_labels = parts[-1]
        return Arrays(
            train_inputs=images,
            train_targets=labels,
            test_inputs=test_images,
            test_targets=test_labels,
            classes=10,
            source=self.source,
            root=str(self.folder.parent.parent),
            sha256=dict(self.sha256),
        )

    @override
    def transform(self, split: str) -> Transform:
        return self._augmented if split == "train" and self.augment else self._normalized

    def _augmented(
        self, inputs: UInt8[Tensor, "B 3 32 32"], index: Int[Tensor, "B"], epoch: int
    ) -> Float[Tensor, "B 3 32 32"]:
        shifts = self._shifts_of(epoch)[index.cpu()].to(inputs.device)
        return self._normalized(shifted_and_flipped(inputs, shifts), index, epoch)

    def _normalized(
        self, inputs: UInt8[Tensor, "B 3 32 32"], index: Int[Tensor, "B"], epoch: int
    ) -> Float[Tensor, "B 3 32 32"]:
        mean, std = (
            255 * torch.tensor(values, dtype=torch.float32, device=inputs.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return inputs.float().sub_(mean).div_(std)

    def _shifts_of(self, epoch: int) -> Int[Tensor, "N 3"]:
        """Return the shifts of all training images, which no batch or rank can change."""
        if self._shifts[0] != epoch:
            # Not the seed of the order of the epoch's samples, which is mixed from two numbers.
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, 1))
            samples = len(self._splits["train"][0])
            steps = torch.randint(2 * _PAD + 1, (samples, 2), generator=generator)
            flips = torch.randint(2, (samples, 1), generator=generator)
            self._shifts = epoch, torch.cat([steps, flips], dim=1)
        return self._shifts[1]


def shifted_and_flipped(
    images: Shaped[Tensor, "B C H W"], shifts: Int[Tensor, "B 3"]
) -> Shaped[Tensor, "B C H W"]:
    """Pad each image by 4 zeros, crop it to its former size, and flip some horizontally.

    Args:
        images: any dtype and device.
        shifts: first row and column of the crop, in [0, 8], and 1 to flip, else 0.

    Returns:
        New images of the same shape.
    """
    height, width = images.shape[2:]
    windows = pad(images, (_PAD,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    rows, columns, flips = shifts.unbind(1)
    cut = windows[torch.arange(len(images), device=images.device), :, rows, columns]
    return torch.where(flips.bool().view(-1, 1, 1, 1), cut.flip(3), cut)


def read_records(
    path: Path,
) -> tuple[UInt8[np.ndarray, "N 3 32 32"], UInt8[np.ndarray, "N"]]:
    """Read a binary file of CIFAR-10: for each image its class and its 3,072 values.

    Returns:
        Images and classes, writable.

    Raises:
        DataError: the file is empty or does not consist of whole records.
        OSError: the file is absent or cannot be read.
    """
    payload = np.fromfile(path, np.uint8)
    if len(payload) == 0 or len(payload) % _RECORD:
        raise DataError(
            f"{path}: expected records of {_RECORD:,} bytes, got {len(payload):,} bytes in total;"
            " remove the folder and run again to download it"
        )
    records = payload.reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].copy()
