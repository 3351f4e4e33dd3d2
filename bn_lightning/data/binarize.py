"""Gray images turned into binary ones by a threshold."""

from dataclasses import replace

import numpy as np

from bn_lightning.data.tensor_data_module import Arrays


def check_threshold(threshold: float | None) -> None:
    """Raise a ValueError unless `threshold` is None or a number in (0, 1)."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 < threshold < 1):
        raise ValueError(f"expected `binarize` to be in (0, 1) or null, got {threshold!r}")


def binarized(arrays: Arrays, threshold: float | None) -> Arrays:
    """Return the data with 1 for each pixel above the threshold on [0, 1], and 0 for the others.

    Args:
        arrays: images, uint8 in [0, 255] or floating point in [0, 1].
        threshold: in (0, 1); None changes nothing.

    Returns:
        The data with inputs of the same dtype; uint8 pixels are 0 or 255.
    """
    if threshold is None:
        return arrays
    return replace(
        arrays,
        train_inputs=binary(arrays.train_inputs, threshold),
        test_inputs=binary(arrays.test_inputs, threshold),
    )


def binary(inputs: np.ndarray, threshold: float | None) -> np.ndarray:
    """Apply the threshold of `binarized` to images."""
    if threshold is None:
        return inputs
    full = 255 if inputs.dtype == np.uint8 else 1
    return (inputs > threshold * full).astype(inputs.dtype) * inputs.dtype.type(full)
