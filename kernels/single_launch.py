"""One launch forward and one backward: a program does all the work for its channels.

    forward   statistics, running statistics, num_batches_tracked, then y
    backward  dweight and dbias, then dx and dresidual

Formulas and sources: stats.py, normalize.py, backward.py. A program reads its channels twice, the
second time backwards and from the cache. No load asks for early eviction, which costs five
instructions for two loads: all that the running programs read and write fits the L2 cache.

Shapes: N batch, C channels, L flattened space, M = N * L; channels-last is (N * L, C, 1).
"""

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import (
    Backward,
    BackwardNeeds,
    BackwardTensors,
    ChannelTensors,
    Forward,
    ForwardTensors,
    RunningStatistics,
    new_statistics,
)
from bn_lightning.kernels.backward import Sums, store_sums, walk_gradients, walk_sums
from bn_lightning.kernels.launch_plan import launch_kernel
from bn_lightning.kernels.normalize import walk_normalize
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import count_batch, finish_channels, walk_statistics
from bn_lightning.kernels.tile_access import (
    count_tiles,
    load_channels,
    locate_channels,
    locate_columns,
    make_channels,
    spread_channels,
)
from bn_lightning.kernels.walk import Tiling


@triton.jit
def _bn_forward_single_launch_kernel(
    tensors: ForwardTensors,
    channels: ChannelTensors,  # mean and rstd are written
    running: RunningStatistics,  # pointers, read and written
    total: tl.tensor,  # M
    eps: tl.tensor,
    tiling: Tiling,
) -> None:
    block = tl.program_id(0)
    tiles = count_tiles(tiling)
    moments = walk_statistics(tensors.x_ptr, block, 0, tiles, tiling)
    offs_c, mask_c = locate_channels(block, tiling)
    rstd = finish_channels(moments, channels, running, offs_c, mask_c, total, eps)
    count_batch(running.num_batches_tracked, block == 0)
    mean = spread_channels(moments.mean, tiling)
    owner, mask, _ = locate_columns(block, tiling)
    values = make_channels(mean, spread_channels(rstd, tiling), channels, owner, mask)
    walk_normalize(tensors, values, block, 0, tiles, tiling, "")


@triton.jit
def _bn_backward_single_launch_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    sums: Sums,  # pointers, (C,) fp32, written
    tiling: Tiling,
) -> None:
    block = tl.program_id(0)
    tiles = count_tiles(tiling)
    owner, mask, _ = locate_columns(block, tiling)
    values = load_channels(channels, owner, mask)
    found = walk_sums(tensors, values, block, 0, tiles, tiling)
    offs_c, mask_c = locate_channels(block, tiling)
    store_sums(found, sums, offs_c, mask_c)
    spread = Sums(spread_channels(found.dweight, tiling), spread_channels(found.dbias, tiling))
    walk_gradients(tensors, values, spread, block, 0, tiles, tiling, "")


def forward_single_launch(
    call: Forward, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run a training forward in one launch.

    Args:
        call: the tensors and the activation.
        running: updated in place; its momentum is not None.
        eps: added to the biased variance, > 0.
        schedule: for the shape and layout of x.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32.
    """
    y, mask = call.new_outputs()
    mean_C, rstd_C = new_statistics(call.x)
    launch_kernel(
        _bn_forward_single_launch_kernel,
        schedule.reduction.grid,
        tensors=call.tensors(y, mask),
        channels=call.channels(mean_C, rstd_C),
        running=running,
        total=float(schedule.values_per_channel),
        eps=eps,
        tiling=schedule.reduction.tiling,
        **schedule.reduction.options,
    )
    return y, mask, mean_C, rstd_C


def backward_single_launch(
    call: Backward, needs: BackwardNeeds, schedule: Schedule
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Run a backward of training, with all its sums, in one launch.

    Args:
        call: of the backward; x is not None.
        needs: which gradients.
        schedule: for the shape and layout of x.

    Returns:
        dx and dresidual, each None if it is not needed; dweight and dbias, each (C,) fp32.
    """
    dx, dresidual = call.new_gradients(needs)
    sums = Sums(*call.new_sums())
    inverse_count = 1.0 / schedule.values_per_channel
    launch_kernel(
        _bn_backward_single_launch_kernel,
        schedule.reduction.grid,
        tensors=call.tensors(dx, dresidual, inverse_count, training=True),
        channels=call.channels,
        sums=sums,
        tiling=schedule.reduction.tiling,
        **schedule.reduction.options,
    )
    return dx, dresidual, sums.dweight, sums.dbias
