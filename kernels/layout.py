"""The layout of a tensor in memory, contiguous or channels-last, and that of its mask."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels are neighbours in memory; False for a contiguous `x`."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def strides_are_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return what `is_channels_last` does, for a tensor of these sizes and strides."""
    moved = [(*sizes[:1], *sizes[2:], *sizes[1:2]) for sizes in (shape, stride)]
    return not _are_contiguous(shape, stride) and _are_contiguous(*moved)


def _are_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def as_layout(value: Tensor, channels_last: bool) -> Tensor:
    """Return `value` in channels-last or contiguous memory, copied if it is in another layout.

    Also copied is a bf16 tensor at an address that is no multiple of 4, because the kernels load
    pairs.
    """
    if not channels_last:
        dense = value.contiguous()
    else:
        dense = value.movedim(1, -1).contiguous().movedim(-1, 1)
    is_plain = type(dense) is Tensor or type(dense) is Parameter
    if dense.dtype is torch.bfloat16 and is_plain and dense.data_ptr() % 4:
        dense = dense.clone()
    return dense


def mask_rows(shape: Sequence[int], channels_last: bool) -> tuple[int, int]:
    """Return the rows of the mask of a tensor, and the positions of each.

    A row is a sample, or a position in space if the tensor is channels-last, so that in memory its
    elements are neighbours. One channel is one row.
    """
    N, C, L = shape[0], shape[1], math.prod(shape[2:])
    if C == 1:
        return 1, N * L
    return (N * L, C) if channels_last else (N, C * L)


def mask_shape(shape: Sequence[int], channels_last: bool) -> tuple[int, int]:
    """Return the shape of the mask of a tensor: rows, and bytes of a row.

    Each row begins with a byte of its own, and its last byte may have bits of no element.
    """
    rows, positions = mask_rows(shape, channels_last)
    return rows, (positions + 7) // 8


def contiguous(value: Tensor | None) -> Tensor | None:
    """Return a contiguous `value`, copied if it is not; None for None."""
    return None if value is None else value.contiguous()
