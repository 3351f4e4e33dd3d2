"""One launch forward and one backward: a program does all there is to do for its channels.

    forward   statistics, running statistics, num_batches_tracked, then y
    backward  dweight and dbias, then dx and dresidual

Formulas and sources: statistics.py, normalize.py, backward.py. A program reads its channels twice,
the second time backwards and out of the cache.

Shapes: N batch, C channels, L flattened space, M = N * L; channels-last is (N * L, C, 1).
"""

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import (
    Backward,
    BackwardNeeds,
    Forward,
    RunningStatistics,
    new_statistics,
)
from bn_lightning.kernels.backward import walk_gradients, walk_sums
from bn_lightning.kernels.normalize import walk_normalize
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import (
    count_batch,
    finish_channels,
    walk_statistics,
)
from bn_lightning.kernels.tile import load_channels, scale_shift


@triton.jit
def _bn_forward_small_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    running_mean_ptr: tl.tensor,  # (C,), read and written, or None
    running_var_ptr: tl.tensor,  # (C,), unbiased, read and written, or None
    tracked_ptr: tl.tensor,  # int64, read and written, or None
    y_ptr: tl.tensor,  # (N, C, L)
    mask_ptr: tl.tensor,  # (N * C * L / 8,) uint8 or None
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    total: tl.tensor,  # M
    momentum: tl.tensor,
    eps: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    _, mean, m2, unit = walk_statistics(
        x_ptr, offs_c, 0, tiles, N, C, L, BLOCK_N, BLOCK_C, BLOCK_L, WIDE
    )
    rstd = finish_channels(
        mean,
        m2,
        unit,
        mean_ptr,
        rstd_ptr,
        running_mean_ptr,
        running_var_ptr,
        tracked_ptr,
        offs_c,
        mask_c,
        total,
        momentum,
        eps,
        False,
    )
    count_batch(tracked_ptr, tl.program_id(0) == 0)
    scale, shift = scale_shift(rstd, weight_ptr, bias_ptr, offs_c, mask_c)
    walk_normalize(
        x_ptr,
        residual_ptr,
        y_ptr,
        mask_ptr,
        mean,
        scale,
        shift,
        offs_c,
        0,
        tiles,
        N,
        C,
        L,
        negative_slope,
        ACTIVATION,
        BLOCK_N,
        BLOCK_L,
        WIDE,
    )


@triton.jit
def _bn_backward_small_kernel(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L) or None
    mask_ptr: tl.tensor,  # (N * C * L / 8,) uint8 or None
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    dx_ptr: tl.tensor,  # (N, C, L)
    dresidual_ptr: tl.tensor,  # (N, C, L) or None
    dweight_ptr: tl.tensor,  # (C,) fp32
    dbias_ptr: tl.tensor,  # (C,) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    mean, rstd, scale, shift = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offs_c, mask_c
    )
    dweight, dbias = walk_sums(
        dy_ptr,
        x_ptr,
        residual_ptr,
        y_ptr,
        mask_ptr,
        mean,
        rstd,
        scale,
        shift,
        offs_c,
        0,
        tiles,
        N,
        C,
        L,
        negative_slope,
        ACTIVATION,
        BLOCK_N,
        BLOCK_C,
        BLOCK_L,
        WIDE,
    )
    tl.store(dweight_ptr + offs_c, dweight, mask=mask_c)
    tl.store(dbias_ptr + offs_c, dbias, mask=mask_c)
    walk_gradients(
        dy_ptr,
        x_ptr,
        residual_ptr,
        y_ptr,
        mask_ptr,
        mean,
        rstd,
        scale,
        shift,
        dweight,
        dbias,
        dx_ptr,
        dresidual_ptr,
        offs_c,
        0,
        tiles,
        N,
        C,
        L,
        inverse_count,
        negative_slope,
        ACTIVATION,
        TRAINING,
        BLOCK_N,
        BLOCK_L,
        WIDE,
    )


def forward(
    call: Forward, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Runs a forward in training in one launch.

    Args:
        call: the tensors and the activation.
        running: updated in place; its momentum is not None.
        eps: added to the biased variance, > 0.
        schedule: of the shape and layout of x.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32.
    """
    y, mask = call.new_outputs()
    mean_C, rstd_C = new_statistics(call.x)
    _bn_forward_small_kernel[(schedule.channel_blocks,)](
        **call.elementwise,
        **running.state,
        eps=eps,
        **schedule.walk,
        y_ptr=y,
        mask_ptr=mask,
        mean_ptr=mean_C,
        rstd_ptr=rstd_C,
        total=float(schedule.values_per_channel),
    )
    return y, mask, mean_C, rstd_C


def backward(
    call: Backward, needs: BackwardNeeds, schedule: Schedule
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Runs a backward with all its sums in one launch.

    Args:
        call: of the backward; x is not None.
        needs: which gradients, and the mode.
        schedule: of the shape and layout of x.

    Returns:
        dx and dresidual, each None if it is not needed; dweight and dbias, (C,) fp32.
    """
    dx, dresidual = call.new_gradients(needs)
    dweight_C, dbias_C = call.new_sums()
    _bn_backward_small_kernel[(schedule.channel_blocks,)](
        **call.gradient,
        **schedule.walk,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        dweight_ptr=dweight_C,
        dbias_ptr=dbias_C,
        inverse_count=1.0 / schedule.values_per_channel,
        TRAINING=needs.training,
    )
    return dx, dresidual, dweight_C, dbias_C
