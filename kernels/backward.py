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
from bn_lightning.kernels.launch_plan import launch_kernel
from bn_lightning.kernels.normalize import locate_block
from bn_lightning.kernels.schedule import Flat, Schedule, Tiling, cdiv
from bn_lightning.kernels.tile import (
    ChannelValues,
    Tile,
    as_tile,
    channels_as_tile,
    count_tiles,
    load_channels,
    load_gradient,
    load_tile,
    locate_tile,
    store_tile,
    sum_channels,
)


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
    channels: ChannelValues,  # (BLOCK_C,)
    offs_c: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
) -> Sums:
    """Return the sums over the tiles from `first` to `end`, for BLOCK_C channels.

    Without TRAINING, dx does not depend on the sums: it and dresidual are written here, if wanted.
    """
    # A power of two near rstd keeps the products in range and, unlike rstd, rounds none of them.
    exponent = channels.rstd.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    unit = exponent.to(tl.float32, bitcast=True)
    shape: tl.constexpr = (tiling.BLOCK_N, tiling.BLOCK_C, tiling.BLOCK_L)
    dweight = tl.zeros(shape, dtype=tl.float32)
    dbias = tl.zeros(shape, dtype=tl.float32)
    for number in range(first, end):
        tile, _ = locate_tile(number, offs_c, tiling, False)
        x = load_tile(tensors.x_ptr, tile, "")
        g = load_gradient(x, channels_as_tile(channels), tensors, tile, "")
        # Outside the tensor x is 0 but x_hat is not, so g must be 0 there for both sums.
        g = tl.where(tile.inside, g, 0.0)
        if not tensors.TRAINING:
            values = channels_as_tile(channels)
            store_gradients(g, x, values, Sums(values.mean, values.mean), tensors, tile)
        dweight = tl.fma(g, (x - as_tile(channels.mean)) * as_tile(unit), dweight)
        dbias += g
    return Sums(sum_channels(dweight) * (channels.rstd / unit), sum_channels(dbias))


@triton.jit
def store_sums(sums: Sums, pointers: Sums, offsets: tl.tensor, mask_c: tl.tensor) -> None:
    """Store dweight and dbias of some channels."""
    tl.store(pointers.dweight + offsets, sums.dweight, mask=mask_c)
    tl.store(pointers.dbias + offsets, sums.dbias, mask=mask_c)


@triton.jit
def sum_partials(
    partials: Sums,  # pointers, (S, C) fp32
    offs_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
) -> Sums:
    """Return the sums over the splits, for some channels."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_sc = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    offsets = offs_s[:, None] * C + offs_c[None, :]
    # L1 is bypassed, because other programs may have written the partials in this launch.
    dweight = tl.load(partials.dweight + offsets, mask=mask_sc, other=0.0, cache_modifier=".cg")
    dbias = tl.load(partials.dbias + offsets, mask=mask_sc, other=0.0, cache_modifier=".cg")
    return Sums(tl.sum(dweight, axis=0), tl.sum(dbias, axis=0))


@triton.jit
def store_gradients(
    g: tl.tensor,  # fp32
    x: tl.tensor,  # fp32, used in training only
    channels: ChannelValues,  # of a shape that broadcasts to g
    sums: Sums,  # likewise, used in training only
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
            dx = tl.fma(channels.mean - x, slope, g - sums.dbias * tensors.inverse_count)
        store_tile(tensors.dx_ptr, tile, dx * channels.scale)


@triton.jit
def _bn_backward_partial_sums_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    partials: Sums,  # pointers, (S, C) fp32, written
    tiles_per_split: tl.tensor,
    tiling: Tiling,
) -> None:
    offs_c = tl.program_id(0) * tiling.BLOCK_C + tl.arange(0, tiling.BLOCK_C)
    mask_c = offs_c < tiling.C
    split = tl.program_id(1)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, count_tiles(tiling))
    values = load_channels(channels, offs_c, mask_c)
    sums = walk_sums(tensors, values, offs_c, first, end, tiling)
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
    store_sums(sum_partials(partials, offs_c, S, C, BLOCK_S), sums, offs_c, offs_c < C)


@triton.jit
def _bn_backward_input_kernel(
    tensors: BackwardTensors,
    channels: ChannelTensors,
    sums: Sums,  # pointers, (C,) fp32, read in training only
    flat: Flat,
) -> None:
    tile, offs_c = locate_block(flat)
    mask_c = offs_c < flat.C
    values = load_channels(channels, offs_c, mask_c)
    x = values.mean
    if tensors.x_ptr is not None:
        x = load_tile(tensors.x_ptr, tile, "evict_first")
    g = load_gradient(x, values, tensors, tile, "evict_first")
    dweight = values.rstd
    dbias = values.rstd
    if tensors.TRAINING:
        dweight = tl.load(sums.dweight + offs_c, mask=mask_c, other=0.0)
        dbias = tl.load(sums.dbias + offs_c, mask=mask_c, other=0.0)
    store_gradients(g, x, values, Sums(dweight, dbias), tensors, tile)


@triton.jit
def walk_gradients(
    tensors: BackwardTensors,
    channels: ChannelValues,  # (BLOCK_C,)
    sums: Sums,  # (BLOCK_C,)
    offs_c: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tiling: Tiling,
) -> None:
    """Write dx and dresidual for the tiles from `first` to `end`, the last one first."""
    for step in range(first, end):
        tile, _ = locate_tile(end - 1 - (step - first), offs_c, tiling, False)
        x = load_tile(tensors.x_ptr, tile, "evict_first")
        values = channels_as_tile(channels)
        g = load_gradient(x, values, tensors, tile, "evict_first")
        tile_sums = Sums(as_tile(sums.dweight), as_tile(sums.dbias))
        store_gradients(g, x, values, tile_sums, tensors, tile)


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
    if schedule.splits > 1:
        partials = Sums(*call.mean.new_empty((2, schedule.splits, schedule.C)).unbind())
    launch_kernel(
        _bn_backward_partial_sums_kernel,
        (schedule.channel_blocks, schedule.splits),
        tensors=tensors,
        channels=call.channels,
        partials=partials,
        tiles_per_split=schedule.tiles_per_split,
        tiling=schedule.tiling,
        **schedule.walk_options,
    )
    if schedule.splits > 1:
        block_s, block_c = schedule.finish_tile
        launch_kernel(
            _bn_backward_finish_sums_kernel,
            (cdiv(schedule.C, block_c),),
            partials=partials,
            sums=sums,
            S=schedule.splits,
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
    launch_kernel(
        _bn_backward_input_kernel,
        schedule.flat_grid,
        # Alone, the gradient of the residual needs no sums.
        tensors=call.tensors(
            dx, dresidual, 1.0 / schedule.values_per_channel, training=needs.training and needs.dx
        ),
        channels=call.channels,
        sums=Sums(dweight, dbias),
        flat=schedule.flat,
        num_warps=schedule.flat_warps,
    )
    return dx, dresidual
