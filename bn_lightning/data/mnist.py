"""MNIST from IDX files: looked for, downloaded when absent, checked, never altered."""

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from bn_lightning.data.binarize import binarized, binary, check_threshold
from bn_lightning.data.digits import load_digits
from bn_lightning.data.download import download
from bn_lightning.data.errors import DataError, DataFallbackWarning, DataUnavailableError
from bn_lightning.data.idx import idx_payload, parse_idx
from bn_lightning.data.published import MNIST, algorithm_of, digest_of
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule


class MNISTDataModule(TensorDataModule):
    """MNIST, 60,000 training and 10,000 test images, as (N, 1, 28, 28) float32 in [0, 1].

    The four IDX files are looked for in `<root>/mnist/`, raw (`train-images-idx3-ubyte`) or in
    gzip (`train-images-idx3-ubyte.gz`), and those that are absent are downloaded. Each must have
    the published digest, decompressed; one that has not is an error, whatever `fallback` says,
    and is left as it is. Targets are int64 in [0, 10).

    A data set of the same format needs only its own `source`, `mirrors` and `digests`.

    Args:
        root: folder of all data sets. There is no fallback for one that is not there, which may be
            a typing error, unless it is `data` in the working directory.
        batch_size: training samples in a batch of one rank, at least 1.
        eval_batch_size: the most samples in a validation or test batch of one rank, at least 1.
        validation_fraction: share of the training images cut off for validation, in (0, 1); 1/12
            leaves the customary 55,000 and 5,000.
        seed: of the order of the training batches, at least 0. It does not change the split.
        fallback: "digits" takes scikit-learn's digits, with a `DataFallbackWarning`, where no file
            is there and none can be downloaded; `None` makes this an error. Some files without the
            others are always an error.
        download: download what is absent; without, only look.
        test_curve: let `val_dataloader` return the test set too, second.
        binarize: threshold in (0, 1): pixels above it become 1, the others 0; `None` leaves them
            grey.

    Raises:
        TypeError: an integer was expected and something else came.
        ValueError: a value is out of its range.

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
        download: bool = True,
        test_curve: bool = False,
        binarize: float | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation_fraction, seed, test_curve)
        check_threshold(binarize)
        if fallback not in (None, "digits"):
            raise ValueError(f"Expected `fallback` to be 'digits' or None, but got {fallback!r}")
        self.folder = Path(root).expanduser().absolute() / self.source
        self.fallback = fallback
        self.download = download
        self.binarize = binarize
        self._refusal: DataUnavailableError | None = None

    @override
    def prepare_data(self) -> None:
        """Downloads the files that are absent; Lightning calls it in one process a machine."""
        if not self.download or self.is_loaded or self._refusal is not None:
            return
        try:
            for name in self._absent():
                download(self.folder / f"{name}.gz", self.mirrors, self.digests[name], idx_payload)
        except DataUnavailableError as error:
            # `load` decides, because it runs on every rank: all fall back, or all end.
            self._refusal = error

    @override
    def load(self) -> Arrays:
        return binarized(self._grey(), self.binarize)

    @override
    def evaluated(self, inputs: np.ndarray) -> Tensor:
        return super().evaluated(binary(inputs, self.binarize))

    def _grey(self) -> Arrays:
        absent = self._absent()
        root = self.folder.parent
        if len(absent) == len(self.digests) and self.fallback == "digits":
            if not root.exists() and root != Path.cwd() / "data":
                raise DataUnavailableError(
                    f"`data.root` expected a folder, got {root}, which is not there and nothing"
                    " could be downloaded into it; correct it, or make that folder to fall back"
                )
            rank_zero_warn(
                f"`data.fallback=digits`: {self._explain(absent)}. This run is on scikit-learn's"
                " digits, rescaled to 28x28: its numbers are not those of"
                f" {self.source}. `data.fallback=null` makes this an error.",
                category=DataFallbackWarning,
            )
            return load_digits()
        if absent:
            remedy = ", or set `data.fallback=digits`" if len(absent) == len(self.digests) else ""
            raise DataUnavailableError(self._explain(absent) + remedy) from self._refusal
        # In the order of the table: training images and labels, test images and labels.
        arrays, sha256 = [], {}
        for name, path in self._found().items():
            digest = self.digests[name]
            payload = idx_payload(path, digest)
            arrays.append(parse_idx(payload, path))
            sha256[name] = digest if algorithm_of(digest) == "sha256" else digest_of(payload)
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
        """Name -> path of the files that are there, raw before gzip, in the table's order."""
        return {
            name: path
            for name in self.digests
            for path in (self.folder / f"{name}.gz", self.folder / name)
            if path.exists()
        }

    def _absent(self) -> list[str]:
        return [name for name in self.digests if name not in self._found()]

    def _explain(self, absent: list[str]) -> str:
        if self._refusal is not None:
            return str(self._refusal)
        return (
            f"{self.folder} lacks {', '.join(absent)} (raw or .gz); place these files there"
            " yourself, or allow `download`"
        )

    def _with_channel(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != (28, 28):
            raise DataError(
                f"{self.folder}: expected images of shape (N, 28, 28), but got {images.shape}"
            )
        return images[:, None]
