"""The layout of a tensor in memory: contiguous or channels-last."""

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels are neighbours in memory; False for a contiguous `x`."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def as_layout(value: Tensor, channels_last: bool) -> Tensor:
    """Return `value` in channels-last or contiguous memory, copied if it is in another layout."""
    if not channels_last:
        return value.contiguous()
    return value.movedim(1, -1).contiguous().movedim(-1, 1)


def contiguous(value: Tensor | None) -> Tensor | None:
    """Return a contiguous `value`, copied if it is not; None for None."""
    return None if value is None else value.contiguous()
