"""The stages of a BatchNorm whose batch is split across ranks, under the names of ATen's ops.

    batch_norm_stats                     x -> mean, sqrt(M2) and count of this rank's part
    batch_norm_gather_stats_with_counts  those of all ranks -> mean, M2 and count of the whole batch
    batch_norm_elemt                     y = act((x - mean) * rstd * weight + bias + residual)
    batch_norm_backward_reduce           sum g and sum g * x_hat of this rank's part
    batch_norm_backward_elemt            those sums over the whole batch -> dx and dresidual

with M2 = sum (x - mean)^2, g = dy * act'(z) and x_hat = (x - mean) * rstd.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1 and section 3; Chan, Golub & LeVeque
1983, "Algorithms for computing the sample variance", equations 2.1.

Each function takes `triton`, the result of `dispatch.uses_triton`. If it is False, the stage runs
as composite torch ops, which a compiler fuses. If it is True, the stage is one op around the
launchers of stats.py, normalize.py and backward.py. No stage is differentiable: the gradient needs
communication between the ranks, and sync_autograd.py has it.

The compute dtype is fp32, or fp64 for an fp64 x without Triton. Shapes: N batch, C channels,
L flattened space, R ranks. "Dense" means contiguous or channels-last.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_lightning.kernels import reference
from bn_lightning.kernels.activations import activate, upper_branch
from bn_lightning.kernels.arguments import BACKWARD_SCHEMA, Backward, BackwardNeeds, Forward
from bn_lightning.kernels.dispatch import check_device, schedule_of
from bn_lightning.kernels.layout import as_layout, is_channels_last
from bn_lightning.kernels.ops import or_empty
from bn_lightning.kernels.planned_stage import run_stage

# A count travels as two numbers below 2^24, because fp32 holds each of them exactly.
_HALF = 1 << 24


class BatchStatistics(NamedTuple):
    """Statistics of the whole batch, in fp64.

    Attributes:
        mean: (C,).
        m2: (C,), sum (x - mean)^2.
        total_count: scalar, values per channel on all ranks together.
    """

    mean: Tensor
    m2: Tensor
    total_count: Tensor


def batch_norm_stats(x: Tensor, triton: bool) -> Tensor:
    """Compute the mean, the root of M2 = sum (x - mean)^2 and the count of each channel.

    The root is returned because M2 of values near 1e30 overflows fp32.

    Args:
        x: (N, C, ...), dense; may be empty if `triton` is False.
        triton: whether to run the Triton kernels.

    Returns:
        (2 * C + 2,) in the compute dtype: the means, the roots of M2, and the number of values per
        channel as count // 2^24 and count % 2^24. One tensor, so that one collective sends it.
    """
    if triton:
        return torch.ops.bn_lightning.batch_norm_stats(x)
    dtype = reference.compute_dtype(x.dtype)
    if x.numel() == 0:
        return x.new_zeros(2 * x.shape[1] + 2, dtype=dtype)
    count = x.numel() // x.shape[1]
    dims = [d for d in range(x.dim()) if d != 1]
    var_C, mean_C = torch.var_mean(x.to(dtype), dims, correction=0)
    halves = [mean_C.new_full((1,), half) for half in divmod(count, _HALF)]
    return torch.cat([mean_C, (var_C * count).sqrt(), *halves])


def batch_norm_gather_stats_with_counts(parts: Tensor) -> BatchStatistics:
    """Combine the results of `batch_norm_stats` of all ranks.

        n = sum n_r,  mean = sum n_r / n mean_r,  M2 = sum M2_r + n_r (mean_r - mean)^2

    The arithmetic is in fp64 and in the order of the ranks, so every rank gets the same bits.
    A rank without values has weight zero.

    Args:
        parts: (R, 2 * C + 2), in the compute dtype.

    Source: Chan, Golub & LeVeque 1983, equations 2.1, generalized to R parts.
    """
    C = parts.shape[1] // 2 - 1
    mean_RC, root_RC, high_R1, low_R1 = parts.double().split([C, C, 1, 1], dim=1)
    count_R1 = high_R1 * _HALF + low_R1
    total_count = count_R1.sum()
    mean_C = (mean_RC * (count_R1 / total_count.clamp(min=1.0))).sum(dim=0)
    deviation_RC = mean_RC - mean_C
    m2_C = (root_RC * root_RC + count_R1 * deviation_RC * deviation_RC).sum(dim=0)
    return BatchStatistics(mean_C, m2_C, total_count)


def batch_norm_elemt(
    call: Forward, mean: Tensor, rstd: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Compute y = act((x - mean) * rstd * weight + bias + residual), rounded once.

    Args:
        call: the tensors, with a dense x, and the activation.
        mean: (C,) in the compute dtype.
        rstd: (C,) in the compute dtype, 1 / sqrt(var + eps).
        triton: whether to run the Triton kernels.

    Returns:
        y, with the shape, dtype and strides of x; the mask, uint8 of `mask_shape`, or (0,) if
        `call.writes_mask` is False.
    """
    if triton:
        return torch.ops.bn_lightning.batch_norm_elemt(mean, rstd, *call)
    x, activation = call.x, call.activation
    z = reference.apply_normalization(x.to(mean.dtype), mean, rstd, call.weight, call.bias)
    if call.residual is not None:
        z = z + call.residual.to(mean.dtype)
    y = z if activation == "identity" else activate(z, activation, call.negative_slope)
    mask = None
    if call.writes_mask:
        mask = reference.pack_mask(upper_branch(z, activation), is_channels_last(x))
    return y.to(x.dtype), or_empty(mask, x)


def batch_norm_backward_reduce(call: Backward, triton: bool) -> Tensor:
    """Compute sum g and sum g * x_hat of each channel.

    Args:
        call: the tensors and the activation; x is not None.
        triton: whether to run the Triton kernels.

    Returns:
        (2, C) in the compute dtype: dbias and dweight of this rank's part.
    """
    if triton:
        return torch.ops.bn_lightning.batch_norm_backward_reduce(*call)
    g = reference.gradient_of_z(call)
    return torch.stack([reference.channel_sum(g), reference.channel_sum(g * _x_hat(call))])


def batch_norm_backward_elemt(
    call: Backward, needs: BackwardNeeds, means: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Compute dresidual = g and dx = weight * rstd * (g - mean g - x_hat * mean(g * x_hat)).

    Args:
        call: the tensors and the activation; x is not None.
        needs: whether to compute dx and dresidual.
        means: (2, C) in the compute dtype: the results of `batch_norm_backward_reduce` summed over
            the ranks and divided by the number of values per channel on all ranks together.
        triton: whether to run the Triton kernels.

    Returns:
        dx and dresidual, with the shape, dtype and strides of x; each is (0,) if not needed.
    """
    if triton:
        return torch.ops.bn_lightning.batch_norm_backward_elemt(
            means, needs.dx, needs.dresidual, *call
        )
    g = reference.gradient_of_z(call)
    dx = dresidual = g.new_empty(0)
    if needs.dx:
        mean_g, mean_gx = (reference.as_channels(mean_C, g) for mean_C in means)
        rstd, weight = call.rstd, call.weight
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        dx = (g - mean_g - _x_hat(call) * mean_gx) * reference.as_channels(scale, g)
    if needs.dresidual:
        dresidual = g
    return dx.to(call.dy.dtype), dresidual.to(call.dy.dtype)


def _x_hat(call: Backward) -> Tensor:
    x: Any = call.x
    return reference.apply_normalization(x.to(call.mean.dtype), call.mean, call.rstd, None, None)


def _stats(x: Tensor) -> Tensor:
    from bn_lightning.kernels.stats import compute_partials, merge_partials

    check_device(x)
    channels_last = is_channels_last(x)
    x = as_layout(x, channels_last)
    schedule = schedule_of(x, channels_last)

    def launch() -> tuple[Tensor]:
        packed = _fake_stats(x)
        mean, root, _ = packed.split([schedule.C, schedule.C, 2])
        merge_partials(compute_partials(x, schedule), mean, root, schedule)
        return (packed,)

    with torch.cuda.device_of(x):
        packed: Any = run_stage("stats", (x,), launch)[0]
    for half, value in zip(
        packed[-2:].unbind(), divmod(schedule.values_per_channel, _HALF), strict=True
    ):
        half.fill_(value)
    return packed


def _fake_stats(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.shape[1] + 2, dtype=torch.float32)


def _elemt(mean: Tensor, rstd: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from bn_lightning.kernels.normalize import launch_normalize

    call = Forward(*arguments)
    check_device(call.x)
    channels_last = is_channels_last(call.x)
    call = call.in_layout(channels_last)
    schedule = schedule_of(call.x, channels_last, writes_mask=call.writes_mask)
    tensors = (mean, rstd, *call[:4])
    with torch.cuda.device_of(call.x):
        y, mask = run_stage(
            ("elemt", *call[4:]), tensors, lambda: launch_normalize(call, mean, rstd, schedule)
        )
    return or_empty(y, call.x), or_empty(mask, call.x)


def _fake_elemt(mean: Tensor, rstd: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = Forward(*arguments)
    y, mask = call.in_layout(is_channels_last(call.x)).new_outputs()
    return y, or_empty(mask, y)


def _backward_reduce(*arguments: Any) -> Tensor:
    from bn_lightning.kernels.backward import affine_gradients

    call = Backward(*arguments).in_layout()
    check_device(call.dy)
    schedule = schedule_of(call.dy, call.channels_last, reads_mask=call.mask is not None)
    with torch.cuda.device_of(call.dy):
        sums: Any = run_stage(
            ("backward_reduce", *call[9:]), call[:9], lambda: affine_gradients(call, schedule)
        )
    dweight_C, dbias_C = sums
    return torch.stack([dbias_C, dweight_C])


def _fake_backward_reduce(*arguments: Any) -> Tensor:
    mean = Backward(*arguments).mean
    return mean.new_empty((2, mean.numel()))


def _backward_elemt(
    means: Tensor, needs_dx: bool, needs_dresidual: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    from bn_lightning.kernels.backward import input_gradients

    call = Backward(*arguments).in_layout()
    check_device(call.dy)
    schedule = schedule_of(call.dy, call.channels_last, reads_mask=call.mask is not None)
    needs = BackwardNeeds(training=True, dx=needs_dx, affine=False, dresidual=needs_dresidual)
    # The kernel divides by the count of this rank's part.
    sums = means * schedule.values_per_channel

    def launch() -> tuple[Tensor | None, Tensor | None]:
        dbias_C, dweight_C = sums
        return input_gradients(call, needs, dweight_C, dbias_C, schedule)

    with torch.cuda.device_of(call.dy):
        name = ("backward_elemt", needs, *call[9:])
        dx, dresidual = run_stage(name, (sums, *call[:9]), launch)
    return or_empty(dx, call.dy), or_empty(dresidual, call.dy)


def _fake_backward_elemt(
    means: Tensor, needs_dx: bool, needs_dresidual: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    call = Backward(*arguments).in_layout()
    needs = BackwardNeeds(training=True, dx=needs_dx, affine=False, dresidual=needs_dresidual)
    dx, dresidual = call.new_gradients(needs)
    return or_empty(dx, call.dy), or_empty(dresidual, call.dy)


_LIBRARY = torch.library.Library("bn_lightning", "FRAGMENT")
_LIBRARY.define("batch_norm_stats(Tensor x) -> Tensor")
_LIBRARY.define(
    "batch_norm_elemt(Tensor mean, Tensor rstd, Tensor x, Tensor? residual, Tensor? weight, "
    "Tensor? bias, str activation, float negative_slope, bool writes_mask) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"batch_norm_backward_reduce({BACKWARD_SCHEMA}) -> Tensor")
_LIBRARY.define(
    "batch_norm_backward_elemt(Tensor means, bool needs_dx, bool needs_dresidual, "
    f"{BACKWARD_SCHEMA}) -> (Tensor, Tensor)"
)
for _name, _kernel, _fake in (
    ("batch_norm_stats", _stats, _fake_stats),
    ("batch_norm_elemt", _elemt, _fake_elemt),
    ("batch_norm_backward_reduce", _backward_reduce, _fake_backward_reduce),
    ("batch_norm_backward_elemt", _backward_elemt, _fake_backward_elemt),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"bn_lightning::{_name}", _fake, lib=_LIBRARY)
