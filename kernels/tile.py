"""One tile: where its elements are in memory, and the arithmetic of each element.

    z = (x - mean) * scale + shift + residual,  y = act(z),  g = dy * act'(z)

with scale = rstd * weight and shift = bias. All arithmetic is in fp32 and is rounded at the store.

Shapes: N batch, C channels, L flattened space. A tensor is (N, C, L) in memory; a channels-last one
is (N * L, C, 1), so the same addressing serves both layouts. A tile is BLOCK_N x BLOCK_C x BLOCK_L,
or has its channels first.

`mask_ptr` is the mask of the derivative, which a forward saves for its backward. The masks of loads
and stores are called `inside` for a tile and `mask_c` for channels.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4; the activations are
those of activations.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from bn_lightning.kernels.arguments import BackwardTensors, ChannelTensors, ForwardTensors
from bn_lightning.kernels.schedule import Tiling


class Tile(NamedTuple):
    """The elements of a tile.

    Attributes:
        start: a multiple of 8, from the start of the tensor; separate, so that `offsets` fit int32.
        offsets: of the elements, from `start`.
        inside: whether each element is part of the tensor.
    """

    start: tl.tensor
    offsets: tl.tensor
    inside: tl.tensor


class ChannelValues(NamedTuple):
    """The per-channel values that an element needs, fp32, of a shape that broadcasts to the tile.

    Attributes:
        mean: of the batch, or the running one.
        rstd: 1 / sqrt(var + eps).
        scale: rstd * weight.
        shift: bias.
    """

    mean: tl.tensor
    rstd: tl.tensor
    scale: tl.tensor
    shift: tl.tensor


@triton.jit
def _count_blocks(size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return size / BLOCK, rounded up; unlike in tl.cdiv, no intermediate exceeds `size`, >= 1."""
    return (size - 1) // BLOCK + 1


@triton.jit
def locate_tile(
    number: tl.tensor,  # of the tile: blocks of positions within blocks of samples
    offs_c: tl.tensor,  # (BLOCK_C,)
    tiling: Tiling,
    CHANNELS_FIRST: tl.constexpr,
) -> tuple[Tile, tl.tensor]:
    """Return the elements of a tile, and how many values of a channel it has."""
    tiles_l = _count_blocks(tiling.L, tiling.BLOCK_L)
    start_n = number // tiles_l
    start_l = number % tiles_l
    if tiling.WIDE:
        # Before the multiplication: the last tile may reach beyond 2^31.
        start_n = start_n.to(tl.int64)
        start_l = start_l.to(tl.int64)
    start_n *= tiling.BLOCK_N
    start_l *= tiling.BLOCK_L
    offs_n = start_n + tl.arange(0, tiling.BLOCK_N)
    offs_l = start_l + tl.arange(0, tiling.BLOCK_L)
    if CHANNELS_FIRST:
        n, c = offs_n[None, :, None], offs_c[:, None, None]
    else:
        n, c = offs_n[:, None, None], offs_c[None, :, None]
    inside = (n < tiling.N) & (c < tiling.C) & (offs_l < tiling.L)[None, None, :]
    offsets = (n * tiling.C + c) * tiling.L + offs_l[None, None, :]
    count_n = tl.minimum(tiling.N - start_n, tiling.BLOCK_N)
    count_l = tl.minimum(tiling.L - start_l, tiling.BLOCK_L)
    return Tile(0, offsets, inside), (count_n * count_l).to(tl.float32)


@triton.jit
def count_tiles(tiling: Tiling) -> tl.tensor:
    """Return the number of tiles of a block of channels."""
    return _count_blocks(tiling.N, tiling.BLOCK_N) * _count_blocks(tiling.L, tiling.BLOCK_L)


@triton.jit
def sum_rows(values: tl.tensor) -> tl.tensor:
    """Sum a tile that has its channels first to (BLOCK_C,), in one reduction."""
    BLOCK_C: tl.constexpr = values.shape[0]
    return tl.sum(values.reshape((BLOCK_C, values.numel // BLOCK_C)), axis=1)


@triton.jit
def sum_channels(values: tl.tensor) -> tl.tensor:
    """Sum a tile to (BLOCK_C,)."""
    if values.shape[2] == 1:
        # Keeps the layout of the tile's channels across threads.
        return tl.sum(tl.sum(values, axis=2), axis=0)
    else:
        return sum_rows(tl.permute(values, (1, 0, 2)))


@triton.jit
def as_tile(value_C: tl.tensor) -> tl.tensor:
    """Reshape (BLOCK_C,) so that it broadcasts to a tile."""
    return value_C[None, :, None]


@triton.jit
def channels_as_tile(channels: ChannelValues) -> ChannelValues:
    """Reshape (BLOCK_C,) values so that they broadcast to a tile."""
    return ChannelValues(
        as_tile(channels.mean),
        as_tile(channels.rstd),
        as_tile(channels.scale),
        as_tile(channels.shift),
    )


@triton.jit
def load_channels(tensors: ChannelTensors, offs_c: tl.tensor, mask_c: tl.tensor) -> ChannelValues:
    """Load the values of some channels."""
    mean = tl.load(tensors.mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(tensors.rstd_ptr + offs_c, mask=mask_c, other=0.0)
    return make_channels(mean, rstd, tensors, offs_c, mask_c)


@triton.jit
def make_channels(
    mean: tl.tensor,
    rstd: tl.tensor,
    tensors: ChannelTensors,
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> ChannelValues:
    """Load weight and bias, and put them together with the mean and rstd at hand."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if tensors.weight_ptr is not None:
        weight = tl.load(tensors.weight_ptr + offs_c, mask=mask_c, other=0.0)
        scale = rstd * weight.to(tl.float32)
    if tensors.bias_ptr is not None:
        shift = tl.load(tensors.bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return ChannelValues(mean, rstd, scale, shift)


@triton.jit
def load_tile(ptr: tl.tensor, tile: Tile, EVICTION: tl.constexpr) -> tl.tensor:
    """Load the elements of a tile in fp32, with 0 outside the tensor."""
    return tl.load(
        ptr + tile.start + tile.offsets, mask=tile.inside, other=0.0, eviction_policy=EVICTION
    ).to(tl.float32)


@triton.jit
def store_tile(ptr: tl.tensor, tile: Tile, values: tl.tensor) -> None:
    """Store the elements of a tile that are inside the tensor."""
    tl.store(ptr + tile.start + tile.offsets, values, mask=tile.inside)


@triton.jit
def write_output(
    x: tl.tensor, channels: ChannelValues, tensors: ForwardTensors, tile: Tile
) -> None:
    """Store y and, if there is a `mask_ptr`, the mask of the derivative.

    Bit i of byte b of the mask belongs to the element at offset 8 b + i. With a mask, eight
    consecutive elements of the flattened tile are neighbours in memory from a multiple of 8 on, and
    all of them are inside the tensor or none.
    """
    shift = channels.shift
    if tensors.residual_ptr is not None:
        shift += load_tile(tensors.residual_ptr, tile, "evict_first")
    z = tl.fma(x - channels.mean, channels.scale, shift)
    store_tile(tensors.y_ptr, tile, apply_activation(z, tensors.negative_slope, tensors.ACTIVATION))
    if tensors.mask_ptr is not None:
        groups: tl.constexpr = z.numel // 8
        upper = on_upper_branch(z, tensors.ACTIVATION).to(tl.int32).reshape((groups, 8))
        packed = tl.sum(upper << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)
        first = tl.min(tile.offsets.broadcast_to(z.shape).reshape((groups, 8)), axis=1)
        inside = tile.inside.broadcast_to(z.shape).to(tl.int32).reshape((groups, 8))
        mask_ptr = tensors.mask_ptr + tile.start // 8
        tl.store(mask_ptr + first // 8, packed, mask=tl.max(inside, axis=1) > 0)


@triton.jit
def load_gradient(
    x: tl.tensor,  # fp32; not used if z is not needed
    channels: ChannelValues,
    tensors: BackwardTensors,
    tile: Tile,
    EVICTION: tl.constexpr,
) -> tl.tensor:
    """Load dy and return g = dy * act'(z), from the mask, else from y, else from z."""
    dy = load_tile(tensors.dy_ptr, tile, EVICTION)
    if tensors.ACTIVATION == "identity":
        return dy
    elif tensors.mask_ptr is not None:
        mask_ptr = tensors.mask_ptr + tile.start // 8
        byte = tl.load(mask_ptr + tile.offsets // 8, mask=tile.inside, other=0).to(tl.int32)
        upper = (byte >> (tile.offsets % 8).to(tl.int32)) & 1
        return choose_branch(dy, upper != 0, tensors.negative_slope, tensors.ACTIVATION)
    elif tensors.y_ptr is not None:
        y = load_tile(tensors.y_ptr, tile, EVICTION)
        return multiply_derivative_of_output(dy, y, tensors.ACTIVATION)
    else:
        shift = channels.shift
        if tensors.residual_ptr is not None:
            shift += load_tile(tensors.residual_ptr, tile, EVICTION)
        z = tl.fma(x - channels.mean, channels.scale, shift)
        return multiply_derivative(dy, z, tensors.negative_slope, tensors.ACTIVATION)


@triton.jit
def expm1(z: tl.tensor) -> tl.tensor:
    """Return exp(z) - 1, near 0 by its Taylor series, whose error is 0.5^8 / 9! = 1e-8."""
    series = tl.fma(z, 1.0 / 40320.0, 1.0 / 5040.0)
    series = tl.fma(series, z, 1.0 / 720.0)
    series = tl.fma(series, z, 1.0 / 120.0)
    series = tl.fma(series, z, 1.0 / 24.0)
    series = tl.fma(series, z, 1.0 / 6.0)
    series = tl.fma(series, z, 0.5)
    return tl.where(tl.abs(z) < 0.5, tl.fma(series * z, z, z), tl.exp(z) - 1.0)


@triton.jit
def tanh(z: tl.tensor) -> tl.tensor:
    """Return tanh(z) = 1 - 2 / (e^2z + 1), near 0 by Lambert's continued fraction up to z^2 / 9.

    The error of the continued fraction is below 3e-10.
    """
    square = z * z
    small = square * (315.0 + 14.0 * square) / (945.0 + square * (420.0 + 15.0 * square))
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.55, z - z * small, tl.where(z < 0.0, -large, large))


@triton.jit
def tanh_softplus(z: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return t = tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2) with n = e^z, and 1 - t^2."""
    # From 20 on the result is 1 in fp32; n^4 must be finite.
    n = tl.exp(tl.where(z > 20.0, 20.0, z))
    d = n * (n + 2.0) + 2.0
    cosine = 2.0 * (n + 1.0) / d
    return n * (n + 2.0) / d, cosine * cosine


@triton.jit
def gelu_tanh_argument(z: tl.tensor) -> tl.tensor:
    """Return twice the argument u of the tanh: (1 + tanh u) / 2 = sigmoid(2 u) cancels nothing."""
    u = 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 sqrt(2 / pi)
    # Beyond 80 the sigmoid is 0 or 1 in fp32; e^u must be finite.
    return tl.where(u > 80.0, 80.0, tl.where(u < -80.0, -80.0, u))


@triton.jit
def apply_activation(
    z: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """Return act(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z < 0.0, z * negative_slope, z)
    elif ACTIVATION == "elu":
        return tl.where(z > 0.0, z, expm1(z))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 1 / sqrt(2)
    elif ACTIVATION == "gelu_tanh":
        return z / (1.0 + tl.exp(-gelu_tanh_argument(z)))
    elif ACTIVATION == "hardswish":
        three = z + 3.0
        return z * tl.where(three < 0.0, 0.0, tl.where(three > 6.0, 6.0, three)) / 6.0
    elif ACTIVATION == "mish":
        t, _ = tanh_softplus(z)
        return z * t
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def multiply_derivative(
    dy: tl.tensor,
    z: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """Return dy * act'(z), where act has a kink as torch does."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6" or ACTIVATION == "leaky_relu":
        return choose_branch(dy, on_upper_branch(z, ACTIVATION), negative_slope, ACTIVATION)
    elif ACTIVATION == "elu":
        return tl.where(z > 0.0, dy, dy * tl.exp(z))
    elif ACTIVATION == "silu":
        return dy * (tl.sigmoid(z) * (1.0 + z * tl.sigmoid(-z)))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
        return dy * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "gelu_tanh":
        u = gelu_tanh_argument(z)
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * z * z)
        return dy * (tl.sigmoid(u) * (1.0 + z * slope * tl.sigmoid(-u)))
    elif ACTIVATION == "hardswish":
        inner = tl.where(z < 3.0, dy * (z / 3.0 + 0.5), dy)
        return tl.where(z <= -3.0, 0.0, inner)
    elif ACTIVATION == "mish":
        t, rest = tanh_softplus(z)
        return dy * (t + z * tl.sigmoid(z) * rest)
    elif ACTIVATION == "sigmoid":
        return dy * (tl.sigmoid(z) * tl.sigmoid(-z))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        # 1 - tanh^2, in a form that cancels nothing.
        e = tl.exp(-2.0 * tl.abs(z))
        return dy * (4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def multiply_derivative_of_output(
    dy: tl.tensor, y: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """Return dy * act'(z) for an activation whose derivative is a function of y."""
    if ACTIVATION == "elu":
        return tl.where(y > 0.0, dy, dy * (y + 1.0))
    elif ACTIVATION == "sigmoid":
        return dy * (y * (1.0 - y))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return dy * ((1.0 - y) * (1.0 + y))


@triton.jit
def on_upper_branch(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return where the derivative of a piecewise linear activation is 1."""
    if ACTIVATION == "relu6":
        return (z > 0.0) & (z < 6.0)
    else:
        return z > 0.0


@triton.jit
def choose_branch(
    dy: tl.tensor,
    upper: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """Return dy * act'(z) for a piecewise linear activation."""
    # Not a product with 0, because an infinite dy must not become NaN.
    if ACTIVATION == "leaky_relu":
        return tl.where(upper, dy, dy * negative_slope)
    else:
        return tl.where(upper, dy, 0.0)
