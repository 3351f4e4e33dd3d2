"""Normalise, scale, shift, add a residual, activate: each element read and written once.

    y = act((x - mean) * rstd * weight + bias + residual)

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4.

Shapes: N batch, C channels, L flattened space; channels-last is (N * L, C, 1). The kernel walks
memory flat, in groups of eight neighbours, which is what one thread moves in 16 bytes of a 16-bit
dtype and what one byte of mask describes. It walks backwards: the statistics were read forwards,
so the end of x is what the cache still holds.
"""

import triton
import triton.language as tl
from torch import Tensor

from bn_lightning.kernels.arguments import Forward
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.tile import as_tile, load_channels, tile_offsets, write_output


@triton.jit
def flat_offsets(
    numel: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    BLOCK: tl.constexpr,
    EIGHTS: tl.constexpr,  # channels of eight neighbours: "one", "consecutive" or "any"
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns the block's start, and offsets, mask and channels of (BLOCK / 8, 8) elements."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    # One 64-bit division a program; those of the elements are in 32 bits.
    start = block.to(tl.int64) * BLOCK
    inside = tl.minimum(numel - start, BLOCK).to(tl.int32)
    group = tl.arange(0, BLOCK // 8)[:, None] * 8
    offsets = group + tl.arange(0, 8)[None, :]
    start_c = (start // L % C).to(tl.int32)
    start_l = (start % L).to(tl.int32)
    # One division for eight elements, where they allow it.
    if EIGHTS == "one":
        channels = (start_c + (start_l + group) // L) % C
    elif EIGHTS == "consecutive":
        channels = (start_c + group) % C + tl.arange(0, 8)[None, :]
    else:
        channels = (start_c + (start_l + offsets) // L) % C
    return start, offsets, offsets < inside, channels


@triton.jit
def _bn_forward_normalize_kernel(
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    y_ptr: tl.tensor,  # (N, C, L)
    mask_ptr: tl.tensor,  # (N * C * L / 8,) uint8 or None
    numel: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EIGHTS: tl.constexpr,
) -> None:
    start, offsets, mask, channels = flat_offsets(numel, C, L, BLOCK, EIGHTS)
    mean, _, scale, shift = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, channels < C
    )
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    write_output(
        x.to(tl.float32),
        mean,
        scale,
        shift,
        residual_ptr if residual_ptr is None else residual_ptr + start,
        y_ptr + start,
        mask_ptr if mask_ptr is None else mask_ptr + start // 8,
        offsets,
        mask,
        negative_slope,
        ACTIVATION,
    )


@triton.jit
def walk_normalize(
    x_ptr: tl.tensor,  # (N, C, L)
    residual_ptr: tl.tensor,  # (N, C, L) or None
    y_ptr: tl.tensor,  # (N, C, L)
    mask_ptr: tl.tensor,  # uint8 or None
    mean: tl.tensor,  # (BLOCK_C,), as the next two
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
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Does some tiles of some channels, the last one first, for the regimes of one launch."""
    for step in range(first_tile, end_tile):
        tile = end_tile - 1 - (step - first_tile)
        offsets, mask, _ = tile_offsets(tile, offs_c, N, C, L, BLOCK_N, BLOCK_L, WIDE, False)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        write_output(
            x.to(tl.float32),
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
        )


def launch_normalize(
    forward: Forward, mean: Tensor, rstd: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor | None]:
    """Computes y = act((x - mean) * rstd * weight + bias + residual).

    Args:
        forward: the tensors and the activation.
        mean: (C,) fp32.
        rstd: (C,) fp32, 1 / sqrt(var + eps).
        schedule: of the shape and layout of x.

    Returns:
        y, and the mask of the derivative or None.
    """
    y, mask = forward.new_outputs()
    _bn_forward_normalize_kernel[schedule.flat_grid](
        **forward.elementwise,
        **schedule.flat,
        mean_ptr=mean,
        rstd_ptr=rstd,
        y_ptr=y,
        mask_ptr=mask,
    )
    return y, mask
