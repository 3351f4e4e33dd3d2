"""The 1,797 handwritten digits of scikit-learn, in the shape of MNIST and without a download."""

import hashlib

import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from bn_lightning.data.binarize import binarized, binary, check_threshold
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule

IMAGE_SIZE = 28  # pixels, as in MNIST
_LARGEST = 16  # largest value of a pixel, which counts the set pixels in a 4x4 block
_TEST = 360  # samples, a fifth


class DigitsDataModule(TensorDataModule):
    """scikit-learn's digits, 8x8 with values 0 to 16, as (N, 1, 28, 28) float32 in [0, 1].

    They are scaled by 1/16 and enlarged bilinearly. The test set is the last 360 samples of the
    file, whatever the arguments: the file is sorted by writer, so that most test writers are not in
    the training set. Inputs and targets are as in `MNISTDataModule`.

    Args:
        validation_fraction: share of the 1,437 training samples used for validation, in (0, 1).
        binarize: see `MNISTDataModule`.

    The other arguments are those of `TensorDataModule`.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """

    input_shape = (1, IMAGE_SIZE, IMAGE_SIZE)

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        *,
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
        self.binarize = binarize

    @override
    def load(self) -> Arrays:
        return binarized(load_digits(), self.binarize)

    @override
    def evaluated(self, inputs: np.ndarray) -> Tensor:
        return super().evaluated(binary(inputs, self.binarize))


def load_digits() -> Arrays:
    """Load the digits from scikit-learn, scaled and enlarged.

    Returns:
        Images (N, 1, 28, 28) float32 in [0, 1], classes 0 to 9, and the SHA-256 of the bytes of
        the original 8x8 images and of the targets.
    """
    digits = sklearn_digits()
    images, targets = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    small = torch.from_numpy(images)[:, None].float() / _LARGEST
    inputs = interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False).numpy()
    return Arrays(
        train_inputs=inputs[:-_TEST],
        train_targets=targets[:-_TEST],
        test_inputs=inputs[-_TEST:],
        test_targets=targets[-_TEST:],
        classes=10,
        source="digits",
        root="scikit-learn",
        sha256={
            "images": hashlib.sha256(images.tobytes()).hexdigest(),
            "targets": hashlib.sha256(targets.tobytes()).hexdigest(),
        },
    )
