"""Normalize, scale, shift, add a residual, activate: each element is read and written once.

    y = act((x - mean) * rstd * weight + bias + residual)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4.

Shapes: N batch, C channels, L flattened space; channels-last is (N * L, C, 1). The kernel goes
through memory in groups of eight neighbours: one thread moves eight values of a 16-bit dtype in 16
bytes, and one byte of the mask describes eight. It goes backwards, because the statistics were read
forwards and the cache still holds the end of x.
"""

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import (
    ChannelTensors,
    Forward,
    ForwardTensors,
    RunningStatistics,
    new_statistics,
)
from bn_lightning.kernels.launch_plan import launch_kernel
from bn_lightning.kernels.schedule import Flat, Schedule, Tiling
from bn_lightning.kernels.stats import load_running_statistics
from bn_lightning.kernels.tile import (
    ChannelValues,
    Tile,
    channels_as_tile,
    load_channels,
    load_tile,
    locate_tile,
    make_channels,
    write_output,
)


@triton.jit
def locate_block(flat: Flat) -> tuple[Tile, tl.tensor]:
    """Return the (BLOCK / 8, 8) elements of this program's block, and their channels."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    # One 64-bit division for each program; those for each element are in 32 bits.
    start = block.to(tl.int64) * flat.BLOCK
    count = tl.minimum(flat.numel - start, flat.BLOCK).to(tl.int32)
    group = tl.arange(0, flat.BLOCK // 8)[:, None] * 8
    offsets = group + tl.arange(0, 8)[None, :]
    start_c = (start // flat.L % flat.C).to(tl.int32)
    start_l = (start % flat.L).to(tl.int32)
    # One division for eight elements if their channels allow it.
    if flat.EIGHTS == "one":
        channels = (start_c + (start_l + group) // flat.L) % flat.C
    elif flat.EIGHTS == "consecutive":
        channels = (start_c + group) % flat.C + tl.arange(0, 8)[None, :]
    else:
        channels = (start_c + (start_l + offsets) // flat.L) % flat.C
    return Tile(start, offsets, offsets < count), channels


@triton.jit
def _bn_forward_normalize_kernel(
    tensors: ForwardTensors,
    channels: ChannelTensors,  # mean and rstd are written if there are running statistics
    running: RunningStatistics,  # pointers in evaluation, None in training
    eps: tl.tensor,
    flat: Flat,
) -> None:
    tile, offs_c = locate_block(flat)
    mask_c = offs_c < flat.C
    if running.mean is not None:
        mean, rstd = load_running_statistics(running, offs_c, mask_c, eps)
        values = make_channels(mean, rstd, channels, offs_c, mask_c)
        # Each channel once, by the thread that has its first element.
        is_first = tile.start + tile.offsets == offs_c.to(tl.int64) * flat.L
        offs_c += tl.zeros_like(tile.offsets)
        tl.store(channels.mean_ptr + offs_c, mean, mask=is_first)
        tl.store(channels.rstd_ptr + offs_c, rstd, mask=is_first)
    else:
        values = load_channels(channels, offs_c, mask_c)
    x = load_tile(tensors.x_ptr, tile, "evict_first")
    write_output(x, values, tensors, tile)


@triton.jit
def walk_normalize(
    tensors: ForwardTensors,
    channels: ChannelValues,  # (BLOCK_C,)
    offs_c: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
) -> None:
    """Write y for the tiles from `first` to `end`, the last one first."""
    for step in range(first, end):
        tile, _ = locate_tile(end - 1 - (step - first), offs_c, tiling, False)
        x = load_tile(tensors.x_ptr, tile, "evict_first")
        write_output(x, channels_as_tile(channels), tensors, tile)


def launch_normalize(
    call: Forward, mean: Tensor, rstd: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor | None]:
    """Compute y = act((x - mean) * rstd * weight + bias + residual).

    Args:
        call: the tensors and the activation.
        mean: (C,) fp32.
        rstd: (C,) fp32, 1 / sqrt(var + eps).
        schedule: for the shape and layout of x.

    Returns:
        y, and the mask of the derivative or None.
    """
    no_running = RunningStatistics(None, None, None, None)
    return _launch(call, call.channels(mean, rstd), no_running, 0.0, schedule)


def launch_evaluation(
    call: Forward, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Normalize by the running statistics, in one launch.

    It also writes mean and rstd, for the backward, because a later training step changes the
    running statistics in place.

    Args:
        call: the tensors and the activation.
        running: mean and var are read.
        eps: added to the variance, >= 0.
        schedule: for the shape and layout of x.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32.
    """
    mean_C, rstd_C = new_statistics(call.x)
    read = RunningStatistics(running.mean, running.var, None, None)
    y, mask = _launch(call, call.channels(mean_C, rstd_C), read, eps, schedule)
    return y, mask, mean_C, rstd_C


def _launch(
    call: Forward,
    channels: ChannelTensors,
    running: RunningStatistics,
    eps: float,
    schedule: Schedule,
) -> tuple[Tensor, Tensor | None]:
    y, mask = call.new_outputs()
    launch_kernel(
        _bn_forward_normalize_kernel,
        schedule.flat_grid,
        tensors=call.tensors(y, mask),
        channels=channels,
        running=running,
        eps=eps,
        flat=schedule.flat,
        num_warps=schedule.flat_warps,
    )
    return y, mask
