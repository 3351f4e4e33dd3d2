"""Normalise, scale and shift, each element read and written once.

    y = (x - mean) * rstd * weight + bias

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4.

Shapes: N batch, C channels, L flattened space, M = N * L. In the NCL layout the N * C runs of L
values are rows of a matrix, whose channel is the row modulo C. Computed in fp32, rounded at the
store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.schedule import Layout, Schedule


@triton.jit
def _load_scale_shift(
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.zeros_like(scale)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return mean, scale, shift


@triton.jit
def _bn_forward_normalize_ncl_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    y_ptr: tl.tensor,  # (N, C, L)
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
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
    mean, scale, shift = _load_scale_shift(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offs_c, mask_row
    )
    start = start_row * L
    offsets = offs_row[:, None] * L + offs_l[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * scale[:, None] + shift[:, None]
    tl.store(y_ptr + start + offsets, y, mask=mask)


@triton.jit
def _bn_forward_normalize_mc_kernel(
    x_ptr: tl.tensor,  # (M, C)
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    y_ptr: tl.tensor,  # (M, C)
    M: tl.tensor,
    C: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    rows = (pid // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (rows < M)[:, None] & mask_c[None, :]
    mean, scale, shift = _load_scale_shift(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offs_c, mask_c)
    offsets = rows[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    tl.store(y_ptr + offsets, y, mask=mask)


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    schedule: Schedule,
) -> Tensor:
    """Computes y = (x - mean) * rstd * weight + bias.

    Args:
        x: (N, C, ...), contiguous, fp32, fp16 or bf16.
        mean: (C,) fp32.
        rstd: (C,) fp32, 1 / sqrt(var + eps).
        weight: (C,), any float dtype, or None for ones.
        bias: (C,), any float dtype, or None for zeros.
        schedule: of the shape of `x`.

    Returns:
        y, with the shape and dtype of `x`, contiguous.
    """
    y = torch.empty_like(x)
    tile = schedule.elementwise
    if schedule.layout is Layout.NCL:
        _bn_forward_normalize_ncl_kernel[schedule.elementwise_grid](
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            N=schedule.N,
            C=schedule.C,
            L=schedule.L,
            BLOCK_ROWS=tile.rows,
            BLOCK_L=tile.columns,
            num_warps=tile.num_warps,
        )
    else:
        _bn_forward_normalize_mc_kernel[schedule.elementwise_grid](
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            M=schedule.N,
            C=schedule.C,
            BLOCK_M=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.num_warps,
        )
    return y
