"""Gradients of weight and bias, then those of x and of the residual.

    g = dy * act'(z),  x_hat = (x - mean) * rstd
    dresidual = g,  dbias = sum g,  dweight = sum g * x_hat
    training:    dx = weight * rstd * (g - (dbias + x_hat * dweight) / M)
    evaluation:  dx = weight * rstd * g

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3, the gradient equations after Algorithm 1,
with those for var and mean inserted into that for x.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel; channels-last is
(N * L, C, 1).

Each program sums its tiles in order, and a second kernel sums the S partials of a channel. All
arithmetic is in fp32 and every order is fixed, without atomics, so two runs return the same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import Backward, BackwardNeeds, BackwardTensors, ChannelTensors
from bn_lightning.kernels.element import derivative_is_finite
from bn_lightning.kernels.launch_plan import launch_kernel
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.stats import locate_splits
from bn_lightning.kernels.tile_access import (
    ChannelValues,
    Tile,
    clear_outside,
    find_place,
    load_channels,
    load_gradient,
    load_tile,
    locate_channels,
    locate_columns,
    locate_tile,
    next_place,
    previous_place,
    store_tile,
    sum_channels,
    sum_positions,
    tiles_of_split,
)
from bn_lightning.kernels.walk import Tiling, cdiv


class Sums(NamedTuple):
    """The gradients of weight and bias.

    Attributes:
        dweight: sum g * x_hat.
        dbias: sum g.
    """

    dweight: tl.tensor
    dbias: tl.tensor


@triton.jit
def walk_sums(
    tensors: BackwardTensors,
    channels: ChannelValues,
    block: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
) -> Sums:
    """Return the sums over the tiles from `first` to `end` of a block, (CHANNELS,) each.

    Without TRAINING, dx does not depend on the sums: it and dresidual are written here, if wanted.
    """
    # A power of two near rstd as the unit of x - mean keeps the products in range and, unlike rstd,
    # rounds none of them. Its product with the mean stays below 2^127.
    exponent = channels.rstd.to(tl.int32, bitcast=True) >> 23
    mean_exponent = (channels.mean.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.maximum(tl.minimum(tl.minimum(exponent, 253), 380 - mean_exponent), 1)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    shift = channels.mean * -unit
    scaled = ChannelValues(channels.mean, channels.rstd, channels.scale * inverse, channels.shift)
    dweight = tl.zeros((tiling.BLOCK_R, tiling.BLOCK_P), dtype=tl.float32)
    dbias = dweight
    place = find_place(first, tiling)
    for _ in tl.range(first, end, num_stages=tiling.STAGES):
        tile = locate_tile(place, block, tiling)
        x = load_tile(tensors.x_ptr, tile, "")
        deviation = tl.fma(x, unit[None, :], shift[None, :])
        g = load_gradient(deviation, scaled, tensors, tile, "")
        if not derivative_is_finite(tensors.ACTIVATION):
            # Outside the tensor dy is 0 but x_hat is not, so g must be 0 for both sums.
            g = clear_outside(g, tensors.dy_ptr, tile)
        if not tensors.TRAINING:
            store_gradients(
                g, deviation, channels, Sums(channels.mean, channels.mean), tensors, tile
            )
        dweight = tl.fma(g, deviation, dweight)
        dbias += g
        place = next_place(place, tiling)
    rest = channels.rstd * inverse
    if tiling.CHANNELS == 1:
        dweight_C = sum_channels(dweight, tiling) * rest
    else:
        dweight_C = sum_positions(tl.sum(dweight, axis=0) * rest, tiling)
    return Sums(dweight_C, sum_channels(dbias, tiling))


@triton.jit
def store_sums(sums: Sums, pointers: Sums, offsets: tl.tensor, mask_c: tl.tensor) -> None:
    """Store dweight and dbias of some channels."""
    tl.store(pointers.dweight + offsets, sums.dweight, mask=mask_c)
    tl.store(pointers.dbias + offsets, sums.dbias, mask=mask_c)


@triton.jit
def sum_partials(
    partials: Sums,  # pointers, (S, C) fp32
    offs_c: tl.tensor,
    mask_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
) -> Sums:
    """Return the sums over the splits, for some channels."""
    dweight = tl.zeros(offs_c.shape, dtype=tl.float32)
    dbias = dweight
    for first in range(0, S, BLOCK_S):
        offsets, mask = locate_splits(first, offs_c, mask_c, S, C, BLOCK_S)
        part = tl.load(partials.dweight + offsets, mask=mask, other=0.0)
        dweight += tl.sum(part, axis=0)
        part = tl.load(partials.dbias + offsets, mask=mask, other=0.0)
        dbias += tl.sum(part, axis=0)
    return Sums(dweight, dbias)


@triton.jit
def store_gradients(
    g: tl.tensor,  # fp32
    deviation: tl.tensor,  # fp32, x - mean, used in training only
    channels: ChannelValues,
    sums: Sums,  # of each position's channel, used in training only
    tensors: BackwardTensors,
    tile: Tile,
) -> None:
    """Store dresidual = g and dx = scale * (g - (dbias + x_hat * dweight) / M), if wanted.

    Without TRAINING dx = scale * g.
    """
    if tensors.dresidual_ptr is not None:
        store_tile(tensors.dresidual_ptr, tile, g)
    if tensors.dx_ptr is not None:
        dx = g
        if tensors.TRAINING:
            slope = sums.dweight * tensors.inverse_count * channels.rstd
            shift = sums.dbias * tensors.inverse_count
            dx = tl.fma(deviation, -slope[None, :], g - shift[None, :])
        store_tile(tensors.dx_ptr, tile, dx * channels.scale[None, :])


@triton.jit
def _bn_backward_partial_sums_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    partials: Sums,  # pointers, (S, C) fp32, written
    tiles_per_split: tl.tensor,
    tiling: Tiling,
) -> None:
    block = tl.program_id(0)
    split = tl.program_id(1)
    first, end = tiles_of_split(split, tiles_per_split, tiling)
    owner, mask, _ = locate_columns(block, tiling)
    values = load_channels(channels, owner, mask)
    sums = walk_sums(tensors, values, block, first, end, tiling)
    offs_c, mask_c = locate_channels(block, tiling)
    store_sums(sums, partials, split * tiling.C + offs_c, mask_c)


@triton.jit
def _bn_backward_finish_sums_kernel(
    partials: Sums,  # pointers, (S, C) fp32
    sums: Sums,  # pointers, (C,) fp32, written
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    store_sums(sum_partials(partials, offs_c, mask_c, S, C, BLOCK_S), sums, offs_c, mask_c)


@triton.jit
def _bn_backward_input_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    sums: Sums,  # pointers, (C,) fp32, read in training only
    tiles_per_split: tl.tensor,
    tiling: Tiling,
) -> None:
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    first, end = tiles_of_split(split, tiles_per_split, tiling)
    owner, mask, _ = locate_columns(block, tiling)
    values = load_channels(channels, owner, mask)
    dweight = values.rstd
    dbias = values.rstd
    if tensors.TRAINING:
        dweight = tl.load(sums.dweight + owner, mask=mask, other=0.0)
        dbias = tl.load(sums.dbias + owner, mask=mask, other=0.0)
    sums_P = Sums(dweight, dbias)
    walk_gradients(tensors, values, sums_P, block, first, end, tiling, "evict_first")


@triton.jit
def walk_gradients(
    tensors: BackwardTensors,
    channels: ChannelValues,
    sums: Sums,  # of each position's channel
    block: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
    EVICTION: tl.constexpr,
) -> None:
    """Write dx and dresidual for the tiles from `first` to `end` of a block, the last one first.

    EVICTION is the policy of the loads.
    """
    place = find_place(end - 1, tiling)
    for _ in range(first, end):
        tile = locate_tile(place, block, tiling)
        if tensors.x_ptr is not None:
            deviation = load_tile(tensors.x_ptr, tile, EVICTION) - channels.mean[None, :]
        else:
            deviation = tl.zeros((tiling.BLOCK_R, tiling.BLOCK_P), dtype=tl.float32)
        g = load_gradient(deviation, channels, tensors, tile, EVICTION)
        store_gradients(g, deviation, channels, sums, tensors, tile)
        place = previous_place(place, tiling)


def affine_gradients(call: Backward, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Compute dweight = sum g * x_hat and dbias = sum g.

    Args:
        call: of the backward; x is not None.
        schedule: for the shape and layout of x.

    Returns:
        dweight and dbias, each (C,) fp32.
    """
    return _sum(call, call.tensors(training=True), schedule)


def evaluation_gradients(
    call: Backward, needs: BackwardNeeds, schedule: Schedule
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Compute all gradients where mean and rstd are constants, reading each tensor once.

    Args:
        call: of the backward; x is not None.
        needs: which gradients.
        schedule: for the shape and layout of x.

    Returns:
        dx and dresidual, each None if it is not needed; dweight and dbias, each (C,) fp32.
    """
    dx, dresidual = call.new_gradients(needs)
    return dx, dresidual, *_sum(call, call.tensors(dx, dresidual), schedule)


def _sum(call: Backward, tensors: BackwardTensors, schedule: Schedule) -> Sums:
    """Launch the kernel of the partial sums, and, with several splits, the one that adds them."""
    sums = Sums(*call.new_sums())
    partials = sums
    walk = schedule.reduction
    if walk.splits > 1:
        partials = Sums(*call.new_partials(walk.splits))
    launch_kernel(
        _bn_backward_partial_sums_kernel,
        walk.grid,
        tensors=tensors,
        channels=call.channels,
        partials=partials,
        tiles_per_split=walk.tiles_per_split,
        tiling=walk.tiling,
        **walk.options,
    )
    if walk.splits > 1:
        block_s, block_c = schedule.finish_tile
        launch_kernel(
            _bn_backward_finish_sums_kernel,
            (cdiv(schedule.C, block_c),),
            partials=partials,
            sums=sums,
            S=walk.splits,
            C=schedule.C,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
    return sums


def input_gradients(
    call: Backward,
    needs: BackwardNeeds,
    dweight: Tensor | None,
    dbias: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx and dresidual.

    Args:
        call: of the backward.
        needs: which gradients, and the mode.
        dweight: (C,) fp32, from `affine_gradients`; may be None in evaluation.
        dbias: as `dweight`.
        schedule: for the shape and layout of dy.

    Returns:
        dx and dresidual, each None if it is not needed.
    """
    dx, dresidual = call.new_gradients(needs)
    walk = schedule.elementwise
    launch_kernel(
        _bn_backward_input_kernel,
        walk.grid,
        # Alone, the gradient of the residual needs no sums.
        tensors=call.tensors(
            dx, dresidual, 1.0 / schedule.values_per_channel, training=needs.training and needs.dx
        ),
        channels=call.channels,
        sums=Sums(dweight, dbias),
        tiles_per_split=walk.tiles_per_split,
        tiling=walk.tiling,
        **walk.options,
    )
    return dx, dresidual
