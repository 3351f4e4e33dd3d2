"""Image folders with the layout of ImageNet: `train/<class>/*` and `val/<class>/*`."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from bn_lightning.data.archive import unpack
from bn_lightning.data.base import LoadedDataModule
from bn_lightning.data.batches import check_integer
from bn_lightning.data.errors import CorruptImageWarning, DataError, DataUnavailableError
from bn_lightning.data.image_batches import DecodedBatches, ImageBatches, ImageFiles
from bn_lightning.data.image_file import SUFFIXES, ImageFileError
from bn_lightning.data.image_transforms import (
    CenterCrop,
    ImageTransform,
    PadCrop,
    ResizedCrop,
    check_statistics,
)
from bn_lightning.data.prediction_images import find_images, names_for_csv
from bn_lightning.data.protocol import ImageFailure, OnFailures, PredictionInputs
from bn_lightning.runs.machine import MAX_PROCESSES

_CHOICES = {
    "augment": ("resized_crop", "pad_crop", "none"),
    "shuffle": ("samples", "batches"),
    "corrupt": ("error", "skip"),
}


class ImageFolderDataModule(LoadedDataModule):
    """Images in `<root>/<name>/{train,val}/<class>/`, as (N, 3, S, S) float32, decoded by workers.

    Validation is on the whole of `val`, as accuracies on ImageNet are reported; none is split from
    training. Test is on `test/<class>/` if it exists, else on `val` again, which
    `info["folders"]` records: then the test numbers are the ones that model selection saw. Classes
    are the names of the folders, sorted by code point, and must be the same in all splits.
    Checkpoints contain them, and a checkpoint with other classes is refused. Files are selected by
    suffix (`image_file.SUFFIXES`), without hidden ones; a warning counts the others.

    Pixels are scaled to [0, 1] and normalized: `mean` is subtracted and the rest divided by `std`
    in each channel. Batches depend on `seed`, the epoch and the samples, not on `num_workers`, and
    a run resumed within an epoch continues with the next batch.

    Args:
        root: folder of all data sets.
        name: folder of this data set in `root`.
        archive: a tar archive, unpacked into `<root>/<name>/` if that is absent; or None.
        image_size: S, pixels, at least 8.
        batch_size: number of training samples in a batch of one rank, at least 1.
        eval_batch_size: largest number of samples in a validation or test batch of one rank, at
            least 1.
        seed: of the order and augmentation of the training batches, at least 0.
        num_workers: number of decoding processes for training, and again for evaluation, from 0 to
            the larger of 64 and the number of cores; 0 decodes in the main process.
        augment: for training. "resized_crop" is `ResizedCrop`; "pad_crop" is `PadCrop`, for images
            of about S pixels; "none" is the evaluation's `CenterCrop`. Evaluation takes 224/256 of
            the shorter side with "resized_crop", else all of it.
        photometric: strength of random changes of brightness, contrast and color in training, in
            [0, 1]; 0.5 is Howard's (2013). The paper weakens them for its accelerated networks.
        shuffle: "samples" permutes the samples in each epoch. "batches" assigns samples to batches
            once and permutes the batches, like the paper's baseline; its accelerated networks also
            shuffle within shards.
        corrupt: "error" raises for an image that cannot be read; "skip" omits it from its batch,
            warns once, and counts it in `info["corrupt"]`.
        mean: three numbers.
        std: three positive numbers.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2.1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str,
        *,
        archive: str | os.PathLike[str] | None,
        image_size: int,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int,
        augment: str,
        photometric: float,
        shuffle: str,
        corrupt: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        check_integer("image_size", image_size, 8)
        check_integer("batch_size", batch_size, 1)
        check_integer("eval_batch_size", eval_batch_size, 1)
        check_integer("seed", seed, 0)
        check_integer("num_workers", num_workers, 0)
        if num_workers > MAX_PROCESSES:  # workers start before anything else can fail
            raise ValueError(
                f"expected `num_workers` to be at most {MAX_PROCESSES}, got {num_workers}"
            )
        for key, value in (("augment", augment), ("shuffle", shuffle), ("corrupt", corrupt)):
            if value not in _CHOICES[key]:
                expected = ", ".join(map(repr, _CHOICES[key]))
                raise ValueError(f"expected `{key}` to be one of {expected}, got {value!r}")
        if not 0 <= photometric <= 1:
            raise ValueError(f"expected `photometric` to be in [0, 1], got {photometric}")
        check_statistics(mean, std)
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"expected `name` to be a folder in `root`, got {name!r}; set `root` to its parent"
            )
        self.folder = Path(root).expanduser().absolute() / name
        self.archive = None if archive is None else Path(archive).expanduser().absolute()
        self.image_size = image_size
        self.input_shape = (3, image_size, image_size)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.augment, self.photometric = augment, photometric
        self.shuffle, self.corrupt = shuffle, corrupt
        self.mean, self.std = tuple(mean), tuple(std)
        self._splits: dict[str, ImageFiles] = {}
        self._classes: list[str] = []
        self._expected_classes: list[str] | None = None
        self._corrupt: set[str] = set()

    @override
    def prepare_data(self) -> None:
        """Unpack `archive` if needed; Lightning calls this in one process per machine."""
        if self.archive is not None and not self.is_loaded:
            unpack(self.archive, self.folder)

    @override
    def setup(self, stage: str) -> None:
        """List and check the files in the first call, without decoding them.

        Args:
            stage: ignored.

        Raises:
            DataUnavailableError: `<root>/<name>/train` or `val` is absent.
            DataError: there are fewer than two classes, one has no image, or the classes differ
                between the splits or from those of the loaded checkpoint.
        """
        if self.is_loaded:
            return
        for folder in ("train", "val"):
            if not (self.folder / folder).is_dir():
                raise DataUnavailableError(
                    f"expected {self.folder} to have a folder {folder}/, got none; put images at"
                    f" {folder}/<class>/<image>, or set `data.root`, `data.name` or `data.archive`"
                )
        folders = {"train": "train", "validation": "val", "test": "val"}
        if (self.folder / "test").is_dir():
            folders["test"] = "test"
        found = {
            folder: class_folders(self.folder / folder) for folder in sorted({*folders.values()})
        }
        classes = found["train"]
        if len(classes) < 2:
            raise DataError(
                f"{self.folder / 'train'}: expected folders of at least two classes, got"
                f" {len(classes)}{''.join(f' ({name})' for name in classes)}"
            )
        for folder, names in found.items():
            if names != classes:
                raise DataError(
                    f"{self.folder / folder}: expected the classes of train, got classes"
                    f" {_difference(classes, names)}"
                )
        self._check_classes(classes)
        files = {folder: list_images(self.folder / folder, classes) for folder in found}
        sha256 = {folder: digest for folder, (_, digest) in files.items()}
        self._check_same_on_all_ranks(self.folder.name, str(self.folder.parent), sha256)
        self._classes = classes
        self._splits = {split: files[folder][0] for split, folder in folders.items()}
        self._info = {
            "source": self.folder.name,
            "root": str(self.folder.parent),
            "sha256": sha256,
            "folders": folders,
            **{split: len(images) for split, images in self._splits.items()},
            "classes": len(classes),
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the targets, available after `setup`."""
        return tuple(self._classes)

    @property
    def info(self) -> dict[str, Any]:
        """Description of the data, see `DescribedData`.

        `sha256` is that of each folder's listing (`list_images`). Other keys: `root`, `folders` (of
        each split), and `corrupt`, the number of images that this process has skipped.

        Raises:
            RuntimeError: `setup` has not run.
        """
        return {**super().info, "corrupt": len(self._corrupt)}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores: the class names in the order of the targets."""
        return {"classes": list(self._classes)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise an error if the checkpoint's network was trained on other classes.

        Args:
            state_dict: from `state_dict`. Before `setup`, the check is postponed until then.

        Raises:
            DataError: the classes differ.
        """
        self._expected_classes = state_dict["classes"]
        if self.is_loaded:
            self._check_classes(self._classes)

    @override
    def train_dataloader(self) -> ImageBatches:
        """Return full batches, augmented and shuffled in each epoch."""
        # `overfit_batches` needs the same batches in each epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        return self._batches(
            "train",
            self._training_transform(),
            self.batch_size,
            shuffle=shuffle,
            fixed_batches=self.shuffle == "batches",
            drop_last=True,
            keep_workers=True,
        )

    @override
    def val_dataloader(self) -> ImageBatches:
        """Return the whole of `val`, in the order of its files."""
        return self._batches("validation", self._evaluation_transform(), self.eval_batch_size)

    @override
    def test_dataloader(self) -> ImageBatches:
        """Return the whole of `test`, or of `val` without one, in the order of its files."""
        return self._batches("test", self._evaluation_transform(), self.eval_batch_size)

    def prediction_inputs(self, path: Path, on_failures: OnFailures) -> PredictionInputs:
        """Load the image at `path`, or all images of a folder, of any size; see `find_images`.

        Raises:
            DataUnavailableError: `path` has no image.
        """
        files = find_images(path)
        batches = ImageBatches(
            DecodedBatches(files, self._evaluation_transform(), self.seed),
            self.eval_batch_size,
            on_failures=on_failures,
            mean=self.mean,
            std=self.std,
            # A single batch is decoded before a worker has started.
            num_workers=self.num_workers if len(files) > self.eval_batch_size else 0,
            skip_empty=True,
        )
        return PredictionInputs("path", "images", names_for_csv(files), batches)

    def _training_transform(self) -> ImageTransform:
        if self.augment == "resized_crop":
            return ResizedCrop(self.image_size, self.photometric)
        if self.augment == "pad_crop":
            return PadCrop(self.image_size, self.photometric)
        return self._evaluation_transform()

    def _evaluation_transform(self) -> ImageTransform:
        if self.augment == "resized_crop":
            return CenterCrop(self.image_size)
        return CenterCrop(self.image_size, share=1.0)

    def _batches(
        self, split: str, transform: ImageTransform, batch_size: int, **options: Any
    ) -> ImageBatches:
        self._require_setup()
        device, ranks = self._placement()
        return ImageBatches(
            DecodedBatches(self._splits[split], transform, self.seed),
            batch_size,
            on_failures=self._count_failures,
            mean=self.mean,
            std=self.std,
            num_workers=self.num_workers,
            device=device,
            seed=self.seed,
            **ranks,
            **options,
        )

    def _count_failures(self, failures: Sequence[ImageFailure]) -> None:
        for name, message in failures:
            if self.corrupt == "error":
                raise ImageFileError(f"{message}; or set `data.corrupt=skip`")
            if name not in self._corrupt:
                self._corrupt.add(name)
                rank_zero_warn(f"`data.corrupt=skip`: {message}", category=CorruptImageWarning)

    def _check_classes(self, classes: list[str]) -> None:
        expected = self._expected_classes
        if expected is not None and expected != classes:
            raise DataError(
                f"{self.folder}: expected the classes of the checkpoint, got classes"
                f" {_difference(expected, classes)}; use the images of its training"
            )


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, without hidden ones, sorted by code point."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def list_images(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, str]:
    """Find the images of a split by suffix, without reading them.

    Args:
        folder: of the split.
        classes: names of the folders in it, in the order of the targets.

    Returns:
        The images, sorted by class and name, and the hexadecimal SHA-256 of their listing, which
        has a line "class/name size" for each, size in bytes. It does not notice changed contents
        of the same size; reading all contents of a large data set would take hours.

    Raises:
        DataError: a class has no image.
    """
    digest = hashlib.sha256()
    names: list[bytes] = []
    counts, foreign = [], []
    for name in classes:
        sizes = {}
        with os.scandir(folder / name) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    sizes[entry.name] = entry.stat().st_size
                else:
                    foreign.append(f"{name}/{entry.name}")
        if not sizes:
            raise DataError(
                f"{folder / name}: expected images ({', '.join(sorted(SUFFIXES))}), got none; add"
                " images, or remove the folder"
            )
        for file in sorted(sizes):
            path = os.fsencode(f"{name}/{file}")
            names.append(path)
            digest.update(path + f" {sizes[file]}\n".encode())
        counts.append(len(sizes))
    if foreign:
        rank_zero_warn(
            f"{folder}: ignoring {len(foreign)} files without the suffix of an image, first"
            f" {min(foreign)}"
        )
    targets = np.repeat(np.arange(len(classes)), counts)
    return ImageFiles(folder, np.array(names), targets), digest.hexdigest()


def _difference(expected: Sequence[str], got: Sequence[str]) -> str:
    """Describe the names that are missing and those that are unexpected."""
    parts = []
    for words, names in (
        ("without", sorted({*expected} - {*got})),
        ("with", sorted({*got} - {*expected})),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{words} {', '.join(names[:3])}{more}")
    return " and ".join(parts) or "in another order"
