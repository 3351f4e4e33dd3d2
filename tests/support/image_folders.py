"""Image folders that tests write, and data modules over them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bn_lightning.data import ImageFolderDataModule


def write_images(
    folder: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    train: int = 6,
    val: int = 3,
    size: tuple[int, int] = (20, 16),
    suffix: str = ".png",
) -> Path:
    """Writes `train` and `val` images of noise for each class; returns the folder."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:03}{suffix}")
    return folder


def folder_options(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of `ImageFolderDataModule` for small tests."""
    defaults = {
        "root": folder.parent,
        "name": folder.name,
        "archive": None,
        "image_size": 8,
        "batch_size": 2,
        "eval_batch_size": 4,
        "seed": 1,
        "num_workers": 0,
        "augment": "resized_crop",
        "photometric": 0.5,
        "shuffle": "samples",
        "corrupt": "error",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    return {**defaults, **options}


def image_module(folder: Path, **options: Any) -> ImageFolderDataModule:
    """A data module that has been set up."""
    module = ImageFolderDataModule(**folder_options(folder, **options))
    module.prepare_data()
    module.setup("fit")
    return module
