"""An image folder, `train/<class>/*` and `val/<class>/*`, as ImageNet is laid out."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from bn_lightning.data.archive import unpack
from bn_lightning.data.batches import check_integer
from bn_lightning.data.errors import CorruptImageWarning, DataError, DataUnavailableError
from bn_lightning.data.image_batches import DecodedBatches, ImageBatches, ImageFiles
from bn_lightning.data.image_file import SUFFIXES, ImageFileError
from bn_lightning.data.image_transforms import (
    CentreCrop,
    ImageTransform,
    PadCrop,
    ResizedCrop,
    check_statistics,
)
from bn_lightning.data.tensor_data_module import check_same_on_all_ranks
from bn_lightning.runs.machine import MAX_PROCESSES

_CHOICES = {
    "augment": ("resized_crop", "pad_crop", "none"),
    "shuffle": ("samples", "batches"),
    "corrupt": ("error", "skip"),
}


class ImageFolderDataModule(LightningDataModule):
    """Images in `<root>/<name>/{train,val}/<class>/`, as (N, 3, S, S) float32, decoded by workers.

    Training is on `train`, validation on `val`, whole, as accuracies on ImageNet are reported: no
    validation is cut from training. Test is on `test/<class>/` where there is one. Where there is
    none it is on `val` again, `info["folders"]` says so, and the numbers are those that a choice
    between runs was made by. Classes are the folders' names in the order of their code points, and
    `val` and `test` have the same ones; the names are kept in checkpoints, and a checkpoint of
    other classes is refused. Files are taken by the ends of their names (`image_file.SUFFIXES`);
    hidden ones are not, and others are counted in a warning.

    Pixels are scaled to [0, 1], then `mean` is taken from each channel and the rest divided by
    `std`; 0 and 1 leave them on [0, 1]. Batches depend on `seed`, the epoch and the samples alone,
    not on `num_workers`, and a run resumed within an epoch goes on at the next batch.

    Args:
        root: folder of all data sets.
        name: of this data set's folder in it.
        archive: a tar archive, unpacked into `<root>/<name>/` where that is absent; or None.
        image_size: S, pixels, at least 8.
        batch_size: training samples in a batch of one rank, at least 1.
        eval_batch_size: the most samples in a validation or test batch of one rank, at least 1.
        seed: of the order and the augmentation of the training batches, at least 0.
        num_workers: processes that decode for training, and as many for an evaluation, at least 0,
            and at most 64 or as many as there are cores; 0 decodes in the training process.
        augment: what training sees. "resized_crop": a random part, `ResizedCrop`; "pad_crop":
            `PadCrop`, for images of about S pixels; "none": what evaluation sees, which is the
            middle, `CentreCrop`, with 224/256 of the shorter side for "resized_crop", else all.
        photometric: strength of changes of brightness, contrast and colour in training, in [0, 1];
            0.5 is Howard's (2013). The paper has less of them for its accelerated networks.
        shuffle: "samples" permutes them in each epoch. "batches" deals them into batches once and
            permutes the batches: the same samples always appear together. This stands for the
            difference between the paper's baseline and its accelerated networks, which shuffle
            within shards as well.
        corrupt: what an image that cannot be read does: "error" ends the run; "skip" leaves it out
            of its batch, names it in a warning once, and counts it in `info["corrupt"]`.
        mean: three numbers.
        std: three positive numbers.

    Raises:
        TypeError: an integer was expected and something else came.
        ValueError: a value is out of its range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2.1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str,
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
        if num_workers > MAX_PROCESSES:  # they are started before anything else can fail
            raise ValueError(
                f"Expected `num_workers` to be at most {MAX_PROCESSES}, but got {num_workers}"
            )
        for key, value in (("augment", augment), ("shuffle", shuffle), ("corrupt", corrupt)):
            if value not in _CHOICES[key]:
                expected = ", ".join(map(repr, _CHOICES[key]))
                raise ValueError(f"Expected `{key}` to be one of {expected}, but got {value!r}")
        if not 0 <= photometric <= 1:
            raise ValueError(f"Expected `photometric` in [0, 1], but got {photometric}")
        check_statistics(mean, std)
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"Expected `name` to be that of a folder in `root`, but got {name!r}; give the"
                " folder that it lies in as `root`"
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
        self._info: dict[str, Any] = {}
        self._corrupt: set[str] = set()

    @override
    def prepare_data(self) -> None:
        """Unpacks `archive` where it is needed; Lightning calls it in one process a machine."""
        if self.archive is not None and not self.is_loaded:
            unpack(self.archive, self.folder)

    @override
    def setup(self, stage: str) -> None:
        """Lists and checks the files, the first time it is called; decodes none of them.

        Args:
            stage: ignored: each stage takes its split.

        Raises:
            DataUnavailableError: there is no `<root>/<name>/train` or `val`.
            DataError: there are fewer than two classes, one has no image, the splits' classes
                differ, or they are not those of the checkpoint that was loaded.
        """
        if self.is_loaded:
            return
        for folder in ("train", "val"):
            if not (self.folder / folder).is_dir():
                raise DataUnavailableError(
                    f"{self.folder} lacks a folder {folder}/; place the images there yourself, as"
                    f" {folder}/<class>/<image>, or give `data.root`, `data.name` or `data.archive`"
                )
        folders = {"train": "train", "validation": "val", "test": "val"}
        if (self.folder / "test").is_dir():
            folders["test"] = "test"
        found = {
            folder: class_names(self.folder / folder) for folder in sorted({*folders.values()})
        }
        classes = found["train"]
        if len(classes) < 2:
            raise DataError(
                f"{self.folder / 'train'}: expected a folder for each of at least two classes, got"
                f" {len(classes)}{''.join(f' ({name})' for name in classes)}"
            )
        for folder, names in found.items():
            if names != classes:
                raise DataError(
                    f"{self.folder / folder}: expected the classes of train,"
                    f" got {_difference(classes, names)}"
                )
        self._check_classes(classes)
        files = {folder: list_images(self.folder / folder, classes) for folder in found}
        sha256 = {folder: digest for folder, (_, digest) in files.items()}
        check_same_on_all_ranks(self.trainer, self.folder.name, str(self.folder.parent), sha256)
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
    def is_loaded(self) -> bool:
        """Whether `setup` has run in this process."""
        return bool(self._splits)

    @property
    def num_classes(self) -> int:
        """How many classes there are, known after `setup`."""
        return len(self._classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the targets, known after `setup`."""
        return tuple(self._classes)

    @property
    def info(self) -> dict[str, Any]:
        """What a run record says of the data, as plain values.

        `source` (the folder's name), `root`, `sha256` (of each folder's listing, see
        `list_images`), `folders` (the folder of each split), the number of samples in `train`,
        `validation` and `test`, `classes` (how many), and `corrupt`, how many images this process
        has skipped.

        Raises:
            RuntimeError: `setup` has not run yet.
        """
        if not self._info:
            raise RuntimeError("Expected `setup` to have run before `info` is read")
        return {
            **self._info,
            "sha256": dict(self._info["sha256"]),
            "folders": dict(self._info["folders"]),
            "corrupt": len(self._corrupt),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the classes' names, in the order of the targets."""
        return {"classes": list(self._classes)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses the checkpoint of a network that was trained on other classes.

        Args:
            state_dict: from `state_dict`; before `setup` it is remembered until then.

        Raises:
            DataError: its classes are not these.
        """
        self._expected_classes = state_dict["classes"]
        if self.is_loaded:
            self._check_classes(self._classes)

    @override
    def train_dataloader(self) -> ImageBatches:
        """Full batches in an order of their own for each epoch, augmented."""
        # `overfit_batches` asks for the same few batches in every epoch.
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
        """The whole of `val`, in the order of its files."""
        return self._batches("validation", self._evaluation_transform(), self.eval_batch_size)

    @override
    def test_dataloader(self) -> ImageBatches:
        """The whole of `test`, or of `val` where there is none, in the order of its files."""
        return self._batches("test", self._evaluation_transform(), self.eval_batch_size)

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """The batch as it is: `ImageBatches` has put it there."""
        return batch

    def evaluation_batches(
        self, files: ImageFiles, on_failures: Callable[[list[tuple[str, str]]], None]
    ) -> ImageBatches:
        """Batches of other images, as `test_dataloader` makes them of its own.

        It needs no `setup`, and none of the data's own files.

        Args:
            files: the images; what they have for targets is handed out beside them.
            on_failures: called with name and error of each image of a batch that cannot be read;
                what it does not raise for is left out.
        """
        return ImageBatches(
            DecodedBatches(files, self._evaluation_transform(), self.seed),
            self.eval_batch_size,
            on_failures=on_failures,
            mean=self.mean,
            std=self.std,
            # One batch is decoded before a worker has begun.
            num_workers=self.num_workers if len(files) > self.eval_batch_size else 0,
            skip_empty=True,
        )

    def _training_transform(self) -> ImageTransform:
        if self.augment == "resized_crop":
            return ResizedCrop(self.image_size, self.photometric)
        if self.augment == "pad_crop":
            return PadCrop(self.image_size, self.photometric)
        return self._evaluation_transform()

    def _evaluation_transform(self) -> ImageTransform:
        if self.augment == "resized_crop":
            return CentreCrop(self.image_size)
        return CentreCrop(self.image_size, share=1.0)

    def _batches(
        self, split: str, transform: ImageTransform, batch_size: int, **options: Any
    ) -> ImageBatches:
        if not self.is_loaded:
            raise RuntimeError("Expected `setup` to have run before the data loaders are made")
        device, ranks = torch.device("cpu"), None
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            ranks = self.trainer.distributed_sampler_kwargs
        return ImageBatches(
            DecodedBatches(self._splits[split], transform, self.seed),
            batch_size,
            on_failures=self._note_failures,
            mean=self.mean,
            std=self.std,
            num_workers=self.num_workers,
            device=device,
            seed=self.seed,
            rank=ranks["rank"] if ranks else 0,
            world_size=ranks["num_replicas"] if ranks else 1,
            **options,
        )

    def _note_failures(self, failures: list[tuple[str, str]]) -> None:
        for path, message in failures:
            if self.corrupt == "error":
                raise ImageFileError(f"{message}; or set `data.corrupt=skip`")
            if path not in self._corrupt:
                self._corrupt.add(path)
                rank_zero_warn(f"`data.corrupt=skip`: {message}", category=CorruptImageWarning)

    def _check_classes(self, classes: list[str]) -> None:
        expected = self._expected_classes
        if expected is not None and expected != classes:
            raise DataError(
                f"{self.folder}: expected the classes of the checkpoint,"
                f" got {_difference(expected, classes)}; use the images it was trained with"
            )


def class_names(folder: Path) -> list[str]:
    """The folders in a folder, hidden ones left out, in the order of their code points."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def list_images(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, str]:
    """Finds the images of a split, by name, and does not read them.

    Args:
        folder: of the split.
        classes: names of the folders in it, in the order of the targets.

    Returns:
        The images, by class and name, and the hexadecimal SHA-256 of their listing: a line
        "class/name size" for each, size in bytes. Reading all contents would take hours on a
        large data set; an image that changes and keeps its size is not noticed.

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
                f"{folder / name}: expected images ({', '.join(sorted(SUFFIXES))}), got none; place"
                " them there, or remove the folder"
            )
        for file in sorted(sizes):
            path = os.fsencode(f"{name}/{file}")
            names.append(path)
            digest.update(path + f" {sizes[file]}\n".encode())
        counts.append(len(sizes))
    if foreign:
        rank_zero_warn(
            f"{folder}: {len(foreign)} files are left out that no image is named like, the first of"
            f" them {min(foreign)}"
        )
    targets = np.repeat(np.arange(len(classes)), counts)
    return ImageFiles(folder, np.array(names), targets), digest.hexdigest()


def _difference(expected: Sequence[str], got: Sequence[str]) -> str:
    """What is missing and what is too much, in words."""
    parts = []
    for words, names in (
        ("without", sorted({*expected} - {*got})),
        ("with", sorted({*got} - {*expected})),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{words} {', '.join(names[:3])}{more}")
    return " and ".join(parts) or "the same in another order"
