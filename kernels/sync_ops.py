"""The stages of a BatchNorm one by one, for a batch that lies on several ranks.

    local_statistics    x -> (mean, sqrt(M2), n) of this rank's part, in one tensor that can be sent
    combine_statistics  those of all ranks -> the mean, M2 and n of the whole batch
    normalize           x, mean, rstd -> y = act((x - mean) * rstd * weight + bias + residual)
    local_sums          dy and what was saved -> sum g and sum g * x_hat of this rank's part
    input_gradients     dy, what was saved, and their means over the whole batch -> dx, dresidual

with g = dy * act'(z), as in backward.py.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1 and section 3; Chan, Golub & LeVeque
1983, "Algorithms for computing the sample variance", equations 2.1.

Natively a stage is composite torch, which a compiler fuses; with Triton it is an op of its own,
with its fake beside it, around the launchers of statistics.py, normalize.py and backward.py.
Neither has a gradient: that goes through the ranks, and is in sync.py of the package above.

Both compute in fp32, natively fp64 in fp64; "the compute dtype" below. Shapes: N batch, C channels,
L flattened space, R ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_lightning.kernels import reference
from bn_lightning.kernels.activations import activate, upper_branch
from bn_lightning.kernels.arguments import BACKWARD_SCHEMA, Backward, BackwardNeeds, Forward
from bn_lightning.kernels.dispatch import (
    as_layout,
    check_device,
    is_channels_last,
    schedule_of,
)

# A count as two numbers below 2^24, each exact in fp32.
_HALF = 1 << 24


def as_dense(x: Tensor) -> Tensor:
    """Returns `x`, copied once if it is neither contiguous nor channels-last."""
    return x if is_channels_last(x) else x.contiguous()


def local_statistics(x: Tensor, triton: bool) -> Tensor:
    """Computes the mean and M2 = sum (x - mean)^2 of each channel.

    Args:
        x: (N, C, ...), dense; may be empty, natively.
        triton: from `dispatch.uses_triton`.

    Returns:
        (2 * C + 2,) in the compute dtype: the means, the roots of M2 (M2 of values near 1e30 is no
        fp32 number, its root is), and the count of values per channel as count // 2^24 and
        count % 2^24.
    """
    if triton:
        return torch.ops.bn_lightning.local_statistics(x)
    dtype = reference.compute_dtype(x.dtype)
    if x.numel() == 0:
        return x.new_zeros(2 * x.shape[1] + 2, dtype=dtype)
    count = x.numel() // x.shape[1]
    dims = [d for d in range(x.dim()) if d != 1]
    var_C, mean_C = torch.var_mean(x.to(dtype), dims, correction=0)
    halves = [mean_C.new_full((1,), half) for half in divmod(count, _HALF)]
    return torch.cat([mean_C, (var_C * count).sqrt(), *halves])


class BatchStatistics(NamedTuple):
    """Of the whole batch, in fp64.

    Attributes:
        mean: (C,).
        m2: (C,), sum (x - mean)^2.
        total: scalar, values per channel.
    """

    mean: Tensor
    m2: Tensor
    total: Tensor


def combine_statistics(parts: Tensor) -> BatchStatistics:
    """Combines what `local_statistics` found on each rank.

        n = sum n_r,  mean = sum n_r / n mean_r,  M2 = sum M2_r + n_r (mean_r - mean)^2

    In fp64, which costs little for a few numbers a channel, and in the order of the ranks: every
    rank finds the same bits. A part without values counts for nothing.

    Args:
        parts: (R, 2 * C + 2).

    Source: Chan, Golub & LeVeque 1983, equations 2.1, for R parts at once.
    """
    C = parts.shape[1] // 2 - 1
    mean_RC, root_RC, high_R1, low_R1 = parts.double().split([C, C, 1, 1], dim=1)
    count_R1 = high_R1 * _HALF + low_R1
    total = count_R1.sum()
    mean_C = (mean_RC * (count_R1 / total.clamp(min=1.0))).sum(dim=0)
    deviation_RC = mean_RC - mean_C
    m2_C = (root_RC * root_RC + count_R1 * deviation_RC * deviation_RC).sum(dim=0)
    return BatchStatistics(mean_C, m2_C, total)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    writes_mask: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Computes y = act((x - mean) * rstd * weight + bias + residual), rounded once.

    Args:
        x: (N, C, ...), dense.
        residual: as `x`, or None.
        mean: (C,) in the compute dtype.
        rstd: (C,) in the compute dtype, 1 / sqrt(var + eps).
        weight: (C,), any float dtype, or None for ones.
        bias: (C,), any float dtype, or None for zeros.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
        writes_mask: whether the backward will read mask of the derivative.
        triton: from `dispatch.uses_triton`.

    Returns:
        y, with shape, dtype and strides of `x`; the mask, (ceil(N * C * L / 8),) uint8 in the order
        of memory, or (0,).
    """
    options = (activation, negative_slope, writes_mask)
    if triton:
        return torch.ops.bn_lightning.normalize(x, residual, mean, rstd, weight, bias, *options)
    z = reference.normalize(x.to(mean.dtype), mean, rstd, weight, bias)
    if residual is not None:
        z = z + residual.to(mean.dtype)
    y = z if activation == "identity" else activate(z, activation, negative_slope)
    mask = x.new_empty(0, dtype=torch.uint8)
    if writes_mask:
        mask = reference.pack_mask(upper_branch(z, activation), is_channels_last(x))
    return y.to(x.dtype), mask


def local_sums(call: Backward, triton: bool) -> Tensor:
    """Computes sum g and sum g * x_hat of each channel.

    Args:
        call: the backward.
        triton: from `dispatch.uses_triton`.

    Returns:
        (2, C) in the compute dtype: this part's dbias and dweight.
    """
    if triton:
        return torch.ops.bn_lightning.local_sums(*call)
    g = reference.gradient_of_z(call)
    return torch.stack([reference.channel_sum(g), reference.channel_sum(g * _x_hat(call))])


def input_gradients(
    call: Backward, means: Tensor, needs_dx: bool, needs_dresidual: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    """Computes dresidual = g and dx = weight * rstd * (g - mean g - x_hat * mean(g * x_hat)).

    Args:
        call: the backward.
        means: (2, C) in the compute dtype: `local_sums` of all ranks over the values per channel of
            the whole batch.
        needs_dx: whether to compute dx.
        needs_dresidual: whether to compute dresidual.
        triton: from `dispatch.uses_triton`.

    Returns:
        dx and dresidual, with shape, dtype and strides of x; each (0,) where it is not needed.
    """
    if triton:
        return torch.ops.bn_lightning.input_gradients(*call, means, needs_dx, needs_dresidual)
    g = reference.gradient_of_z(call)
    dx = dresidual = g.new_empty(0)
    if needs_dx:
        mean_g, mean_gx = (reference.as_channels(mean_C, g) for mean_C in means)
        scale = call.rstd if call.weight is None else call.rstd * call.weight.to(call.rstd.dtype)
        dx = (g - mean_g - _x_hat(call) * mean_gx) * reference.as_channels(scale, g)
    if needs_dresidual:
        dresidual = g
    return dx.to(call.x.dtype), dresidual.to(call.x.dtype)


def _x_hat(call: Backward) -> Tensor:
    return reference.normalize(call.x.to(call.mean.dtype), call.mean, call.rstd, None, None)


_LIBRARY = torch.library.Library("bn_lightning", "FRAGMENT")
_LIBRARY.define("local_statistics(Tensor x) -> Tensor")
_LIBRARY.define(
    "normalize(Tensor x, Tensor? residual, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "str activation, float negative_slope, bool writes_mask) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"local_sums({BACKWARD_SCHEMA}) -> Tensor")
_LIBRARY.define(
    f"input_gradients({BACKWARD_SCHEMA}, Tensor means, bool needs_dx, bool needs_dresidual) "
    "-> (Tensor, Tensor)"
)


def _local_statistics(x: Tensor) -> Tensor:
    from bn_lightning.kernels import stats

    check_device(x)
    channels_last = is_channels_last(x)
    x = as_layout(x, channels_last)
    schedule = schedule_of(x, channels_last, False, False)
    packed = _fake_local_statistics(x)
    C = x.shape[1]
    for at, half in enumerate(divmod(schedule.values_per_channel, _HALF)):
        packed[2 * C + at].fill_(half)
    with torch.cuda.device_of(x):
        partials = stats.partial_statistics(x, schedule)
        stats.finish_partial(partials, packed[:C], packed[C : 2 * C], schedule)
    return packed


def _fake_local_statistics(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.shape[1] + 2, dtype=torch.float32)


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    writes_mask: bool,
) -> tuple[Tensor, Tensor]:
    from bn_lightning.kernels.normalize import launch_normalize

    check_device(x)
    channels_last = is_channels_last(x)
    call = Forward(x, residual, weight, bias, activation, negative_slope, writes_mask=writes_mask)
    call = call.in_layout(channels_last)
    schedule = schedule_of(call.x, channels_last, writes_mask, False)
    with torch.cuda.device_of(x):
        y, mask = launch_normalize(call, mean, rstd, schedule)
    return y, _no_mask(x) if mask is None else mask


def _fake_normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    writes_mask: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(as_layout(x, is_channels_last(x)))
    if not writes_mask:
        return y, _no_mask(x)
    return y, x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _no_mask(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _local_sums(*arguments: Any) -> Tensor:
    from bn_lightning.kernels.backward import affine_gradients

    call = Backward(*arguments).in_layout()
    check_device(call.dy)
    schedule = schedule_of(call.dy, call.channels_last, False, False)
    with torch.cuda.device_of(call.dy):
        dweight_C, dbias_C = affine_gradients(call, schedule)
    return torch.stack([dbias_C, dweight_C])


def _fake_local_sums(*arguments: Any) -> Tensor:
    mean = Backward(*arguments).mean
    return mean.new_empty((2, mean.numel()))


def _input_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    from bn_lightning.kernels.backward import input_gradients

    *backward, means, needs_dx, needs_dresidual = arguments
    call = Backward(*backward).in_layout()
    check_device(call.dy)
    needs = BackwardNeeds(training=True, dx=needs_dx, affine=True, dresidual=needs_dresidual)
    schedule = schedule_of(call.dy, call.channels_last, False, False)
    # The kernel divides by the count of its own tensor.
    dbias_C, dweight_C = (means * schedule.values_per_channel).unbind()
    with torch.cuda.device_of(call.dy):
        dx, dresidual = input_gradients(call, needs, dweight_C, dbias_C, schedule)
    nothing = call.dy.new_empty(0)
    return nothing if dx is None else dx, nothing.clone() if dresidual is None else dresidual


def _fake_input_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    *backward, _, needs_dx, needs_dresidual = arguments
    call = Backward(*backward)
    dy = as_layout(call.dy, call.channels_last)
    dx, dresidual = (
        torch.empty_like(dy) if needed else dy.new_empty(0)
        for needed in (needs_dx, needs_dresidual)
    )
    return dx, dresidual


for _name, _kernel, _fake in (
    ("local_statistics", _local_statistics, _fake_local_statistics),
    ("normalize", _normalize, _fake_normalize),
    ("local_sums", _local_sums, _fake_local_sums),
    ("input_gradients", _input_gradients, _fake_input_gradients),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"bn_lightning::{_name}", _fake, lib=_LIBRARY)
