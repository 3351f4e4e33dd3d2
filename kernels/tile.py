"""What kernels do with one tile: where its elements lie, and the arithmetic of each element.

    z = (x - mean) * scale + shift + residual,  y = act(z),  g = dy * act'(z)

with scale = rstd * weight and shift = bias. Everything in fp32, rounded at the store.

Shapes: N batch, C channels, L flattened space. A tensor is (N, C, L) in memory; channels-last is
(N * L, C, 1), so that one addressing serves both layouts. A tile is BLOCK_N x BLOCK_C x BLOCK_L, or
has its channels first.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4; the activations are
those of activations.py.
"""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(
    tile: tl.tensor,  # number of the tile: blocks of positions within blocks of samples
    offs_c: tl.tensor,  # (BLOCK_C,)
    N: tl.tensor,
    C: tl.tensor,
    L: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDE: tl.constexpr,  # whether an offset may pass 2^31
    CHANNELS_FIRST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns offsets and mask of a tile, and how many values of a channel it holds."""
    tiles_l = tl.cdiv(L, BLOCK_L)
    start_n = tile // tiles_l * BLOCK_N
    start_l = tile % tiles_l * BLOCK_L
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_l = start_l + tl.arange(0, BLOCK_L)
    if CHANNELS_FIRST:
        n, c = offs_n[None, :, None], offs_c[:, None, None]
    else:
        n, c = offs_n[:, None, None], offs_c[None, :, None]
    mask = (n < N) & (c < C) & (offs_l < L)[None, None, :]
    if WIDE:
        n = n.to(tl.int64)
    offsets = (n * C + c) * L + offs_l[None, None, :]
    count = tl.minimum(N - start_n, BLOCK_N) * tl.minimum(L - start_l, BLOCK_L)
    return offsets, mask, count.to(tl.float32)


@triton.jit
def row_sum(values: tl.tensor) -> tl.tensor:
    """Sums a tile that has its channels first to (BLOCK_C,), in one reduction."""
    BLOCK_C: tl.constexpr = values.shape[0]
    return tl.sum(values.reshape((BLOCK_C, values.numel // BLOCK_C)), axis=1)


@triton.jit
def channel_sum(values: tl.tensor) -> tl.tensor:
    """Sums a tile to (BLOCK_C,)."""
    if values.shape[2] == 1:
        # The result lies in the threads as the channels of the tile do.
        return tl.sum(tl.sum(values, axis=2), axis=0)
    else:
        return row_sum(tl.permute(values, (1, 0, 2)))


@triton.jit
def as_tile(value_C: tl.tensor) -> tl.tensor:
    """Shapes (BLOCK_C,) so that it broadcasts against a tile."""
    return value_C[None, :, None]


@triton.jit
def load_channels(
    mean_ptr: tl.tensor,  # (C,) fp32
    rstd_ptr: tl.tensor,  # (C,) fp32
    weight_ptr: tl.tensor,  # (C,) or None for ones
    bias_ptr: tl.tensor,  # (C,) or None for zeros
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns mean, rstd, scale = rstd * weight and shift = bias."""
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    scale, shift = scale_shift(rstd, weight_ptr, bias_ptr, offs_c, mask_c)
    return mean, rstd, scale, shift


@triton.jit
def scale_shift(
    rstd: tl.tensor,
    weight_ptr: tl.tensor,  # (C,) or None for ones
    bias_ptr: tl.tensor,  # (C,) or None for zeros
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns scale = rstd * weight and shift = bias."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def write_output(
    x: tl.tensor,  # fp32
    mean: tl.tensor,  # these three broadcast against x
    scale: tl.tensor,
    shift: tl.tensor,
    residual_ptr: tl.tensor,  # or None
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,  # uint8, bit i of byte b for the element at 8 b + i, or None
    offsets: tl.tensor,
    mask: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> None:
    """Stores act((x - mean) * scale + shift + residual), and the bits of its derivative.

    With bits, eight consecutive elements of the flattened tile lie side by side in memory from a
    multiple of 8 on, and are inside the tensor or outside it together.
    """
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
        )
        shift += residual.to(tl.float32)
    z = tl.fma(x - mean, scale, shift)
    tl.store(y_ptr + offsets, activate(z, negative_slope, ACTIVATION), mask=mask)
    if mask_ptr is not None:
        groups: tl.constexpr = z.numel // 8
        bits = upper_branch(z, ACTIVATION).to(tl.int32).reshape((groups, 8))
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], axis=1)
        first = tl.min(offsets.broadcast_to(z.shape).reshape((groups, 8)), axis=1)
        inside = tl.max(mask.broadcast_to(z.shape).to(tl.int32).reshape((groups, 8)), axis=1)
        tl.store(mask_ptr + first // 8, packed.to(tl.uint8), mask=inside > 0)


@triton.jit
def load_gradient(
    dy_ptr: tl.tensor,
    x: tl.tensor,  # fp32; anything where z is not needed
    mean: tl.tensor,  # these three broadcast against x
    scale: tl.tensor,
    shift: tl.tensor,
    residual_ptr: tl.tensor,  # or None
    y_ptr: tl.tensor,  # or None
    mask_ptr: tl.tensor,  # or None
    offsets: tl.tensor,
    mask: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    EVICTION: tl.constexpr,
) -> tl.tensor:
    """Loads dy and returns g = dy * act'(z), from the bits, from y or from z, in this order."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    if ACTIVATION == "identity":
        return dy
    elif mask_ptr is not None:
        byte = tl.load(mask_ptr + offsets // 8, mask=mask, other=0).to(tl.int32)
        upper = (byte >> (offsets % 8).to(tl.int32)) & 1
        return choose_branch(dy, upper != 0, negative_slope, ACTIVATION)
    elif y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION)
        return multiply_derivative_of_output(dy, y.to(tl.float32), ACTIVATION)
    else:
        if residual_ptr is not None:
            residual = tl.load(
                residual_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION
            )
            shift += residual.to(tl.float32)
        z = tl.fma(x - mean, scale, shift)
        return multiply_derivative(dy, z, negative_slope, ACTIVATION)


@triton.jit
def expm1(z: tl.tensor) -> tl.tensor:
    """exp(z) - 1; near 0, where that cancels, its Taylor series: 0.5^8 / 9! is 1e-8."""
    series = tl.fma(z, 1.0 / 40320.0, 1.0 / 5040.0)
    series = tl.fma(series, z, 1.0 / 720.0)
    series = tl.fma(series, z, 1.0 / 120.0)
    series = tl.fma(series, z, 1.0 / 24.0)
    series = tl.fma(series, z, 1.0 / 6.0)
    series = tl.fma(series, z, 0.5)
    return tl.where(tl.abs(z) < 0.5, tl.fma(series * z, z, z), tl.exp(z) - 1.0)


@triton.jit
def tanh(z: tl.tensor) -> tl.tensor:
    """1 - 2 / (e^2z + 1); near 0, where that cancels, Lambert's continued fraction, cut after
    z^2 / 9: what is left is below 3e-10."""
    square = z * z
    small = square * (315.0 + 14.0 * square) / (945.0 + square * (420.0 + 15.0 * square))
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.55, z - z * small, tl.where(z < 0.0, -large, large))


@triton.jit
def tanh_softplus(z: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2) with n = e^z, and its 1 - t^2."""
    # Cut at 20, where the result is 1 in fp32 and n^4 is finite.
    n = tl.exp(tl.where(z > 20.0, 20.0, z))
    d = n * (n + 2.0) + 2.0
    cosine = 2.0 * (n + 1.0) / d
    return n * (n + 2.0) / d, cosine * cosine


@triton.jit
def gelu_tanh_argument(z: tl.tensor) -> tl.tensor:
    """Twice the argument u of the tanh: (1 + tanh u) / 2 is sigmoid(2 u), without a difference."""
    u = 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 sqrt(2 / pi)
    # Cut where the sigmoid is 0 or 1 in fp32 and e^u is finite.
    return tl.where(u > 80.0, 80.0, tl.where(u < -80.0, -80.0, u))


@triton.jit
def activate(
    z: tl.tensor,
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """act(z); a NaN stays one."""
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
    """dy * act'(z), with torch's choice at the kinks."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6" or ACTIVATION == "leaky_relu":
        return choose_branch(dy, upper_branch(z, ACTIVATION), negative_slope, ACTIVATION)
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
        # 1 - tanh^2, without a difference.
        e = tl.exp(-2.0 * tl.abs(z))
        return dy * (4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def multiply_derivative_of_output(
    dy: tl.tensor, y: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """dy * act'(z) for an activation whose derivative is a function of y."""
    if ACTIVATION == "elu":
        return tl.where(y > 0.0, dy, dy * (y + 1.0))
    elif ACTIVATION == "sigmoid":
        return dy * (y * (1.0 - y))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return dy * ((1.0 - y) * (1.0 + y))


@triton.jit
def upper_branch(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Where the derivative of a piecewise linear activation is 1."""
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
    """dy * act'(z) for a piecewise linear activation: dy on the upper branch, less on the lower."""
    # Not a product with 0: an infinite dy must not become NaN.
    if ACTIVATION == "leaky_relu":
        return tl.where(upper, dy, dy * negative_slope)
    else:
        return tl.where(upper, dy, 0.0)
