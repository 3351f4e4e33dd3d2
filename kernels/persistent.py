"""Each element read from memory once: programs that stay, and take work items in order.

A block of channels (a group) has S statistics items, each the statistics of one split, and S apply
items, each y of one split. The items stand in one order: the statistics of group g, then the apply
items of group g - lag, then the statistics of group g + 1, and so on. A program takes the next item
by a ticket, an atomic counter. When an apply item comes, its x was read `lag` groups ago and is in
L2 still: the second reading never reaches memory. Backward the same, with sums for statistics.

Formulas and sources: statistics.py, normalize.py, backward.py; the order of items is our own.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel, G groups;
channels-last is (N * L, C, 1).

Why it ends. A statistics item waits for nothing. An apply item waits until the statistics items of
its group are done; each of those has a smaller ticket, so a program took it before, and that
program is running and does one item after another. So every wait ends, however many programs the
device runs at once, and no cooperative launch is needed. One program alone, as in the interpreter,
does all items in order and never waits.

Why it is seen. A statistics item stores its partial and arrives at the group's counter with an
acquire-release add, after a barrier of its threads. The last to arrive has acquired what all others
released: it combines the S partials, in the order of the splits whoever comes last, stores the
result and raises the group's flag with a release add. An apply item reads the flag with an acquire
add, and past L1 what the others wrote.

The counters are zero at the end of every launch, as they must be at its start: the last program to
leave writes the zeros, and adds the batch to num_batches_tracked, which nobody reads any more. Two
launches that run at the same time need counters of their own (`_counters`).
"""

import torch
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
from bn_lightning.kernels.backward import sum_partials, walk_gradients, walk_sums
from bn_lightning.kernels.normalize import walk_normalize
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import (
    combine_partials,
    count_batch,
    finish_channels,
    store_partials,
    walk_statistics,
)
from bn_lightning.kernels.tile import load_channels, scale_shift

# The counters: tickets taken, programs that left, then for each group arrivals and the flag.
TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
GROUPS = tl.constexpr(2)


@triton.jit
def _take_ticket(counters_ptr: tl.tensor) -> tl.tensor:
    return tl.atomic_add(counters_ptr + TICKET, 1, sem="relaxed")


@triton.jit
def _arrive(counters_ptr: tl.tensor, group: tl.tensor, S: tl.tensor) -> tl.tensor:
    """Says that one split of the group is done, and returns whether it was the last one."""
    tl.debug_barrier()
    return tl.atomic_add(counters_ptr + GROUPS + 2 * group, 1, sem="acq_rel") == S - 1


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
    if left == tl.num_programs(0) - 1:
        for counter in range(0, 2 * groups + GROUPS):
            tl.store(counters_ptr + counter, 0)
        count_batch(tracked_ptr, left == left)


@triton.jit
def _bn_forward_resident_kernel(
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
    partial_count_ptr: tl.tensor,  # (S, C) fp32
    partial_mean_ptr: tl.tensor,  # (S, C) fp32
    partial_root_ptr: tl.tensor,  # (S, C) fp32
    counters_ptr: tl.tensor,  # (2 + 2 G,) int32, zero before and after
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    lag: tl.tensor,
    tiles_per_split: tl.tensor,
    total: tl.tensor,  # M
    momentum: tl.tensor,
    eps: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    groups = tl.cdiv(C, BLOCK_C)
    items = (groups + lag) * 2 * S
    ticket = _take_ticket(counters_ptr)
    while ticket < items:
        step = ticket // (2 * S)
        place = ticket % (2 * S)
        split = place % S
        first = split * tiles_per_split
        end = tl.minimum(first + tiles_per_split, tiles)
        if place < S:
            if step < groups:
                offs_c = step * BLOCK_C + tl.arange(0, BLOCK_C)
                count, mean, m2, unit = walk_statistics(
                    x_ptr, offs_c, first, end, N, C, L, BLOCK_N, BLOCK_C, BLOCK_L, WIDE
                )
                store_partials(
                    partial_count_ptr,
                    partial_mean_ptr,
                    partial_root_ptr,
                    split,
                    offs_c,
                    C,
                    count,
                    mean,
                    m2,
                    unit,
                )
                if _arrive(counters_ptr, step, S):
                    mean, m2, unit = combine_partials(
                        partial_count_ptr,
                        partial_mean_ptr,
                        partial_root_ptr,
                        offs_c,
                        S,
                        C,
                        total,
                        BLOCK_S,
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
                    _raise_flag(counters_ptr, step)
        else:
            if step >= lag:
                group = step - lag
                offs_c = group * BLOCK_C + tl.arange(0, BLOCK_C)
                mask_c = offs_c < C
                _wait_for_flag(counters_ptr, group)
                mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0, cache_modifier=".cg")
                rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0, cache_modifier=".cg")
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
                    first,
                    end,
                    N,
                    C,
                    L,
                    negative_slope,
                    ACTIVATION,
                    BLOCK_N,
                    BLOCK_L,
                    WIDE,
                )
        ticket = _take_ticket(counters_ptr)
    _leave(counters_ptr, groups, tracked_ptr)


@triton.jit
def _bn_backward_resident_kernel(
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
    partial_dweight_ptr: tl.tensor,  # (S, C) fp32
    partial_dbias_ptr: tl.tensor,  # (S, C) fp32
    counters_ptr: tl.tensor,  # (2 + 2 G,) int32, zero before and after
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    lag: tl.tensor,
    tiles_per_split: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    groups = tl.cdiv(C, BLOCK_C)
    items = (groups + lag) * 2 * S
    ticket = _take_ticket(counters_ptr)
    while ticket < items:
        step = ticket // (2 * S)
        place = ticket % (2 * S)
        split = place % S
        first = split * tiles_per_split
        end = tl.minimum(first + tiles_per_split, tiles)
        group = tl.where(place < S, step, step - lag)
        offs_c = group * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = (offs_c >= 0) & (offs_c < C)
        mean, rstd, scale, shift = load_channels(
            mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offs_c, mask_c
        )
        if place < S:
            if group < groups:
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
                    first,
                    end,
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
                tl.store(partial_dweight_ptr + split * C + offs_c, dweight, mask=mask_c)
                tl.store(partial_dbias_ptr + split * C + offs_c, dbias, mask=mask_c)
                if _arrive(counters_ptr, group, S):
                    dweight, dbias = sum_partials(
                        partial_dweight_ptr, partial_dbias_ptr, offs_c, S, C, BLOCK_S
                    )
                    tl.store(dweight_ptr + offs_c, dweight, mask=mask_c)
                    tl.store(dbias_ptr + offs_c, dbias, mask=mask_c)
                    _raise_flag(counters_ptr, group)
        else:
            if group >= 0:
                _wait_for_flag(counters_ptr, group)
                dweight = tl.load(
                    dweight_ptr + offs_c, mask=mask_c, other=0.0, cache_modifier=".cg"
                )
                dbias = tl.load(dbias_ptr + offs_c, mask=mask_c, other=0.0, cache_modifier=".cg")
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
                    first,
                    end,
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
        ticket = _take_ticket(counters_ptr)
    _leave(counters_ptr, groups, None)


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(x: Tensor, schedule: Schedule) -> Tensor:
    """Returns counters that are zero, and that no launch running at the same time uses.

    Launches on one stream follow one another, so each stream has its own and none is ever cleared
    from outside. A CUDA graph may be replayed beside anything: it gets its own, cleared in it.
    """
    wanted = 2 + 2 * schedule.channel_blocks
    if not x.is_cuda:
        return torch.zeros(wanted, dtype=torch.int32, device=x.device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(wanted, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    counters = _zeros.get(key)
    if counters is None or counters.numel() < wanted:
        # Larger than asked for, so that it seldom grows; what a running launch holds lives on, for
        # the allocator hands memory back in the order of the stream.
        counters = torch.zeros(2 * wanted, dtype=torch.int32, device=x.device)
        _zeros[key] = counters
    return counters


def forward(
    call: Forward, running: RunningStatistics, eps: float, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Runs a forward in training, reading x from memory once.

    Args:
        call: the tensors and the activation.
        running: updated in place.
        eps: added to the biased variance, > 0.
        schedule: of the shape and layout of x.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32.
    """
    y, mask = call.new_outputs()
    mean_C, rstd_C = new_statistics(call.x)
    count_SC, mean_SC, root_SC = mean_C.new_empty((3, schedule.splits, schedule.C)).unbind()
    _bn_forward_resident_kernel[(schedule.programs,)](
        **call.elementwise,
        **running.state,
        eps=eps,
        **schedule.walk,
        y_ptr=y,
        mask_ptr=mask,
        mean_ptr=mean_C,
        rstd_ptr=rstd_C,
        partial_count_ptr=count_SC,
        partial_mean_ptr=mean_SC,
        partial_root_ptr=root_SC,
        counters_ptr=_counters(call.x, schedule),
        S=schedule.splits,
        lag=schedule.lag,
        tiles_per_split=schedule.tiles_per_split,
        total=float(schedule.values_per_channel),
        CUMULATIVE=running.momentum is None,
        BLOCK_S=schedule.finish_tile[0],
    )
    return y, mask, mean_C, rstd_C


def backward(
    call: Backward, needs: BackwardNeeds, schedule: Schedule
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Runs a backward with all its sums, reading dy and x from memory once.

    Args:
        call: of the backward; x is not None.
        needs: which gradients, and the mode.
        schedule: of the shape and layout of x.

    Returns:
        dx and dresidual, each None if it is not needed; dweight and dbias, (C,) fp32.
    """
    dx, dresidual = call.new_gradients(needs)
    dweight_C, dbias_C = call.new_sums()
    dweight_SC, dbias_SC = call.mean.new_empty((2, schedule.splits, schedule.C)).unbind()
    _bn_backward_resident_kernel[(schedule.programs,)](
        **call.gradient,
        **schedule.walk,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        dweight_ptr=dweight_C,
        dbias_ptr=dbias_C,
        partial_dweight_ptr=dweight_SC,
        partial_dbias_ptr=dbias_SC,
        counters_ptr=_counters(call.dy, schedule),
        S=schedule.splits,
        lag=schedule.lag,
        tiles_per_split=schedule.tiles_per_split,
        inverse_count=1.0 / schedule.values_per_channel,
        TRAINING=needs.training,
        BLOCK_S=schedule.finish_tile[0],
    )
    return dx, dresidual, dweight_C, dbias_C
