"""Per-channel mean and rstd of a batch, and the running statistics.

    mean = 1/M sum x,  var = 1/M sum (x - mean)^2,  rstd = 1/sqrt(var + eps)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 1 and 2; partials (n, mean, M2)
with M2 = sum (x - mean)^2 are combined as in Chan, Golub & LeVeque 1983, "Algorithms for computing
the sample variance", equations 2.1.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel.

Each program walks its tiles in order, two passes over each (mean, then M2 about it), and folds them
into its partial; a second kernel combines the S partials of a channel, again mean first. Everything
in fp32, every order fixed: two runs give the same bits.

M2 of values near 1e30 is no fp32 number. A program whose M2 is not finite walks its tiles again
with deviations scaled by 2^-64; what it hands on is sqrt(M2), which always is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import RunningStatistics, new_statistics
from bn_lightning.kernels.schedule import Schedule, cdiv
from bn_lightning.kernels.tile import row_sum, tile_offsets


@triton.jit
def _fold(
    count: tl.tensor,
    mean: tl.tensor,
    low: tl.tensor,
    m2: tl.tensor,
    tile_count: tl.tensor,
    tile_mean: tl.tensor,  # less `mean`
    tile_m2: tl.tensor,
    scale: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Adds a tile to a partial, whose mean is mean + low: twice the digits."""
    total = count + tile_count
    share = tile_count / total
    delta = tile_mean - low
    low += delta * share
    new_mean = mean + low
    low -= new_mean - mean
    delta *= scale
    return total, new_mean, low, m2 + tile_m2 + delta * delta * (count * share)


@triton.jit
def _halves(v: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Splits fp32 into two of 12 bits each, the products of which are exact."""
    high = (v.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, v - high


@triton.jit
def _subtract_product(c: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """c - a * b, rounded once where c is about a * b: a fused multiply-add, which the interpreter
    has not."""
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return (c - a_high * b_high) - a_high * b_low - a_low * b_high - a_low * b_low


@triton.jit
def _inverse_root(v: tl.tensor) -> tl.tensor:
    """1 / sqrt(v) to half an ulp: the approximation and an exact Newton step, for a call of the
    correctly rounded one costs registers."""
    r = tl.rsqrt(v)
    square = r * r
    rest = _subtract_product(1.0, v, square) + v * _subtract_product(square, r, r)
    step = 0.5 * r * rest
    # Of 0 and of infinity the approximation is exact, and the step no number.
    return tl.where(step == step, r + step, r)


@triton.jit
def _root(v: tl.tensor) -> tl.tensor:
    """sqrt(v) to half an ulp, likewise; below 1e-37 as little as v, not the root of its inverse."""
    r = tl.rsqrt(tl.where(v < 1e-37, 1.0, v))
    s = v * r
    return s + 0.5 * r * _subtract_product(v, s, s)


@triton.jit
def _walk(
    x_ptr: tl.tensor,  # (N, C, L)
    offs_c: tl.tensor,
    first_tile: tl.tensor,
    end_tile: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    scale: tl.tensor,  # of the deviations
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    count = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    low = mean
    m2 = mean
    for tile in range(first_tile, end_tile):
        offsets, mask, tile_count = tile_offsets(
            tile, offs_c, N, C, L, BLOCK_N, BLOCK_L, WIDE, True
        )
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if tile == first_tile:
            # Near enough for the sum of what is left to have small errors.
            mean = row_sum(x) / tile_count
        x = tl.where(mask, x - mean[:, None, None], 0.0)
        tile_mean = row_sum(x) / tile_count
        centred = tl.where(mask, (x - tile_mean[:, None, None]) * scale, 0.0)
        tile_m2 = row_sum(centred * centred)
        count, mean, low, m2 = _fold(count, mean, low, m2, tile_count, tile_mean, tile_m2, scale)
    return count, mean, m2


@triton.jit
def walk_statistics(
    x_ptr: tl.tensor,  # (N, C, L)
    offs_c: tl.tensor,
    first_tile: tl.tensor,
    end_tile: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns count, mean, m2 and unit of some tiles, for BLOCK_C channels; M2 = m2 * unit^2."""
    scale = 1.0
    count = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    m2 = mean + float("inf")
    unit = mean
    again = tl.full((), 1, dtype=tl.int32)
    while again > 0:
        count, mean, found = _walk(
            x_ptr, offs_c, first_tile, end_tile, N, C, L, scale, BLOCK_N, BLOCK_C, BLOCK_L, WIDE
        )
        # The second time only where the first was not enough: small deviations would vanish.
        finite = m2 < float("inf")
        unit = tl.where(finite, unit, 1.0 / scale)
        m2 = tl.where(finite, m2, found)
        again = tl.where(scale == 1.0, tl.max(tl.where(m2 < float("inf"), 0, 1), axis=0), 0)
        scale = 5.421010862427522e-20  # 2^-64
    return count, mean, m2, unit


@triton.jit
def combine_partials(
    count_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (S, C) fp32
    root_ptr: tl.tensor,  # (S, C) fp32
    offs_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    BLOCK_S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns mean, m2 and unit of all values of some channels; M2 = m2 * unit^2."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_c = offs_c < C
    mask = (offs_s < S)[:, None] & mask_c[None, :]
    offsets = offs_s[:, None] * C + offs_c[None, :]
    # Other programs may have written them in this launch: L1 is passed by. Splits past S have no
    # values: their count of 0 takes them out of both sums.
    count = tl.load(count_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    means = tl.load(mean_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    roots = tl.load(root_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    # The means about that of the first split, whose sum cannot overflow and keeps its digits.
    mean_0 = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0, cache_modifier=".cg")
    mean = mean_0 + tl.sum((means - mean_0[None, :]) * (count / total), axis=0)
    between = tl.where(count > 0.0, tl.abs(means - mean[None, :]) * _root(count), 0.0)
    # Squares are taken in units of a power of two, between 1 and 2^126, below the largest root.
    largest = tl.maximum(tl.max(roots, axis=0), tl.max(between, axis=0))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x3F800000), 0x7E800000)
    unit = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    roots = roots * inverse[None, :]
    between = between * inverse[None, :]
    return mean, tl.sum(roots * roots + between * between, axis=0), unit


@triton.jit
def finish_channels(
    mean: tl.tensor,  # (BLOCK_C,)
    m2: tl.tensor,  # (BLOCK_C,)
    unit: tl.tensor,  # (BLOCK_C,), M2 = m2 * unit^2, which may be no fp32 number
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    running_mean_ptr: tl.tensor,  # (C,), read and written; None without running statistics
    running_var_ptr: tl.tensor,  # (C,), unbiased, read and written
    tracked_ptr: tl.tensor,  # int64 batches before this one, or None
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    total: tl.tensor,  # M
    momentum: tl.tensor,
    eps: tl.tensor,
    CUMULATIVE: tl.constexpr,  # the average over all batches in place of `momentum`
) -> tl.tensor:
    """Stores mean and rstd, moves the running statistics, and returns rstd."""
    rstd = _inverse_root(m2 / total + eps / unit / unit) / unit
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, rstd, mask=mask_c)
    if running_mean_ptr is not None:
        if CUMULATIVE:
            momentum = 1.0 / (tl.load(tracked_ptr) + 1).to(tl.float32)
        old_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased_var = m2 / (total - 1.0) * unit * unit
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * unbiased_var
        tl.store(running_mean_ptr + offs_c, new_mean, mask=mask_c)
        tl.store(running_var_ptr + offs_c, new_var, mask=mask_c)
    return rstd


@triton.jit
def count_batch(tracked_ptr: tl.tensor, chosen: tl.tensor) -> None:
    """Adds one to num_batches_tracked in the program chosen, when no other will read it."""
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tl.load(tracked_ptr, mask=chosen, other=0) + 1, mask=chosen)


@triton.jit
def _bn_partial_statistics_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    count_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (S, C) fp32
    root_ptr: tl.tensor,  # (S, C) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    tiles_per_split: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L))
    count, mean, m2, unit = walk_statistics(
        x_ptr, offs_c, first, end, N, C, L, BLOCK_N, BLOCK_C, BLOCK_L, WIDE
    )
    store_partials(count_ptr, mean_ptr, root_ptr, split, offs_c, C, count, mean, m2, unit)


@triton.jit
def store_partials(
    count_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (S, C) fp32
    root_ptr: tl.tensor,  # (S, C) fp32
    split: tl.tensor,
    offs_c: tl.tensor,
    C: tl.tensor,
    count: tl.tensor,
    mean: tl.tensor,
    m2: tl.tensor,
    unit: tl.tensor,
) -> None:
    """Stores the partial of one split."""
    offsets = split * C + offs_c
    mask_c = offs_c < C
    tl.store(count_ptr + offsets, tl.zeros_like(mean) + count, mask=mask_c)
    tl.store(mean_ptr + offsets, mean, mask=mask_c)
    tl.store(root_ptr + offsets, _root(m2) * unit, mask=mask_c)


@triton.jit
def _bn_finish_statistics_kernel(
    partial_count_ptr: tl.tensor,  # (S, C) fp32
    partial_mean_ptr: tl.tensor,  # (S, C) fp32
    partial_root_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    running_mean_ptr: tl.tensor,  # (C,), read and written; None without running statistics
    running_var_ptr: tl.tensor,  # (C,), unbiased, read and written
    tracked_ptr: tl.tensor,  # int64, read and written, or None
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    momentum: tl.tensor,
    eps: tl.tensor,
    CUMULATIVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    # With CUMULATIVE one program does all: it alone reads the count of batches, then writes it.
    for block in range(tl.program_id(0), tl.cdiv(C, BLOCK_C), tl.num_programs(0)):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mean, m2, unit = combine_partials(
            partial_count_ptr, partial_mean_ptr, partial_root_ptr, offs_c, S, C, total, BLOCK_S
        )
        finish_channels(
            mean,
            m2,
            unit,
            mean_ptr,
            rstd_ptr,
            running_mean_ptr,
            running_var_ptr,
            tracked_ptr,
            offs_c,
            offs_c < C,
            total,
            momentum,
            eps,
            CUMULATIVE,
        )
    count_batch(tracked_ptr, tl.program_id(0) == 0)


@triton.jit
def _bn_finish_partial_kernel(
    partial_count_ptr: tl.tensor,  # (S, C) fp32
    partial_mean_ptr: tl.tensor,  # (S, C) fp32
    partial_root_ptr: tl.tensor,  # (S, C) fp32
    mean_ptr: tl.tensor,  # (C,) fp32
    root_ptr: tl.tensor,  # (C,) fp32
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, m2, unit = combine_partials(
        partial_count_ptr, partial_mean_ptr, partial_root_ptr, offs_c, S, C, total, BLOCK_S
    )
    tl.store(mean_ptr + offs_c, mean, mask=offs_c < C)
    tl.store(root_ptr + offs_c, _root(m2) * unit, mask=offs_c < C)


@triton.jit
def _bn_evaluation_statistics_kernel(
    running_mean_ptr: tl.tensor,  # (C,)
    running_var_ptr: tl.tensor,  # (C,)
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    C: tl.tensor,
    eps: tl.tensor,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, _inverse_root(var + eps), mask=mask_c)


def partial_statistics(x: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each split's number of values, mean and sqrt(M2), M2 = sum (x - mean)^2.

    Args:
        x: (N, C, ...), dense, fp32, fp16 or bf16.
        schedule: of the shape and layout of `x`.

    Returns:
        Count, mean and sqrt(M2), each (S, C) fp32 on the device of `x`.
    """
    count_SC, mean_SC, root_SC = x.new_empty(
        (3, schedule.splits, schedule.C), dtype=torch.float32
    ).unbind()
    _bn_partial_statistics_kernel[(schedule.channel_blocks, schedule.splits)](
        x_ptr=x,
        count_ptr=count_SC,
        mean_ptr=mean_SC,
        root_ptr=root_SC,
        tiles_per_split=schedule.tiles_per_split,
        **schedule.walk,
    )
    return count_SC, mean_SC, root_SC


def finish_statistics(
    partials: tuple[Tensor, Tensor, Tensor],
    running: RunningStatistics,
    eps: float,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Combines the partials, and updates the running statistics in place.

    Args:
        partials: count, mean and sqrt(M2), each (S, C) fp32.
        running: updated in place.
        eps: added to the biased variance, > 0.
        schedule: of the tensor the partials come from.

    Returns:
        Mean and rstd, each (C,) fp32.
    """
    count_SC, mean_SC, root_SC = partials
    mean_C, rstd_C = new_statistics(mean_SC)
    block_s, block_c = schedule.finish_tile
    cumulative = running.momentum is None
    _bn_finish_statistics_kernel[(1 if cumulative else cdiv(schedule.C, block_c),)](
        **running.state,
        eps=eps,
        partial_count_ptr=count_SC,
        partial_mean_ptr=mean_SC,
        partial_root_ptr=root_SC,
        mean_ptr=mean_C,
        rstd_ptr=rstd_C,
        S=schedule.splits,
        C=schedule.C,
        total=float(schedule.values_per_channel),
        CUMULATIVE=cumulative,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return mean_C, rstd_C


def finish_partial(
    partials: tuple[Tensor, Tensor, Tensor], mean: Tensor, root: Tensor, schedule: Schedule
) -> None:
    """Combines the partials to one, that of the whole tensor.

    Args:
        partials: count, mean and sqrt(M2), each (S, C) fp32.
        mean: (C,) fp32, written.
        root: (C,) fp32, sqrt(M2), written.
        schedule: of the tensor the partials come from.
    """
    count_SC, mean_SC, root_SC = partials
    block_s, block_c = schedule.finish_tile
    _bn_finish_partial_kernel[(cdiv(schedule.C, block_c),)](
        partial_count_ptr=count_SC,
        partial_mean_ptr=mean_SC,
        partial_root_ptr=root_SC,
        mean_ptr=mean,
        root_ptr=root,
        S=schedule.splits,
        C=schedule.C,
        total=float(schedule.values_per_channel),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )


def evaluation_statistics(
    running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Computes mean and rstd of the running statistics: copies, for a later step changes those.

    Args:
        running_mean: (C,), any float dtype.
        running_var: (C,), any float dtype.
        eps: added to the variance, >= 0.

    Returns:
        Mean and rstd, each (C,) fp32.
    """
    C = running_mean.numel()
    mean_C = running_mean.new_empty(C, dtype=torch.float32)
    rstd_C = torch.empty_like(mean_C)
    _bn_evaluation_statistics_kernel[(cdiv(C, 256),)](
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        mean_ptr=mean_C,
        rstd_ptr=rstd_C,
        C=C,
        eps=eps,
        BLOCK_C=256,
    )
    return mean_C, rstd_C
