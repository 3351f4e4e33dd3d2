"""The activations and their derivatives, of an element.

    y = act(z),  g = dy * act'(z)

All arithmetic is in fp32. The functions are those of the table in activations.py; a test compares
the two.
"""

import triton
import triton.language as tl


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
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
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
def derivative_is_finite(ACTIVATION: tl.constexpr) -> tl.constexpr:
    """Return whether act'(z) is one of two constants, so that 0 * act'(z) is 0 even for NaN."""
    return (
        ACTIVATION == "identity"
        or ACTIVATION == "relu"
        or ACTIVATION == "relu6"
        or ACTIVATION == "leaky_relu"
    )


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
