"""Images for a trained network to classify, preprocessed as its data module's test images."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from bn_lightning.data.batches import LabeledBatch
from bn_lightning.data.errors import DataUnavailableError
from bn_lightning.data.image_batches import ImageFiles
from bn_lightning.data.image_file import SUFFIXES, ImageFileError, read_image
from bn_lightning.data.protocol import ImageFailure, OnFailures


def find_images(path: Path) -> ImageFiles:
    """Find the image files at a path, without reading them.

    Args:
        path: an image file with any suffix; or a folder, which is searched at any depth for files
            with one of `image_file.SUFFIXES`, except hidden files and linked folders.

    Returns:
        The files, sorted by name; their targets are 0, 1, ...

    Raises:
        DataUnavailableError: `path` does not exist, or the folder has no image.
    """
    if path.is_file():
        return ImageFiles(path.parent, np.array([os.fsencode(path.name)]), np.arange(1))
    if not path.is_dir():
        raise DataUnavailableError(
            f"expected `input` to be an image or a folder of images, got {path}: no such file;"
            " correct the path"
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
            f"expected `input` to be a folder with images ({', '.join(sorted(SUFFIXES))}), got"
            f" {shown + more or 'no file'} in the folder {path}; give another folder, or an image"
        )
    return ImageFiles(path, np.array(sorted(names)), np.arange(len(names)))


def names_for_csv(files: ImageFiles) -> list[str]:
    """Return the paths of the files as valid UTF-8; other bytes are escaped with backslashes."""
    return [
        os.fsencode(Path(files.path(index))).decode("utf-8", "backslashreplace")
        for index in range(len(files))
    ]


def fixed_size_batches(
    files: ImageFiles,
    shape: tuple[int, ...],
    batch_size: int,
    preprocess: Callable[[UInt8[np.ndarray, "B C H W"]], Tensor],
    on_failures: OnFailures,
) -> Iterator[LabeledBatch]:
    """Yield batches of images that already have the network's size: none is scaled.

    Args:
        files: from `find_images`.
        shape: of an image, (C, H, W), C 1 or 3; for 1, colors become gray by ITU-R 601.
        batch_size: largest number of images in a batch.
        preprocess: turns the pixels of a batch into inputs.
        on_failures: see `OnFailures`.
    """
    for begin in range(0, len(files), batch_size):
        images, indices = [], []
        for index in range(begin, min(begin + batch_size, len(files))):
            try:
                images.append(_pixels(files.path(index), shape))
            except ImageFileError as error:
                on_failures([ImageFailure(files.name(index), str(error))])
                continue
            indices.append(index)
        if images:
            yield preprocess(np.stack(images)), torch.from_numpy(files.targets[indices])


def _pixels(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "C H W"]:
    channels, height, width = shape
    image = read_image(path)
    if image.size != (width, height):
        raise ImageFileError(
            f"{path}: expected {width}x{height} pixels, the size of the training images, got"
            f" {image.width}x{image.height}; scale the image"
        )
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image).transpose(2, 0, 1)
