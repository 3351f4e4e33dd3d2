"""Images that somebody gives a trained network, as its data module evaluates its own."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from bn_lightning.data.batches import Batch
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.image_batches import ImageFiles
from bn_lightning.data.image_file import SUFFIXES, ImageFileError, read_image
from bn_lightning.data.image_folder import ImageFolderDataModule
from bn_lightning.data.tensor_data_module import TensorDataModule

Failures = Callable[[list[tuple[str, str]]], None]
"""Called with name and error of images that cannot be used."""


def find_images(path: Path) -> ImageFiles:
    """Finds the image files that a path stands for, and does not read them.

    Args:
        path: an image file, whatever its name ends in; or a folder, whose files are taken by the
            ends of their names (`image_file.SUFFIXES`), at any depth, without hidden ones and
            without folders behind links.

    Returns:
        The files, in the order of their names' code points; their targets are 0, 1, ...

    Raises:
        DataUnavailableError: there is neither a file nor a folder, or no image in the folder.
    """
    if path.is_file():
        return ImageFiles(path.parent, np.array([os.fsencode(path.name)]), np.arange(1))
    if not path.is_dir():
        raise DataUnavailableError(
            f"`input` expected an image or a folder of images, got {path}: no such file; give its"
            " path"
        )
    names: list[bytes] = []
    others: list[bytes] = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith("."):
                name = os.path.relpath(os.path.join(folder, file), path)
                is_image = os.path.splitext(file)[1].lower() in SUFFIXES
                (names if is_image else others).append(os.fsencode(name))
    if not names:
        shown = ", ".join(os.fsdecode(name) for name in sorted(others)[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise DataUnavailableError(
            f"`input` expected images ({', '.join(sorted(SUFFIXES))}) in the folder {path}, got"
            f" {shown + more or 'no file'}; give another folder, or an image itself"
        )
    return ImageFiles(path, np.array(sorted(names)), np.arange(len(names)))


def image_batches(datamodule: Any, files: ImageFiles, on_failures: Failures) -> Iterable[Batch]:
    """Batches of inputs for the network, with the targets of their files.

    An image folder's data module crops and scales images of any size. The other ones scale none:
    an image must have the size of theirs. Where theirs are grey, colours become grey by ITU-R 601.

    Args:
        datamodule: of the checkpoint; neither its files nor its `setup` are needed.
        files: from `find_images`.
        on_failures: what it does not raise for is left out.

    Raises:
        DataError: these data are no images.
    """
    if isinstance(datamodule, ImageFolderDataModule):
        return datamodule.evaluation_batches(files, on_failures)
    shape: tuple[int, ...] = getattr(datamodule, "input_shape", None) or ()
    if not isinstance(datamodule, TensorDataModule) or len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(
            "`input` expected a checkpoint trained on images of this package's data modules, got"
            f" one trained on {type(datamodule).__name__}; predict in a script"
        )
    return _unscaled_batches(datamodule, shape, files, on_failures)


def _unscaled_batches(
    datamodule: TensorDataModule, shape: tuple[int, ...], files: ImageFiles, on_failures: Failures
) -> Iterator[Batch]:
    for begin in range(0, len(files), datamodule.eval_batch_size):
        images, indices = [], []
        for index in range(begin, min(begin + datamodule.eval_batch_size, len(files))):
            try:
                images.append(_pixels(files.path(index), shape))
            except ImageFileError as error:
                on_failures([(files.name(index), str(error))])
                continue
            indices.append(index)
        if images:
            yield datamodule.evaluated(np.stack(images)), torch.from_numpy(files.targets[indices])


def _pixels(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "C H W"]:
    channels, height, width = shape
    image = read_image(path)
    if image.size != (width, height):
        raise ImageFileError(
            f"{path}: expected {width}x{height} pixels, as the network was trained on, got"
            f" {image.width}x{image.height}; scale the image"
        )
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image).transpose(2, 0, 1)
