"""Per-channel mean and rstd of a batch, and the running statistics.

    mean = 1/M sum x,  var = 1/M sum (x - mean)^2 (biased),  rstd = 1/sqrt(var + eps)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 1 and 2; partials (n, mean, M2)
with M2 = sum (x - mean)^2 are combined as in Chan, Golub & LeVeque 1983, "Algorithms for computing
the sample variance", equations 2.1.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel.

Each program goes through its tiles in order and sums d and d^2 with d = x - pilot, in accumulators
of each element of a tile, which are added up at the end: M2 = sum d^2 - (sum d)^2 / n. The pilot is
the mean of the first tile, where a block has several channels that of one position of each. A
program with a pilot so far from the mean that the difference loses digits goes through its tiles
again, with the mean as the pilot. A second kernel combines the S partials of a channel, mean first.
All arithmetic is in fp32 and every order is fixed, so two runs return the same bits.

M2 of values near 1e30 overflows fp32. A program whose M2 is not finite goes through its tiles again
with deviations scaled by 2^-64. It stores sqrt(M2), which does not overflow.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import (
    ChannelTensors,
    Partials,
    RunningStatistics,
    new_statistics,
)
from bn_lightning.kernels.launch_plan import launch_kernel
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.tile_access import (
    clear_outside,
    count_values,
    find_place,
    load_tile,
    locate_channels,
    locate_tile,
    next_place,
    pick_channels,
    spread_channels,
    sum_channels,
    tiles_of_split,
)
from bn_lightning.kernels.walk import Tiling, cdiv

# A pilot so far from the mean that the squares about it lose two bits is replaced.
FAR = tl.constexpr(4.0)


class Moments(NamedTuple):
    """The statistics of some values of some channels.

    Attributes:
        count: values per channel.
        mean: (CHANNELS,).
        m2: (CHANNELS,), M2 = m2 * unit^2, which may overflow fp32.
        unit: (CHANNELS,).
    """

    count: tl.tensor
    mean: tl.tensor
    m2: tl.tensor
    unit: tl.tensor


@triton.jit
def _split_bits(v: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Split fp32 into two summands of 12 bits each, whose products are exact."""
    high = (v.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, v - high


@triton.jit
def _subtract_product(c: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return c - a * b, rounded once if c is close to a * b.

    This is a fused multiply-add, which the interpreter does not have.
    """
    a_high, a_low = _split_bits(a)
    b_high, b_low = _split_bits(b)
    return (c - a_high * b_high) - a_high * b_low - a_low * b_high - a_low * b_low


@triton.jit
def _rsqrt(v: tl.tensor) -> tl.tensor:
    """Return 1 / sqrt(v) with an error of half an ulp.

    It is the approximation and one exact Newton step. The correctly rounded function is a call,
    which costs registers.
    """
    r = tl.rsqrt(v)
    square = r * r
    rest = _subtract_product(1.0, v, square) + v * _subtract_product(square, r, r)
    step = 0.5 * r * rest
    # For 0 and infinity rsqrt is already exact and the Newton step is NaN, so it is skipped.
    return tl.where(step == step, r + step, r)


@triton.jit
def _sqrt(v: tl.tensor) -> tl.tensor:
    """Return sqrt(v) with an error of half an ulp, by one Newton step; below 1e-37 about v."""
    r = tl.rsqrt(tl.where(v < 1e-37, 1.0, v))
    s = v * r
    return s + 0.5 * r * _subtract_product(v, s, s)


@triton.jit
def _sum_powers(
    x_ptr: tl.tensor,
    block: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
    pilot: tl.tensor,  # (CHANNELS,)
    scale: tl.tensor,  # a power of two
) -> tuple[tl.tensor, tl.tensor]:
    """Return sum d and sum d^2 with d = (x - pilot) * scale, (CHANNELS,) each."""
    sums = tl.zeros((tiling.BLOCK_R, tiling.BLOCK_P), dtype=tl.float32)
    squares = sums
    shift = spread_channels(pilot * -scale, tiling)[None, :]
    place = find_place(first, tiling)
    for _ in tl.range(first, end, num_stages=tiling.STAGES):
        tile = locate_tile(place, block, tiling)
        x = load_tile(x_ptr, tile, "")
        # Rounded once, because the scale is a power of two.
        d = clear_outside(tl.fma(x, scale, shift), x_ptr, tile)
        sums += d
        squares = tl.fma(d, d, squares)
        place = next_place(place, tiling)
    return sum_channels(sums, tiling), sum_channels(squares, tiling)


@triton.jit
def walk_statistics(
    x_ptr: tl.tensor,
    block: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
) -> Moments:
    """Return the statistics of the tiles from `first` to `end` of a block, (CHANNELS,) each."""
    count = count_values(first, end, tiling)
    place = find_place(first, tiling)
    x = load_tile(x_ptr, locate_tile(place, block, tiling), "")
    if tiling.CHANNELS == 1:
        pilot = sum_channels(x, tiling) / count_values(first, first + 1, tiling)
    else:
        # At one position of each channel, of all rows.
        rows = tl.minimum(tiling.R - place.row * tiling.BLOCK_R, tiling.BLOCK_R)
        pilot = pick_channels(tl.sum(x, axis=0) / rows.to(tl.float32), tiling)
    mean, m2, unit = pilot, tl.zeros_like(pilot), tl.zeros_like(pilot)
    chosen = unit == 0.0
    scale = 1.0
    turn = tl.full((), 1, dtype=tl.int32)
    while turn > 0:
        total, squares = _sum_powers(x_ptr, block, first, end, tiling, pilot, scale)
        delta = total / count
        found = squares - total * delta
        found = tl.where(found < 0.0, 0.0, found)
        # Only the channels that need another turn take what it found.
        mean = tl.where(chosen, pilot + delta / scale, mean)
        m2 = tl.where(chosen, found, m2)
        unit = tl.where(chosen, 1.0 / scale, unit)
        is_far = chosen & (squares > found * FAR) & (squares < float("inf"))
        is_wide = (m2 < float("inf")) == 0
        any_far = (turn == 1) & (tl.max(tl.where(is_far, 1, 0), axis=0) > 0)
        any_wide = (turn < 3) & (tl.max(tl.where(is_wide, 1, 0), axis=0) > 0)
        chosen = tl.where(any_far, is_far, is_wide)
        scale = tl.where(any_far, 1.0, 5.421010862427522e-20)  # 2^-64
        turn = tl.where(any_far, 2, tl.where(any_wide, 3, 0))
        pilot = tl.where(tl.abs(mean) < float("inf"), mean, pilot)
    return Moments(count, mean, m2, unit)


@triton.jit
def store_partial(
    partials: Partials,
    moments: Moments,
    offsets: tl.tensor,
    mask_c: tl.tensor,
) -> None:
    """Store the partial of one split."""
    count = tl.zeros_like(moments.mean) + moments.count
    tl.store(partials.count_ptr + offsets, count, mask=mask_c)
    tl.store(partials.mean_ptr + offsets, moments.mean, mask=mask_c)
    tl.store(partials.root_ptr + offsets, _sqrt(moments.m2) * moments.unit, mask=mask_c)


@triton.jit
def locate_splits(
    first: tl.tensor,
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the offsets of BLOCK_S partials of some channels, and their mask."""
    offs_s = first + tl.arange(0, BLOCK_S)
    return offs_s[:, None] * C + offs_c[None, :], (offs_s < S)[:, None] & mask_c[None, :]


@triton.jit
def combine_partials(
    partials: Partials,
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    BLOCK_S: tl.constexpr,
) -> Moments:
    """Return the statistics of all values of some channels."""
    # Splits past S have a count of 0, which takes them out of both sums.
    # The sum of means minus that of the first split cannot overflow and keeps its digits.
    mean_0 = tl.load(partials.mean_ptr + offs_c, mask=mask_c, other=0.0)
    mean = tl.zeros_like(mean_0)
    for first in range(0, S, BLOCK_S):
        offsets, mask = locate_splits(first, offs_c, mask_c, S, C, BLOCK_S)
        count = tl.load(partials.count_ptr + offsets, mask=mask, other=0.0)
        means = tl.load(partials.mean_ptr + offsets, mask=mask, other=0.0)
        mean += tl.sum((means - mean_0[None, :]) * (count / total), axis=0)
    mean += mean_0
    m2 = tl.zeros_like(mean)
    exponent = tl.full(mean.shape, 0x3F800000, dtype=tl.int32)
    for first in range(0, S, BLOCK_S):
        offsets, mask = locate_splits(first, offs_c, mask_c, S, C, BLOCK_S)
        count = tl.load(partials.count_ptr + offsets, mask=mask, other=0.0)
        means = tl.load(partials.mean_ptr + offsets, mask=mask, other=0.0)
        roots = tl.load(partials.root_ptr + offsets, mask=mask, other=0.0)
        between = tl.where(count > 0.0, tl.abs(means - mean[None, :]) * _sqrt(count), 0.0)
        # The unit is a power of two in [1, 2^126], at most the largest root, so that squares fit
        # fp32.
        largest = tl.maximum(tl.max(roots, axis=0), tl.max(between, axis=0))
        found = tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x7E800000)
        found = tl.maximum(found, exponent)
        inverse = (0x7F000000 - found).to(tl.float32, bitcast=True)
        ratio = exponent.to(tl.float32, bitcast=True) * inverse
        roots = roots * inverse[None, :]
        between = between * inverse[None, :]
        m2 = m2 * ratio * ratio + tl.sum(roots * roots + between * between, axis=0)
        exponent = found
    return Moments(total, mean, m2, exponent.to(tl.float32, bitcast=True))


@triton.jit
def finish_channels(
    moments: Moments,  # of all values
    channels: ChannelTensors,  # mean and rstd are written
    running: RunningStatistics,  # pointers, read and written; the mean is None if there are none
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    total: tl.tensor,  # M
    eps: tl.tensor,
) -> tl.tensor:
    """Store mean and rstd, update the running statistics, and return rstd."""
    unit = moments.unit
    rstd = _rsqrt(moments.m2 / total + eps / unit / unit) / unit
    tl.store(channels.mean_ptr + offs_c, moments.mean, mask=mask_c)
    tl.store(channels.rstd_ptr + offs_c, rstd, mask=mask_c)
    if running.mean is not None:
        if running.momentum is None:
            # It includes this batch.
            momentum = 1.0 / tl.load(running.num_batches_tracked).to(tl.float32)
        else:
            momentum = running.momentum
        old_mean = tl.load(running.mean + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        old_var = tl.load(running.var + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased_var = moments.m2 / (total - 1.0) * unit * unit
        new_mean = (1.0 - momentum) * old_mean + momentum * moments.mean
        new_var = (1.0 - momentum) * old_var + momentum * unbiased_var
        tl.store(running.mean + offs_c, new_mean, mask=mask_c)
        tl.store(running.var + offs_c, new_var, mask=mask_c)
    return rstd


@triton.jit
def count_batch(tracked_ptr: tl.tensor, chosen: tl.tensor) -> None:
    """Add one to num_batches_tracked in the chosen program, while no other thread reads it."""
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tl.load(tracked_ptr, mask=chosen, other=0) + 1, mask=chosen)


@triton.jit
def _bn_forward_partial_statistics_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    partials: Partials,  # written
    tracked_ptr: tl.tensor,  # int64, incremented by one; or None
    tiles_per_split: tl.tensor,
    tiling: Tiling,
) -> None:
    # No program of this launch reads it, and the launch that reads it begins after this one ended.
    count_batch(tracked_ptr, (tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    block = tl.program_id(0)
    split = tl.program_id(1)
    first, end = tiles_of_split(split, tiles_per_split, tiling)
    moments = walk_statistics(x_ptr, block, first, end, tiling)
    offs_c, mask_c = locate_channels(block, tiling)
    store_partial(partials, moments, split * tiling.C + offs_c, mask_c)


@triton.jit
def _bn_forward_finish_statistics_kernel(
    partials: Partials,
    channels: ChannelTensors,  # mean and rstd are written
    running: RunningStatistics,  # pointers; the count is read, the others are read and written
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    eps: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    moments = combine_partials(partials, offs_c, mask_c, S, C, total, BLOCK_S)
    finish_channels(moments, channels, running, offs_c, mask_c, total, eps)


@triton.jit
def _bn_forward_merge_partials_kernel(
    partials: Partials,
    mean_ptr: tl.tensor,  # (C,) fp32, written
    root_ptr: tl.tensor,  # (C,) fp32, written
    S: tl.tensor,
    C: tl.tensor,
    total: tl.tensor,  # M
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    moments = combine_partials(partials, offs_c, mask_c, S, C, total, BLOCK_S)
    tl.store(mean_ptr + offs_c, moments.mean, mask=mask_c)
    tl.store(root_ptr + offs_c, _sqrt(moments.m2) * moments.unit, mask=mask_c)


@triton.jit
def load_running_statistics(
    running: RunningStatistics,  # pointers
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    eps: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Load mean and rstd = 1 / sqrt(var + eps) of some channels, for evaluation."""
    mean = tl.load(running.mean + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    var = tl.load(running.var + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    return mean, _rsqrt(var + eps)


def compute_partials(x: Tensor, schedule: Schedule, tracked: Tensor | None = None) -> Partials:
    """Compute the count, mean and sqrt(M2) of each split, with M2 = sum (x - mean)^2.

    Args:
        x: (N, C, ...), dense, fp32, fp16 or bf16.
        schedule: for the shape and layout of `x`.
        tracked: num_batches_tracked, int64 scalar to which one is added, or None.

    Returns:
        The partials, on the device of `x`.
    """
    partials = Partials.empty(x, schedule)
    walk = schedule.reduction
    launch_kernel(
        _bn_forward_partial_statistics_kernel,
        walk.grid,
        x_ptr=x,
        partials=partials,
        tracked_ptr=tracked,
        tiles_per_split=walk.tiles_per_split,
        tiling=walk.tiling,
        **walk.options,
    )
    return partials


def finish_statistics(
    partials: Partials, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Combine the partials, and update the running statistics in place.

    Args:
        partials: of the whole batch.
        running: mean and var are updated in place; the count includes this batch already.
        eps: added to the biased variance, > 0.
        schedule: that made the partials.

    Returns:
        Mean and rstd, each (C,) fp32.
    """
    mean_C, rstd_C = new_statistics(partials.mean_ptr)
    block_s, block_c = schedule.finish_tile
    launch_kernel(
        _bn_forward_finish_statistics_kernel,
        (cdiv(schedule.C, block_c),),
        partials=partials,
        channels=ChannelTensors(mean_C, rstd_C, None, None),
        running=running,
        S=schedule.splits,
        C=schedule.C,
        total=float(schedule.values_per_channel),
        eps=eps,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return mean_C, rstd_C


def merge_partials(partials: Partials, mean: Tensor, root: Tensor, schedule: Schedule) -> None:
    """Combine the partials into one, that of the whole tensor.

    Args:
        partials: of the whole tensor.
        mean: (C,) fp32, written.
        root: (C,) fp32, sqrt(M2), written.
        schedule: that made the partials.
    """
    block_s, block_c = schedule.finish_tile
    launch_kernel(
        _bn_forward_merge_partials_kernel,
        (cdiv(schedule.C, block_c),),
        partials=partials,
        mean_ptr=mean,
        root_ptr=root,
        S=schedule.splits,
        C=schedule.C,
        total=float(schedule.values_per_channel),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
