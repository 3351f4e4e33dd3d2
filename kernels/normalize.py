"""Normalize, scale, shift, add a residual, activate: each element is read and written once.

    y = act((x - mean) * rstd * weight + bias + residual)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4.

A program goes through its tiles backwards, because the statistics were read forwards and the cache
still holds the end of x.
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
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import load_running_statistics
from bn_lightning.kernels.tile_access import (
    ChannelValues,
    find_place,
    load_channels,
    load_tile,
    locate_columns,
    locate_tile,
    make_channels,
    previous_place,
    tiles_of_split,
    write_output,
)
from bn_lightning.kernels.walk import Tiling


@triton.jit
def _bn_forward_normalize_kernel(
    tensors: ForwardTensors,
    channels: ChannelTensors,  # with running statistics mean and rstd are written, or None
    running: RunningStatistics,  # pointers in evaluation, None in training
    eps: tl.tensor,
    tiles_per_split: tl.tensor,
    tiling: Tiling,
) -> None:
    # The last programs first, because the cache holds what the last ones read before.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    first, end = tiles_of_split(split, tiles_per_split, tiling)
    owner, mask, is_first = locate_columns(block, tiling)
    if running.mean is not None:
        mean, rstd = load_running_statistics(running, owner, mask, eps)
        values = make_channels(mean, rstd, channels, owner, mask)
        if channels.mean_ptr is not None:
            # Once for each channel.
            tl.store(channels.mean_ptr + owner, mean, mask=is_first & (split == 0))
            tl.store(channels.rstd_ptr + owner, rstd, mask=is_first & (split == 0))
    else:
        values = load_channels(channels, owner, mask)
    walk_normalize(tensors, values, block, first, end, tiling, "evict_first")


@triton.jit
def walk_normalize(
    tensors: ForwardTensors,
    channels: ChannelValues,
    block: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
    EVICTION: tl.constexpr,
) -> None:
    """Write y for the tiles from `first` to `end` of a block, the last one first.

    EVICTION is the policy of the loads of x; a residual is read once.
    """
    place = find_place(end - 1, tiling)
    for _ in range(first, end):
        tile = locate_tile(place, block, tiling)
        x = load_tile(tensors.x_ptr, tile, EVICTION)
        write_output(x, channels, tensors, tile)
        place = previous_place(place, tiling)


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
    call: Forward,
    running: RunningStatistics,
    eps: float,
    schedule: Schedule,
    *,
    keeps_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Normalize by the running statistics, in one launch.

    Args:
        call: the tensors and the activation.
        running: mean and var are read.
        eps: added to the variance, >= 0.
        schedule: for the shape and layout of x.
        keeps_statistics: also write mean and rstd, for a backward, because a later training step
            changes the running statistics in place.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32 or None.
    """
    mean_C, rstd_C = new_statistics(call.x) if keeps_statistics else (None, None)
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
    walk = schedule.elementwise
    launch_kernel(
        _bn_forward_normalize_kernel,
        walk.grid,
        tensors=call.tensors(y, mask),
        channels=channels,
        running=running,
        eps=eps,
        tiles_per_split=walk.tiles_per_split,
        tiling=walk.tiling,
        **walk.options,
    )
    return y, mask
