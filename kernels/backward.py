"""Gradients of weight and bias, then those of x and of the residual.

    g = dy * act'(z),  x_hat = (x - mean) * rstd
    dresidual = g,  dbias = sum g,  dweight = sum g * x_hat
    training:    dx = weight * rstd * (g - (dbias + x_hat * dweight) / M)
    evaluation:  dx = weight * rstd * g

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3, the gradient equations after Algorithm 1,
those for var and mean put into that for x.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel; channels-last is
(N * L, C, 1).

Each program sums its tiles in order, a second kernel the S partials of a channel. Everything in
fp32, every order fixed, no atomics: two runs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import Backward, BackwardNeeds
from bn_lightning.kernels.normalize import flat_offsets
from bn_lightning.kernels.schedule import Schedule, cdiv
from bn_lightning.kernels.tile import (
    as_tile,
    channel_sum,
    load_channels,
    load_gradient,
    tile_offsets,
)


@triton.jit
def walk_sums(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L) or None
    mask_ptr: tl.tensor,  # uint8 or None
    mean: tl.tensor,  # (BLOCK_C,), as the next three
    rstd: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    offs_c: tl.tensor,
    first_tile: tl.tensor,
    end_tile: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns sum g * x_hat and sum g over some tiles, for BLOCK_C channels."""
    # A power of two near rstd keeps the products in range and, unlike rstd, rounds none of them.
    exponent = rstd.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    unit = exponent.to(tl.float32, bitcast=True)
    dweight = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_L), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_L), dtype=tl.float32)
    for tile in range(first_tile, end_tile):
        offsets, mask, _ = tile_offsets(tile, offs_c, N, C, L, BLOCK_N, BLOCK_L, WIDE, False)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = load_gradient(
            dy_ptr,
            x,
            as_tile(mean),
            as_tile(scale),
            as_tile(shift),
            residual_ptr,
            y_ptr,
            mask_ptr,
            offsets,
            mask,
            negative_slope,
            ACTIVATION,
            "",
        )
        # Outside the tensor x is 0 and x_hat is not: g is what takes the element out of both sums.
        g = tl.where(mask, g, 0.0)
        dweight = tl.fma(g, (x - as_tile(mean)) * as_tile(unit), dweight)
        dbias += g
    return channel_sum(dweight) * (rstd / unit), channel_sum(dbias)


@triton.jit
def sum_partials(
    dweight_ptr: tl.tensor,  # (S, C) fp32
    dbias_ptr: tl.tensor,  # (S, C) fp32
    offs_c: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the sums over the splits, for some channels."""
    offs_s = tl.arange(0, BLOCK_S)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    offsets = offs_s[:, None] * C + offs_c[None, :]
    # Other programs may have written them in this launch: L1 is passed by.
    dweight = tl.load(dweight_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    dbias = tl.load(dbias_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(dweight, axis=0), tl.sum(dbias, axis=0)


@triton.jit
def store_gradients(
    g: tl.tensor,  # fp32
    x: tl.tensor,  # fp32, used in training only
    mean: tl.tensor,  # these five broadcast against g
    rstd: tl.tensor,
    scale: tl.tensor,
    dweight: tl.tensor,  # used in training only, as dbias
    dbias: tl.tensor,
    dx_ptr: tl.tensor,  # or None
    dresidual_ptr: tl.tensor,  # or None
    offsets: tl.tensor,
    mask: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    TRAINING: tl.constexpr,
) -> None:
    """Stores dresidual = g and dx = scale * (g - (dbias + x_hat * dweight) / M), where wanted.

    Without TRAINING dx = scale * g.
    """
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    if dx_ptr is not None:
        dx = g
        if TRAINING:
            slope = dweight * inverse_count * rstd
            dx = tl.fma(mean - x, slope, g - dbias * inverse_count)
        tl.store(dx_ptr + offsets, dx * scale, mask=mask)


@triton.jit
def _bn_backward_partial_sums_kernel(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L) or None
    mask_ptr: tl.tensor,  # (N * C * L / 8,) uint8 or None
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    dweight_ptr: tl.tensor,  # (S, C) fp32
    dbias_ptr: tl.tensor,  # (S, C) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    tiles_per_split: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    split = tl.program_id(1)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L))
    mean, rstd, scale, shift = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offs_c, mask_c
    )
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
    tl.store(dweight_ptr + split * C + offs_c, dweight, mask=mask_c)
    tl.store(dbias_ptr + split * C + offs_c, dbias, mask=mask_c)


@triton.jit
def _bn_backward_finish_sums_kernel(
    partial_dweight_ptr: tl.tensor,  # (S, C) fp32
    partial_dbias_ptr: tl.tensor,  # (S, C) fp32
    dweight_ptr: tl.tensor,  # (C,) fp32
    dbias_ptr: tl.tensor,  # (C,) fp32
    S: tl.tensor,
    C: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight, dbias = sum_partials(partial_dweight_ptr, partial_dbias_ptr, offs_c, S, C, BLOCK_S)
    tl.store(dweight_ptr + offs_c, dweight, mask=offs_c < C)
    tl.store(dbias_ptr + offs_c, dbias, mask=offs_c < C)


@triton.jit
def _bn_backward_input_kernel(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L), or None where neither dx nor z needs it
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L) or None
    mask_ptr: tl.tensor,  # (N * C * L / 8,) uint8 or None
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    dweight_ptr: tl.tensor,  # (C,) fp32, read in training only
    dbias_ptr: tl.tensor,  # (C,) fp32, read in training only
    dx_ptr: tl.tensor,  # (N, C, L) or None
    dresidual_ptr: tl.tensor,  # (N, C, L) or None
    numel: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
    EIGHTS: tl.constexpr,
) -> None:
    start, offsets, mask, channels = flat_offsets(numel, C, L, BLOCK, EIGHTS)
    mask_c = channels < C
    mean, rstd, scale, shift = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, mask_c
    )
    x = mean
    if x_ptr is not None:
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        x = x.to(tl.float32)
    g = load_gradient(
        dy_ptr + start,
        x,
        mean,
        scale,
        shift,
        residual_ptr if residual_ptr is None else residual_ptr + start,
        y_ptr if y_ptr is None else y_ptr + start,
        mask_ptr if mask_ptr is None else mask_ptr + start // 8,
        offsets,
        mask,
        negative_slope,
        ACTIVATION,
        "evict_first",
    )
    dweight = rstd
    dbias = rstd
    if TRAINING:
        dweight = tl.load(dweight_ptr + channels, mask=mask_c, other=0.0)
        dbias = tl.load(dbias_ptr + channels, mask=mask_c, other=0.0)
    store_gradients(
        g,
        x,
        mean,
        rstd,
        scale,
        dweight,
        dbias,
        dx_ptr if dx_ptr is None else dx_ptr + start,
        dresidual_ptr if dresidual_ptr is None else dresidual_ptr + start,
        offsets,
        mask,
        inverse_count,
        TRAINING,
    )


@triton.jit
def walk_gradients(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L) or None
    mask_ptr: tl.tensor,  # uint8 or None
    mean: tl.tensor,  # (BLOCK_C,), as the next five
    rstd: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dx_ptr: tl.tensor,  # (N, C, L)
    dresidual_ptr: tl.tensor,  # (N, C, L) or None
    offs_c: tl.tensor,
    first_tile: tl.tensor,
    end_tile: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Does some tiles of some channels, the last one first, for the regimes of one launch."""
    for step in range(first_tile, end_tile):
        tile = end_tile - 1 - (step - first_tile)
        offsets, mask, _ = tile_offsets(tile, offs_c, N, C, L, BLOCK_N, BLOCK_L, WIDE, False)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        x = x.to(tl.float32)
        g = load_gradient(
            dy_ptr,
            x,
            as_tile(mean),
            as_tile(scale),
            as_tile(shift),
            residual_ptr,
            y_ptr,
            mask_ptr,
            offsets,
            mask,
            negative_slope,
            ACTIVATION,
            "evict_first",
        )
        store_gradients(
            g,
            x,
            as_tile(mean),
            as_tile(rstd),
            as_tile(scale),
            as_tile(dweight),
            as_tile(dbias),
            dx_ptr,
            dresidual_ptr,
            offsets,
            mask,
            inverse_count,
            TRAINING,
        )


def affine_gradients(call: Backward, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Computes dweight = sum g * x_hat and dbias = sum g.

    Args:
        call: of the backward; x is not None.
        schedule: of the shape and layout of x.

    Returns:
        dweight and dbias, each (C,) fp32.
    """
    dweight_SC, dbias_SC = call.mean.new_empty((2, schedule.splits, schedule.C)).unbind()
    _bn_backward_partial_sums_kernel[(schedule.channel_blocks, schedule.splits)](
        **call.gradient,
        **schedule.walk,
        dweight_ptr=dweight_SC,
        dbias_ptr=dbias_SC,
        tiles_per_split=schedule.tiles_per_split,
    )
    dweight_C, dbias_C = call.new_sums()
    block_s, block_c = schedule.finish_tile
    _bn_backward_finish_sums_kernel[(cdiv(schedule.C, block_c),)](
        partial_dweight_ptr=dweight_SC,
        partial_dbias_ptr=dbias_SC,
        dweight_ptr=dweight_C,
        dbias_ptr=dbias_C,
        S=schedule.splits,
        C=schedule.C,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return dweight_C, dbias_C


def input_gradients(
    call: Backward,
    needs: BackwardNeeds,
    dweight: Tensor | None,
    dbias: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor | None, Tensor | None]:
    """Computes dx and dresidual.

    Args:
        call: of the backward.
        needs: which gradients, and the mode.
        dweight: (C,) fp32, from `affine_gradients`; may be None in evaluation, as the next.
        dbias: (C,) fp32, from `affine_gradients`.
        schedule: of the shape and layout of dy.

    Returns:
        dx and dresidual, each None if it is not needed.
    """
    dx, dresidual = call.new_gradients(needs)
    _bn_backward_input_kernel[schedule.flat_grid](
        **call.gradient,
        **schedule.flat,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        inverse_count=1.0 / schedule.values_per_channel,
        # Alone, the residual's gradient needs no sums.
        TRAINING=needs.training and needs.dx,
    )
    return dx, dresidual
