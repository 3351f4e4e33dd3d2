"""Ghost Batch Normalization: BatchNorm whose training statistics are those of parts of the batch.

The parts become channels of one call of the ordinary kernels: P parts of C channels each are one
batch with P * C channels. For contiguous tensors that is a view.
"""

from typing import Any

import torch
from torch import Tensor

from bn_lightning.kernels import batch_norm
from bn_lightning.kernels.checks import check_average, check_choices
from bn_lightning.kernels.dispatch import is_recomputation
from bn_lightning.kernels.layout import as_layout, is_channels_last
from bn_lightning.kernels.reference import compute_dtype
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BackendMixin


class _GhostMixin(_BackendMixin):
    """The size of the parts, and the arithmetic of a training batch."""

    ghost_size: int

    def __init__(self, *args: Any, ghost_size: int, **kwargs: Any) -> None:
        if ghost_size < 2:
            raise ValueError(
                f"expected `ghost_size` to be at least 2, got {ghost_size}; a single sample has no "
                "variance in a BatchNorm of (N, C)"
            )
        super().__init__(*args, **kwargs)
        self.ghost_size = ghost_size

    def _batch_norm(self, input: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        is_training = options["training"] and self.training and not self.stats_frozen
        parts = input.shape[0] // self.ghost_size
        if not is_training or parts < 2:
            return batch_norm(input, *state, **options)
        return _normalize_parts(parts, input, *state, **options)

    def extra_repr(self) -> str:
        """Return the description of a BatchNorm, and the size of the parts."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(_GhostMixin, BatchNorm1d):
    """Ghost Batch Normalization of (N, C) or (N, C, L); see `GhostBatchNorm2d`."""


class GhostBatchNorm2d(_GhostMixin, BatchNorm2d):
    """Batch Normalization of (N, C, H, W) whose training statistics are those of parts of a batch.

    A training batch of N samples has P = N // `ghost_size` parts. Each part is normalized by its
    own mean and biased variance. The running statistics move once per batch, towards the average of
    the parts' means and unbiased variances. (The paper moves them once per part.) Evaluation,
    frozen statistics and the keys of the `state_dict` are those of BatchNorm.

    If P divides N, part p has the samples p, p + P, p + 2P, ... of the batch, so that a contiguous
    input needs no copy. Otherwise the parts differ by one sample: the larger ones divide the first
    samples in that way, the others the rest, in two calls. A channels-last input is copied once,
    and the result once. No part has fewer than
    `ghost_size` samples, except for a smaller batch, which is one part.

    Args:
        ghost_size: least number of samples of a part, at least 2, keyword-only.

    The other arguments are those of `bn_lightning.BatchNorm2d`.

    Raises:
        ValueError: an argument is outside its range.

    Source: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, Algorithm 1.
    """


class GhostBatchNorm3d(_GhostMixin, BatchNorm3d):
    """Ghost Batch Normalization of (N, C, D, H, W); see `GhostBatchNorm2d`."""


def _normalize_parts(
    parts: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    **options: Any,
) -> Tensor:
    """Normalize `parts` parts of a training batch, and update the running statistics once.

    The arguments are those of `bn_lightning.kernels.batch_norm`.
    """
    check_choices(x, residual, options["activation"], options["backend"])
    if momentum is None:
        check_average(running_mean, num_batches_tracked)
    channels_last = is_channels_last(x)
    size, larger = divmod(x.shape[0], parts)
    # The first `larger` parts have one sample more than the others.
    split = larger * (size + 1)
    outputs: list[Tensor] = []
    statistics: list[Any] = []  # (2, P * C) of each call
    for start, stop, count in ((0, split, larger), (split, x.shape[0], parts - larger)):
        if count == 0:
            continue
        shape = (2, count * x.shape[1])
        batch = (None, None) if running_mean is None else running_mean.new_zeros(shape)
        y = batch_norm(
            _fold(x[start:stop], count, channels_last),
            None if weight is None else weight.repeat(count),
            None if bias is None else bias.repeat(count),
            *batch,
            # The running statistics become those of the parts.
            momentum=1.0,
            residual=None
            if residual is None
            else _fold(residual[start:stop], count, channels_last),
            **options,
        )
        outputs.append(_unfold(y, count, channels_last))
        statistics.append(batch)
    if running_mean is not None and running_var is not None and not is_recomputation():
        # (2, P, C) -> (2, C)
        parts_2PC = [batch.unflatten(1, (-1, x.shape[1])) for batch in statistics]
        averages = torch.cat(parts_2PC, dim=1).mean(1)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        weight_of_batch: Any = momentum
        if momentum is None and num_batches_tracked is not None:
            precise = num_batches_tracked.to(compute_dtype(running_mean.dtype))
            weight_of_batch = precise.reciprocal().to(running_mean.dtype)
        running_mean.lerp_(averages[0], weight_of_batch)
        running_var.lerp_(averages[1], weight_of_batch)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return as_layout(y, channels_last)


def _fold(x: Tensor, parts: int, channels_last: bool) -> Tensor:
    """Make the parts channels: (N, C, ...) -> (N / P, P * C, ...), a view of a contiguous `x`."""
    if not channels_last:
        return x.reshape(x.shape[0] // parts, parts * x.shape[1], *x.shape[2:])
    x_NLC = x.movedim(1, -1)
    return x_NLC.unflatten(0, (-1, parts)).movedim(1, -2).flatten(-2).movedim(-1, 1)


def _unfold(y: Tensor, parts: int, channels_last: bool) -> Tensor:
    """Undo `_fold`."""
    if not channels_last:
        return y.reshape(y.shape[0] * parts, y.shape[1] // parts, *y.shape[2:])
    y_NLC = y.movedim(1, -1)
    return y_NLC.unflatten(-1, (parts, -1)).movedim(-2, 1).flatten(0, 1).movedim(-1, 1)
