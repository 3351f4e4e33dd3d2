"""Per-channel mean and rstd of a batch, and the running statistics.

    mean = 1/M sum x,  var = 1/M sum (x - mean)^2,  rstd = 1/sqrt(var + eps)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 1 and 2; partials (n, mean, M2)
with M2 = sum (x - mean)^2 are combined as in Chan, Golub & LeVeque 1983, "Algorithms for computing
the sample variance", equations 2.1.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel.

Each program walks its tiles in order, two passes over each (mean, then M2 about it), and folds them
into its partial; a second kernel combines the S partials of a channel, again mean first. Everything
in fp32, every order fixed: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.schedule import Layout, Schedule


@triton.jit
def _combine(
    count_a: tl.tensor,
    mean_a: tl.tensor,
    m2_a: tl.tensor,
    count_b: tl.tensor,
    mean_b: tl.tensor,
    m2_b: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    count = count_a + count_b
    delta = mean_b - mean_a
    share_b = count_b / count
    mean = mean_a + delta * share_b
    m2 = m2_a + m2_b + delta * delta * (count_a * share_b)
    return count, mean, m2


@triton.jit
def _bn_partial_statistics_ncl_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    count_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (S, C) fp32
    m2_ptr: tl.tensor,  # (S, C) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    tiles_per_split: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    c = tl.program_id(0)
    split = tl.program_id(1)
    tiles_l = tl.cdiv(L, BLOCK_L)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(N, BLOCK_N) * tiles_l)

    count = 0.0
    mean = 0.0
    m2 = 0.0
    for tile in range(first_tile, end_tile):
        start_n = tile // tiles_l * BLOCK_N
        start_l = tile % tiles_l * BLOCK_L
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_l = start_l + tl.arange(0, BLOCK_L)
        mask = (offs_n < N)[:, None] & (offs_l < L)[None, :]
        rows = offs_n.to(tl.int64) * C + c
        x = tl.load(x_ptr + rows[:, None] * L + offs_l[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)

        tile_count = (tl.minimum(N - start_n, BLOCK_N) * tl.minimum(L - start_l, BLOCK_L)).to(
            tl.float32
        )
        tile_mean = tl.sum(tl.sum(x, axis=1), axis=0) / tile_count
        centred = tl.where(mask, x - tile_mean, 0.0)
        tile_m2 = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
        count, mean, m2 = _combine(count, mean, m2, tile_count, tile_mean, tile_m2)

    offset = split * C + c
    tl.store(count_ptr + offset, count)
    tl.store(mean_ptr + offset, mean)
    tl.store(m2_ptr + offset, m2)


@triton.jit
def _bn_partial_statistics_mc_kernel(
    x_ptr: tl.tensor,  # (M, C)
    count_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (S, C) fp32
    m2_ptr: tl.tensor,  # (S, C) fp32
    M: tl.tensor,
    C: tl.tensor,
    tiles_per_split: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(M, BLOCK_M))

    count = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for tile in range(first_tile, end_tile):
        start_m = tile * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        rows = offs_m.to(tl.int64)
        x = tl.load(x_ptr + rows[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)

        tile_count = tl.minimum(M - start_m, BLOCK_M).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / tile_count
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(centred * centred, axis=0)
        count, mean, m2 = _combine(count, mean, m2, tile_count, tile_mean, tile_m2)

    offsets = split * C + offs_c
    tl.store(count_ptr + offsets, tl.zeros((BLOCK_C,), dtype=tl.float32) + count, mask=mask_c)
    tl.store(mean_ptr + offsets, mean, mask=mask_c)
    tl.store(m2_ptr + offsets, m2, mask=mask_c)


@triton.jit
def _bn_finish_statistics_kernel(
    partial_count_ptr: tl.tensor,  # (S, C) fp32
    partial_mean_ptr: tl.tensor,  # (S, C) fp32
    partial_m2_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    running_mean_ptr: tl.tensor,  # (C,), read and written; None without running statistics
    running_var_ptr: tl.tensor,  # (C,), unbiased, read and written
    S: tl.tensor,
    C: tl.tensor,
    M: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_s = tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_s < S)[:, None] & mask_c[None, :]
    offsets = offs_s[:, None] * C + offs_c[None, :]
    # Splits past S have no values: their count of 0 takes them out of both sums.
    count = tl.load(partial_count_ptr + offsets, mask=mask, other=0.0)
    partial_mean = tl.load(partial_mean_ptr + offsets, mask=mask, other=0.0)
    partial_m2 = tl.load(partial_m2_ptr + offsets, mask=mask, other=0.0)

    total = tl.cast(M, tl.float32)
    # The means about that of the first split, whose sum cannot overflow and keeps its digits.
    mean_0 = tl.load(partial_mean_ptr + offs_c, mask=mask_c, other=0.0)
    mean = mean_0 + tl.sum((partial_mean - mean_0[None, :]) * (count / total), axis=0)
    delta = partial_mean - mean[None, :]
    m2 = tl.sum(partial_m2 + count * delta * delta, axis=0)
    var = m2 / total
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, 1.0 / tl.sqrt_rn(var + eps), mask=mask_c)

    if running_mean_ptr is not None:
        old_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased_var = m2 / (total - 1.0)
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * unbiased_var
        tl.store(running_mean_ptr + offs_c, new_mean, mask=mask_c)
        tl.store(running_var_ptr + offs_c, new_var, mask=mask_c)


def partial_statistics(x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each split's number of values, mean and M2 = sum (x - mean)^2.

    Args:
        x: (N, C, ...), contiguous, fp32, fp16 or bf16.
        schedule: of the shape of `x`.

    Returns:
        Count, mean and M2, each (S, C) fp32 on the device of `x`.
    """
    shape = (schedule.splits, schedule.C)
    count_SC, mean_SC, m2_SC = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(3)
    )
    tile = schedule.reduction
    if schedule.layout is Layout.NCL:
        _bn_partial_statistics_ncl_kernel[schedule.reduction_grid](
            x_ptr=x,
            count_ptr=count_SC,
            mean_ptr=mean_SC,
            m2_ptr=m2_SC,
            N=schedule.N,
            C=schedule.C,
            L=schedule.L,
            tiles_per_split=schedule.tiles_per_split,
            BLOCK_N=tile.rows,
            BLOCK_L=tile.columns,
            num_warps=tile.num_warps,
        )
    else:
        _bn_partial_statistics_mc_kernel[schedule.reduction_grid](
            x_ptr=x,
            count_ptr=count_SC,
            mean_ptr=mean_SC,
            m2_ptr=m2_SC,
            M=schedule.N,
            C=schedule.C,
            tiles_per_split=schedule.tiles_per_split,
            BLOCK_M=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.num_warps,
        )
    return count_SC, mean_SC, m2_SC


def finish_statistics(
    count_SC: Tensor,
    mean_SC: Tensor,
    m2_SC: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Combines the partials, and updates the running statistics in place.

    Args:
        count_SC: (S, C) fp32, values in each split.
        mean_SC: (S, C) fp32.
        m2_SC: (S, C) fp32.
        running_mean: (C,), any float dtype, or None together with `running_var`.
        running_var: (C,), unbiased, any float dtype.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: added to the biased variance, > 0.
        schedule: of the tensor the partials come from.

    Returns:
        Mean and rstd, each (C,) fp32.
    """
    mean_C, rstd_C = (
        torch.empty(schedule.C, dtype=torch.float32, device=mean_SC.device) for _ in range(2)
    )
    block_s, block_c = schedule.finish_tile
    _bn_finish_statistics_kernel[(triton.cdiv(schedule.C, block_c),)](
        partial_count_ptr=count_SC,
        partial_mean_ptr=mean_SC,
        partial_m2_ptr=m2_SC,
        mean_ptr=mean_C,
        rstd_ptr=rstd_C,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        S=schedule.splits,
        C=schedule.C,
        M=schedule.values_per_channel,
        momentum=momentum,
        eps=eps,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return mean_C, rstd_C
