"""Each element read from memory once, by programs that take work items in order.

A block of channels (a group) has S statistics items, each of which computes the statistics of one
split, and S apply items, each of which writes y of one split. The items have one order: the
statistics items of group g, the apply items of group g - lag, the statistics items of group g + 1,
and so on. A program takes the next item with a ticket, which is an atomic counter. The x of an
apply item was read `lag` groups before and is still in L2, so the second reading does not reach
memory. The backward has sums in place of statistics.

Formulas and sources: stats.py, normalize.py, backward.py. The order of items is our own.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel, G groups;
channels-last is (N * L, C, 1).

Termination. A statistics item waits for nothing. An apply item waits until the statistics items of
its group are finished. Each of those has a smaller ticket, so a program has taken it before, and
that program is running, because a program finishes its item before it takes another. Every wait
therefore ends, however many programs run at once, and no cooperative launch is needed. A single
program, as in the interpreter, takes all items in order and never waits.

Visibility. A statistics item stores its partial and, after a barrier of its threads, increments the
group's counter with an acquire-release add. The last to increment it has acquired what all others
released. It combines the S partials in the order of the splits, stores the result, and sets the
group's flag with a release add. An apply item reads the flag with an acquire add, and bypasses L1
for what other programs wrote.

One thread executes an atomic. Barriers of all threads stand before it, for what they wrote, and
after it, for what they read next. This is argued for CUDA, whose barriers order memory;
tests/kernels/test_ticket_order.py checks it in simulated schedules.

The counters are zero before and after every launch: the last program to leave sets them to zero,
and adds the batch to num_batches_tracked, which no program reads any more. Launches that run at the
same time need separate counters (`_counters`).
"""

from functools import partial
from typing import NamedTuple

import torch
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
    Partials,
    RunningStatistics,
    new_statistics,
)
from bn_lightning.kernels.backward import (
    Sums,
    store_sums,
    sum_partials,
    walk_gradients,
    walk_sums,
)
from bn_lightning.kernels.launch_plan import launch_kernel, make_anew
from bn_lightning.kernels.normalize import walk_normalize
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import (
    combine_partials,
    count_batch,
    finish_channels,
    store_partial,
    walk_statistics,
)
from bn_lightning.kernels.tile_access import (
    count_blocks,
    load_channels,
    locate_channels,
    locate_columns,
    make_channels,
    tiles_of_split,
)
from bn_lightning.kernels.walk import Tiling

# The counters: tickets taken, programs that left, then for each group arrivals and the flag.
TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
GROUPS = tl.constexpr(2)
CLEARED = tl.constexpr(1024)  # counters set to zero at once, at least four by each thread


@triton.jit
def _take_ticket(counters_ptr: tl.tensor) -> tl.tensor:
    return tl.atomic_add(counters_ptr + TICKET, 1, sem="relaxed")


@triton.jit
def _arrive(counters_ptr: tl.tensor, group: tl.tensor, S: tl.tensor) -> tl.tensor:
    """Count a finished split of the group, and return whether it was the last one."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + GROUPS + 2 * group, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == S - 1


@triton.jit
def _raise_flag(counters_ptr: tl.tensor, group: tl.tensor) -> None:
    tl.debug_barrier()
    tl.atomic_add(counters_ptr + GROUPS + 2 * group + 1, 1, sem="release")


@triton.jit
def _wait_for_flag(counters_ptr: tl.tensor, group: tl.tensor) -> None:
    flag_ptr = counters_ptr + GROUPS + 2 * group + 1
    raised = tl.atomic_add(flag_ptr, 0, sem="acquire")
    while raised == 0:
        raised = tl.atomic_add(flag_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _leave(counters_ptr: tl.tensor, groups: tl.tensor, tracked_ptr: tl.tensor) -> None:
    tl.debug_barrier()
    left = tl.atomic_add(counters_ptr + LEFT, 1, sem="acq_rel")
    tl.debug_barrier()
    if left == tl.num_programs(0) - 1:
        for first in range(0, 2 * groups + GROUPS, CLEARED):
            offs = first + tl.arange(0, CLEARED)
            tl.store(counters_ptr + offs, 0, mask=offs < 2 * groups + GROUPS)
        count_batch(tracked_ptr, left == left)


class Queue(NamedTuple):
    """The argument with which programs take items in order.

    Attributes:
        counters_ptr: (2 + 2 G,) int32, zero before and after the launch.
        S: splits of a channel.
        lag: groups between the two readings of a group.
        tiles_per_split: consecutive tiles of an item.
    """

    counters_ptr: Tensor
    S: int
    lag: int
    tiles_per_split: int


@triton.jit
def _find_item(
    ticket: tl.tensor, queue: Queue, tiling: Tiling
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the step of a ticket, its place there, and the item's split, first tile and end.

    The first S places of a step read for the first time, the others for the second.
    """
    step = ticket // (2 * queue.S)
    place = ticket % (2 * queue.S)
    split = place % queue.S
    first, end = tiles_of_split(split, queue.tiles_per_split, tiling)
    return step, place, split, first, end


@triton.jit
def _bn_forward_persistent_kernel(
    tensors: ForwardTensors,
    channels: ChannelTensors,  # mean and rstd are written
    running: RunningStatistics,  # pointers, read and written
    partials: Partials,  # written
    queue: Queue,
    total: tl.tensor,  # M
    eps: tl.tensor,
    tiling: Tiling,
    BLOCK_S: tl.constexpr,
) -> None:
    counters_ptr = queue.counters_ptr
    S = queue.S
    groups = count_blocks(tiling)
    items = (groups + queue.lag) * 2 * S
    ticket = _take_ticket(counters_ptr)
    while ticket < items:
        step, place, split, first, end = _find_item(ticket, queue, tiling)
        if place < S:
            if step < groups:
                moments = walk_statistics(tensors.x_ptr, step, first, end, tiling)
                offs_c, mask_c = locate_channels(step, tiling)
                store_partial(partials, moments, split * tiling.C + offs_c, mask_c)
                if _arrive(counters_ptr, step, S):
                    whole = combine_partials(partials, offs_c, mask_c, S, tiling.C, total, BLOCK_S)
                    finish_channels(
                        whole, channels, running, offs_c, mask_c, total, eps, COUNTED=False
                    )
                    _raise_flag(counters_ptr, step)
        else:
            if step >= queue.lag:
                group = step - queue.lag
                owner, mask, _ = locate_columns(group, tiling)
                _wait_for_flag(counters_ptr, group)
                mean = tl.load(
                    channels.mean_ptr + owner, mask=mask, other=0.0, cache_modifier=".cg"
                )
                rstd = tl.load(
                    channels.rstd_ptr + owner, mask=mask, other=0.0, cache_modifier=".cg"
                )
                values = make_channels(mean, rstd, channels, owner, mask)
                walk_normalize(tensors, values, group, first, end, tiling, "evict_first")
        ticket = _take_ticket(counters_ptr)
    _leave(counters_ptr, groups, running.num_batches_tracked)


@triton.jit
def _bn_backward_persistent_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    sums: Sums,  # pointers, (C,) fp32, written
    partials: Sums,  # pointers, (S, C) fp32, written
    queue: Queue,
    tiling: Tiling,
    BLOCK_S: tl.constexpr,
) -> None:
    counters_ptr = queue.counters_ptr
    S = queue.S
    groups = count_blocks(tiling)
    items = (groups + queue.lag) * 2 * S
    ticket = _take_ticket(counters_ptr)
    while ticket < items:
        step, place, split, first, end = _find_item(ticket, queue, tiling)
        if place < S:
            if step < groups:
                owner, mask, _ = locate_columns(step, tiling)
                values = load_channels(channels, owner, mask)
                found = walk_sums(tensors, values, step, first, end, tiling)
                offs_c, mask_c = locate_channels(step, tiling)
                store_sums(found, partials, split * tiling.C + offs_c, mask_c)
                if _arrive(counters_ptr, step, S):
                    whole = sum_partials(partials, offs_c, mask_c, S, tiling.C, BLOCK_S)
                    store_sums(whole, sums, offs_c, mask_c)
                    _raise_flag(counters_ptr, step)
        else:
            if step >= queue.lag:
                group = step - queue.lag
                owner, mask, _ = locate_columns(group, tiling)
                values = load_channels(channels, owner, mask)
                _wait_for_flag(counters_ptr, group)
                dweight = tl.load(sums.dweight + owner, mask=mask, other=0.0, cache_modifier=".cg")
                dbias = tl.load(sums.dbias + owner, mask=mask, other=0.0, cache_modifier=".cg")
                sums_P = Sums(dweight, dbias)
                walk_gradients(tensors, values, sums_P, group, first, end, tiling, "evict_first")
        ticket = _take_ticket(counters_ptr)
    _leave(counters_ptr, groups, None)


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def is_torchs_stream(stream_id: int) -> bool:
    """Return whether torch created a stream, which then exists as long as the process.

    The id of the default stream is 0, and the ids of the streams in torch's pool are odd. The id of
    any other stream is its handle: an even pointer, or 2 for CUDA's per-thread default stream.

    Source: c10/cuda/CUDAStream.cpp of PyTorch, "Note [StreamId assignment]".
    """
    return stream_id == 0 or stream_id % 2 == 1


def _counters(device: torch.device, wanted: int) -> Tensor:
    """Return counters that are zero and that no launch running at the same time uses.

    Launches on one stream run one after another, so each stream of torch has its own counters,
    which need no clearing. A CUDA graph may be replayed at any time, and the handle of a stream
    that torch did not create may name another stream later or in another thread: both get new
    counters.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(wanted, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    if not is_torchs_stream(stream.stream_id):
        return torch.zeros(wanted, dtype=torch.int32, device=device)
    key = (device, stream.stream_id)
    counters = _zeros.get(key)
    if counters is None or counters.numel() < wanted:
        # Larger than needed, so that it seldom grows. A running launch can still use the old
        # counters, because the allocator reuses memory in the order of the stream.
        counters = torch.zeros(2 * wanted, dtype=torch.int32, device=device)
        _zeros[key] = counters
    return counters


def _queue(x: Tensor, schedule: Schedule) -> Queue:
    counters = make_anew(partial(_counters, x.device, 2 + 2 * schedule.reduction.blocks))
    return Queue(counters, schedule.splits, schedule.lag, schedule.reduction.tiles_per_split)


def forward_persistent(
    call: Forward, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run a training forward that reads x from memory once.

    Args:
        call: the tensors and the activation.
        running: updated in place.
        eps: added to the biased variance, > 0.
        schedule: for the shape and layout of x.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32.
    """
    y, mask = call.new_outputs()
    mean_C, rstd_C = new_statistics(call.x)
    launch_kernel(
        _bn_forward_persistent_kernel,
        (schedule.programs,),
        tensors=call.tensors(y, mask),
        channels=call.channels(mean_C, rstd_C),
        running=running,
        partials=Partials.empty(call.x, schedule),
        queue=_queue(call.x, schedule),
        total=float(schedule.values_per_channel),
        eps=eps,
        tiling=schedule.reduction.tiling,
        BLOCK_S=schedule.finish_tile[0],
        **schedule.reduction.options,
    )
    return y, mask, mean_C, rstd_C


def backward_persistent(
    call: Backward, needs: BackwardNeeds, schedule: Schedule
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Run a backward of training, with all its sums, that reads dy and x from memory once.

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
        _bn_backward_persistent_kernel,
        (schedule.programs,),
        tensors=call.tensors(dx, dresidual, inverse_count, training=True),
        channels=call.channels,
        sums=sums,
        partials=Sums(*call.new_partials(schedule.splits)),
        queue=_queue(call.dy, schedule),
        tiling=schedule.reduction.tiling,
        BLOCK_S=schedule.finish_tile[0],
        **schedule.reduction.options,
    )
    return dx, dresidual, sums.dweight, sums.dbias
