"""Grey images made binary: a threshold on [0, 1]."""

from dataclasses import replace

import numpy as np

from bn_lightning.data.tensor_data_module import Arrays


def check_threshold(threshold: float | None) -> None:
    """Refuses what is no threshold.

    Args:
        threshold: of `binarized`, in (0, 1), or `None` for grey images.

    Raises:
        ValueError: it is neither.
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 < threshold < 1):
        raise ValueError(f"Expected `binarize` in (0, 1), or null, but got {threshold!r}")


def binarized(arrays: Arrays, threshold: float | None) -> Arrays:
    """The same images with 1 where a pixel on [0, 1] is above the threshold, and 0 elsewhere.

    Args:
        arrays: images as uint8, read as [0, 255], or floating point in [0, 1].
        threshold: in (0, 1); `None` changes nothing.

    Returns:
        Training and test inputs in the dtype they had, all else as it was.
    """
    if threshold is None:
        return arrays
    return replace(
        arrays,
        train_inputs=binary(arrays.train_inputs, threshold),
        test_inputs=binary(arrays.test_inputs, threshold),
    )


def binary(inputs: np.ndarray, threshold: float | None) -> np.ndarray:
    """The images of `binarized`, without their targets."""
    if threshold is None:
        return inputs
    full = 255 if inputs.dtype == np.uint8 else 1
    return (inputs > threshold * full).astype(inputs.dtype) * inputs.dtype.type(full)
