"""Gradients of weight and bias, then that of x.

    dbias = sum dy,  dweight = sum dy * x_hat,  x_hat = (x - mean) * rstd
    training:    dx = weight * rstd * (dy - (dbias + x_hat * dweight) / M)
    evaluation:  dx = weight * rstd * dy

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3, the gradient equations after Algorithm 1,
those for var and mean put into that for x.

Shapes: N batch, C channels, L flattened space, M = N * L, S splits of a channel.

Each program sums its tiles in order, a second kernel the S partials of a channel. Everything in
fp32, every order fixed, no atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.schedule import Layout, Schedule


@triton.jit
def _bn_backward_partial_sums_ncl_kernel(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L)
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    dweight_ptr: tl.tensor,  # (S, C) fp32
    dbias_ptr: tl.tensor,  # (S, C) fp32
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    tiles_per_split: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    c = tl.program_id(0)
    split = tl.program_id(1)
    tiles_l = tl.cdiv(L, BLOCK_L)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(N, BLOCK_N) * tiles_l)
    mean = tl.load(mean_ptr + c)
    rstd = tl.load(rstd_ptr + c)

    dweight = tl.zeros((BLOCK_N, BLOCK_L), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_L), dtype=tl.float32)
    for tile in range(first_tile, end_tile):
        offs_n = tile // tiles_l * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_l = tile % tiles_l * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (offs_n < N)[:, None] & (offs_l < L)[None, :]
        rows = offs_n.to(tl.int64) * C + c
        offsets = rows[:, None] * L + offs_l[None, :]
        # A masked dy of 0 takes the element out of both sums.
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * ((x - mean) * rstd)
        dbias += dy

    offset = split * C + c
    tl.store(dweight_ptr + offset, tl.sum(tl.sum(dweight, axis=1), axis=0))
    tl.store(dbias_ptr + offset, tl.sum(tl.sum(dbias, axis=1), axis=0))


@triton.jit
def _bn_backward_partial_sums_mc_kernel(
    dy_ptr: tl.tensor,  # (M, C)
    x_ptr: tl.tensor,  # (M, C)
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    dweight_ptr: tl.tensor,  # (S, C) fp32
    dbias_ptr: tl.tensor,  # (S, C) fp32
    M: tl.tensor,
    C: tl.tensor,
    tiles_per_split: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(M, BLOCK_M))
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)

    dweight = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tile in range(first_tile, end_tile):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        rows = offs_m.to(tl.int64)
        offsets = rows[:, None] * C + offs_c[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * ((x - mean[None, :]) * rstd[None, :])
        dbias += dy

    offsets_c = split * C + offs_c
    tl.store(dweight_ptr + offsets_c, tl.sum(dweight, axis=0), mask=mask_c)
    tl.store(dbias_ptr + offsets_c, tl.sum(dbias, axis=0), mask=mask_c)


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
    offs_s = tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_s < S)[:, None] & mask_c[None, :]
    offsets = offs_s[:, None] * C + offs_c[None, :]
    dweight = tl.load(partial_dweight_ptr + offsets, mask=mask, other=0.0)
    dbias = tl.load(partial_dbias_ptr + offsets, mask=mask, other=0.0)
    tl.store(dweight_ptr + offs_c, tl.sum(dweight, axis=0), mask=mask_c)
    tl.store(dbias_ptr + offs_c, tl.sum(dbias, axis=0), mask=mask_c)


@triton.jit
def _load_scale(
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return rstd, scale


@triton.jit
def _bn_backward_dx_ncl_kernel(
    dy_ptr: tl.tensor,  # (N, C, L)
    x_ptr: tl.tensor,  # (N, C, L), read in training only
    mean_ptr: tl.tensor,  # (C,) fp32, read in training only
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    dweight_ptr: tl.tensor,  # (C,) fp32, read in training only
    dbias_ptr: tl.tensor,  # (C,) fp32, read in training only
    dx_ptr: tl.tensor,  # (N, C, L)
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    TRAINING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    tiles_l = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    # Only the first row needs 64 bits: BLOCK_ROWS * L is at most L or about a tile.
    start_row = (pid // tiles_l).to(tl.int64) * BLOCK_ROWS
    offs_row = tl.arange(0, BLOCK_ROWS)
    offs_l = pid % tiles_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = ((start_row % C).to(tl.int32) + offs_row) % C
    mask_row = offs_row < tl.minimum(tl.cast(N, tl.int64) * C - start_row, BLOCK_ROWS).to(tl.int32)
    mask = mask_row[:, None] & (offs_l < L)[None, :]
    rstd, scale = _load_scale(rstd_ptr, weight_ptr, offs_c, mask_row)
    start = start_row * L
    offsets = offs_row[:, None] * L + offs_l[None, :]
    dx = tl.load(dy_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if TRAINING:
        mean = tl.load(mean_ptr + offs_c, mask=mask_row, other=0.0)
        mean_dy = tl.load(dbias_ptr + offs_c, mask=mask_row, other=0.0) * inverse_count
        slope = tl.load(dweight_ptr + offs_c, mask=mask_row, other=0.0) * inverse_count * rstd
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = dx - mean_dy[:, None] - (x - mean[:, None]) * slope[:, None]
    tl.store(dx_ptr + start + offsets, dx * scale[:, None], mask=mask)


@triton.jit
def _bn_backward_dx_mc_kernel(
    dy_ptr: tl.tensor,  # (M, C)
    x_ptr: tl.tensor,  # (M, C), read in training only
    mean_ptr: tl.tensor,  # (C,) fp32, read in training only
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    dweight_ptr: tl.tensor,  # (C,) fp32, read in training only
    dbias_ptr: tl.tensor,  # (C,) fp32, read in training only
    dx_ptr: tl.tensor,  # (M, C)
    M: tl.tensor,
    C: tl.tensor,
    inverse_count: tl.tensor,  # 1 / M
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    rows = (pid // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (rows < M)[:, None] & mask_c[None, :]
    rstd, scale = _load_scale(rstd_ptr, weight_ptr, offs_c, mask_c)
    offsets = rows[:, None] * C + offs_c[None, :]
    dx = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if TRAINING:
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
        mean_dy = tl.load(dbias_ptr + offs_c, mask=mask_c, other=0.0) * inverse_count
        slope = tl.load(dweight_ptr + offs_c, mask=mask_c, other=0.0) * inverse_count * rstd
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = dx - mean_dy[None, :] - (x - mean[None, :]) * slope[None, :]
    tl.store(dx_ptr + offsets, dx * scale[None, :], mask=mask)


def affine_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Computes dweight = sum dy * x_hat and dbias = sum dy.

    Args:
        dy: (N, C, ...), contiguous, fp32, fp16 or bf16.
        x: (N, C, ...), contiguous.
        mean: (C,) fp32.
        rstd: (C,) fp32.
        schedule: of the shape of `x`.

    Returns:
        dweight and dbias, each (C,) fp32.
    """
    dweight_SC, dbias_SC = (
        torch.empty((schedule.splits, schedule.C), dtype=torch.float32, device=x.device)
        for _ in range(2)
    )
    tile = schedule.reduction
    if schedule.layout is Layout.NCL:
        _bn_backward_partial_sums_ncl_kernel[schedule.reduction_grid](
            dy_ptr=dy,
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dweight_ptr=dweight_SC,
            dbias_ptr=dbias_SC,
            N=schedule.N,
            C=schedule.C,
            L=schedule.L,
            tiles_per_split=schedule.tiles_per_split,
            BLOCK_N=tile.rows,
            BLOCK_L=tile.columns,
            num_warps=tile.num_warps,
        )
    else:
        _bn_backward_partial_sums_mc_kernel[schedule.reduction_grid](
            dy_ptr=dy,
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dweight_ptr=dweight_SC,
            dbias_ptr=dbias_SC,
            M=schedule.N,
            C=schedule.C,
            tiles_per_split=schedule.tiles_per_split,
            BLOCK_M=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.num_warps,
        )

    dweight_C, dbias_C = (
        torch.empty(schedule.C, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    block_s, block_c = schedule.finish_tile
    _bn_backward_finish_sums_kernel[(triton.cdiv(schedule.C, block_c),)](
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


def training_input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    schedule: Schedule,
) -> Tensor:
    """Computes dx = weight * rstd * (dy - (dbias + x_hat * dweight) / M).

    Args:
        dy: (N, C, ...), contiguous, fp32, fp16 or bf16.
        x: (N, C, ...), contiguous.
        mean: (C,) fp32, of `x`.
        rstd: (C,) fp32, of `x`.
        weight: (C,), any float dtype, or None for ones.
        dweight: (C,) fp32, from `affine_gradients`.
        dbias: (C,) fp32, from `affine_gradients`.
        schedule: of the shape of `x`.

    Returns:
        dx, with the shape and dtype of `dy`, contiguous.
    """
    return _launch_dx(dy, x, mean, rstd, weight, dweight, dbias, schedule)


def evaluation_input_gradient(
    dy: Tensor, rstd: Tensor, weight: Tensor | None, schedule: Schedule
) -> Tensor:
    """Computes dx = weight * rstd * dy, the statistics being constants.

    Args:
        dy: (N, C, ...), contiguous, fp32, fp16 or bf16.
        rstd: (C,) fp32.
        weight: (C,), any float dtype, or None for ones.
        schedule: of the shape of `dy`.

    Returns:
        dx, with the shape and dtype of `dy`, contiguous.
    """
    return _launch_dx(dy, None, None, rstd, weight, None, None, schedule)


def _launch_dx(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    schedule: Schedule,
) -> Tensor:
    dx = torch.empty_like(dy)
    tile = schedule.elementwise
    inverse_count = 1.0 / schedule.values_per_channel
    if schedule.layout is Layout.NCL:
        _bn_backward_dx_ncl_kernel[schedule.elementwise_grid](
            dy_ptr=dy,
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            dx_ptr=dx,
            N=schedule.N,
            C=schedule.C,
            L=schedule.L,
            inverse_count=inverse_count,
            TRAINING=x is not None,
            BLOCK_ROWS=tile.rows,
            BLOCK_L=tile.columns,
            num_warps=tile.num_warps,
        )
    else:
        _bn_backward_dx_mc_kernel[schedule.elementwise_grid](
            dy_ptr=dy,
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            dx_ptr=dx,
            M=schedule.N,
            C=schedule.C,
            inverse_count=inverse_count,
            TRAINING=x is not None,
            BLOCK_M=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.num_warps,
        )
    return dx
