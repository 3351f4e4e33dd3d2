"""MNIST from IDX files, which are downloaded if absent."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from pooch.hashes import hash_algorithm
from torch import Tensor
from typing_extensions import override

from bn_lightning.data.binarize import binarized, binary, check_threshold
from bn_lightning.data.digits import load_digits
from bn_lightning.data.download import download_file
from bn_lightning.data.errors import DataError, DataFallbackWarning, DataUnavailableError
from bn_lightning.data.idx import idx_payload, parse_idx
from bn_lightning.data.published import MNIST
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule


class MNISTDataModule(TensorDataModule):
    """MNIST, 60,000 training and 10,000 test images, as (N, 1, 28, 28) float32 in [0, 1].

    The four IDX files are in `<root>/mnist/`, raw (`train-images-idx3-ubyte`) or gzip
    (`train-images-idx3-ubyte.gz`); absent ones are downloaded. The decompressed payload of each
    must have the published digest: another file is an error, whatever `fallback` is, and is not
    changed. Targets are int64 in [0, 10).

    A subclass for data in the same format sets `source`, `mirrors` and `digests`.

    Args:
        root: folder of all data sets. If it does not exist, `fallback` does not apply, because the
            path may be mistyped; the exception is `data` in the working directory.
        validation_fraction: share of the training images used for validation, in (0, 1); 1/12
            leaves the customary 55,000 and 5,000.
        fallback: "digits" uses scikit-learn's digits, with a `DataFallbackWarning`, if all files
            are absent and cannot be downloaded; None raises an error. If only some files are
            absent, that is always an error.
        download: download absent files.
        binarize: threshold in (0, 1): pixels above it become 1, others 0; None keeps gray values.

    The other arguments are those of `TensorDataModule`.

    Source: Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits".
    """

    source: ClassVar[str] = "mnist"
    input_shape = (1, 28, 28)
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    digests: ClassVar[dict[str, str]] = MNIST

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        fallback: str | None,
        *,
        download: bool = True,
        test_curve: bool = False,
        binarize: float | None = None,
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
        check_threshold(binarize)
        if fallback not in (None, "digits"):
            raise ValueError(f"expected `fallback` to be 'digits' or None, got {fallback!r}")
        self.folder = Path(root).expanduser().absolute() / self.source
        self.fallback = fallback
        self.download = download
        self.binarize = binarize
        self._download_error: DataUnavailableError | None = None

    @override
    def prepare_data(self) -> None:
        """Download absent files; Lightning calls this in one process per machine."""
        if not self.download or self.is_loaded or self._download_error is not None:
            return
        try:
            for name in self._absent():
                check = partial(idx_payload, digest=self.digests[name])
                download_file(self.folder / f"{name}.gz", self.mirrors, check)
        except DataUnavailableError as error:
            # `load` handles it: it runs on all ranks, so that all of them fall back or raise.
            self._download_error = error

    @override
    def load(self) -> Arrays:
        return binarized(self._gray_images(), self.binarize)

    @override
    def evaluated(self, inputs: np.ndarray) -> Tensor:
        return super().evaluated(binary(inputs, self.binarize))

    def _gray_images(self) -> Arrays:
        absent = self._absent()
        root = self.folder.parent
        if len(absent) == len(self.digests) and self.fallback == "digits":
            if not root.exists() and root != Path.cwd() / "data":
                raise DataUnavailableError(
                    f"expected `data.root` to be a folder, got {root}, which does not exist, and no"
                    " download succeeded; correct the path, or create the folder to use"
                    " `data.fallback`"
                )
            rank_zero_warn(
                f"`data.fallback=digits`: {self._explain(absent)}. This run uses scikit-learn's"
                " digits, rescaled to 28x28, and its results are not comparable with"
                f" {self.source}; `data.fallback=null` makes this an error.",
                category=DataFallbackWarning,
            )
            return load_digits()
        if absent:
            remedy = ", or set `data.fallback=digits`" if len(absent) == len(self.digests) else ""
            raise DataUnavailableError(self._explain(absent) + remedy) from self._download_error
        # In the order of the table: training images and labels, test images and labels.
        arrays, sha256 = [], {}
        for name, path in self._found().items():
            digest = self.digests[name]
            payload = idx_payload(path, digest)
            arrays.append(parse_idx(payload, path))
            is_sha256 = hash_algorithm(digest) == "sha256"
            sha256[name] = digest if is_sha256 else hashlib.sha256(payload).hexdigest()
        train_images, train_labels, test_images, test_labels = arrays
        return Arrays(
            train_inputs=self._with_channel(train_images),
            train_targets=train_labels,
            test_inputs=self._with_channel(test_images),
            test_targets=test_labels,
            classes=10,
            source=self.source,
            root=str(self.folder.parent),
            sha256=sha256,
        )

    def _found(self) -> dict[str, Path]:
        """Return name -> path of existing files, raw before gzip, in the order of `digests`."""
        return {
            name: path
            for name in self.digests
            for path in (self.folder / f"{name}.gz", self.folder / name)
            if path.exists()
        }

    def _absent(self) -> list[str]:
        return [name for name in self.digests if name not in self._found()]

    def _explain(self, absent: list[str]) -> str:
        if self._download_error is not None:
            return str(self._download_error)
        return (
            f"expected {self.folder} to have {', '.join(absent)} (raw or .gz), got no such files;"
            " put them there, or set `data.download=true`"
        )

    def _with_channel(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != (28, 28):
            raise DataError(
                f"{self.folder}: expected images of shape (N, 28, 28), got {images.shape}"
            )
        return images[:, None]
