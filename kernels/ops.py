"""Batch Normalization as PyTorch ops: ATen's, or custom ones around the Triton kernels.

Three ops in the namespace `bn_lightning`, each with its fake:

    batch_norm           called by the public function; it has a gradient and a vmap rule
    batch_norm_forward   x, parameters, statistics -> y, mean, rstd, mask; updates the statistics
    batch_norm_backward  dy and what was saved -> dx, dweight, dbias, dresidual

PyTorch registers no gradient for an op that writes into its arguments. `batch_norm` therefore has
its own kernel for the Autograd key: an autograd function around `batch_norm_forward`, which has no
gradient. Dynamo sees one op, and AOTAutograd traces through it.

For the backward are saved: x, fp32 mean and rstd, weight and bias, and with a residual what
activations.py lists. In evaluation and with frozen statistics, x is saved only if the activation or
dweight needs it.

Compiled graphs in users' caches call the ops by position, so the order of their arguments stays.

Triton is imported only inside the ops and by dispatch.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

from bn_lightning.kernels.activations import activate, saves_mask
from bn_lightning.kernels.arguments import (
    Backward,
    BatchNormArguments,
    Forward,
    RunningStatistics,
    split_residual,
)
from bn_lightning.kernels.autograd import BatchNormFunction, unpack_backward
from bn_lightning.kernels.checks import check_average, check_batch, check_choices, check_like_aten
from bn_lightning.kernels.dispatch import chooses_triton, is_recomputation
from bn_lightning.kernels.eager import NATIVE, is_observed, keep_plan, run_known, run_plan
from bn_lightning.kernels.layout import as_layout, is_channels_last, mask_shape
from bn_lightning.kernels.measurements import Fusion

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize each channel of `x`, add a residual and apply an activation.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with the mean and the biased variance of the batch in training, the running ones in evaluation.
    In training `running = (1 - momentum) * running + momentum * batch`, in place, with the unbiased
    variance of the batch. When activation checkpointing re-runs a forward, the running statistics
    are not updated again.

    The Triton kernels read contiguous and channels-last memory, and y has the layout of `x`. An `x`
    of other strides is copied once, and y is then contiguous. A residual or an upstream gradient in
    another layout than `x` is copied once. The kernels compute in fp32 and return the same bits for
    the same inputs. An empty `x` is always computed by ATen.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        weight: (C,) on the device of `x`, or None for ones.
        bias: (C,) on the device of `x`, or None for zeros.
        running_mean: (C,) on the device of `x`; required in evaluation.
        running_var: (C,), unbiased, on the device of `x`; required in evaluation.
        training: normalize by the statistics of the batch, and update the running ones if given.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average
            over all batches, which `num_batches_tracked` counts.
        eps: added to the variance, > 0.
        activation: "identity", "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh",
            "hardswish", "mish", "sigmoid" or "tanh".
        negative_slope: of "leaky_relu" below zero; the others ignore it.
        residual: added before the activation; with the shape and device of `x`. If its dtype is
            another one, sum and activation are not fused, and have the promoted dtype.
        num_batches_tracked: int64 scalar on the device of `x`, to which training adds one.
        backend: "native" for ATen; "triton" for the kernels: `x` in fp32, fp16 or bf16, parameters
            and statistics each in any float dtype; "auto" for the kernels where `x` is a CUDA or
            ROCm tensor of such a dtype, Triton is installed, and they cost less than ATen, as
            measured on the device or counted (kernels/cost.py); else ATen.

    Returns:
        y, with the shape and device of `x`, and its dtype or that of `x + residual`.

    Raises:
        ValueError: an unknown backend or activation; "triton" for a tensor it does not support; a
            residual of another shape; one value per channel in training; one running
            statistic without the other; `eps` not positive in training; `momentum` None without
            `num_batches_tracked`.
        RuntimeError: running statistics missing in evaluation; a per-channel tensor of another
            length than C; a tensor on another device.
        NotImplementedError: an `x` of integers.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """
    fused, added = residual, None
    if residual is not None and residual.dtype != x.dtype:
        check_choices(x, residual, activation, backend)
        fused, added = split_residual(x, residual)
    fields = (
        x,
        fused,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked if training else None,
        training,
        momentum,
        eps,
        activation if added is None else "identity",
        negative_slope,
    )
    y = None if is_compiling() else run_known(fields, backend)
    if y is None or y is NATIVE:
        a = BatchNormArguments._make(fields)
        y = _composite(a) if y is NATIVE else _batch_norm(a, backend)
    return y if added is None else activate(y + added, activation, negative_slope)


def _batch_norm(a: BatchNormArguments, backend: str) -> Tensor:
    """Compute a call of a kind that may be new, with a residual of the dtype of x or none."""
    if a.training and is_recomputation():
        a = _without_updates(a)
        y = run_known(a, backend, recomputes=True)
        if y is not None and y is not NATIVE:
            return y
    check_choices(a.x, a.residual, a.activation, backend)
    triton = chooses_triton(a.x, backend, Fusion(a.activation, a.residual is not None, a.training))
    if a.training and a.momentum is None:
        check_average(a.running_mean, a.num_batches_tracked)
    is_eager = not is_compiling()
    if not triton:
        if is_eager and backend == "auto" and a.x.is_cuda:
            keep_plan(a, backend, is_native=True)
        return _composite(a)
    check_like_aten(a.x, *a[2:6], a.training, a.eps)
    plan = keep_plan(a, backend, is_native=False) if is_eager else None
    if plan is not None:
        tensors = plan.pick_given(a)
        return run_plan(plan, a, tensors, tuple([t.data_ptr() for t in tensors]))
    if a.running_mean is None:
        a = a._replace(momentum=a.momentum or 0.0)
    return torch.ops.bn_lightning.batch_norm(*a)


def _without_updates(a: BatchNormArguments) -> BatchNormArguments:
    """Return the arguments of a training call that updates copies of the running statistics.

    Copies, because checkpointing needs as many saved tensors as the first time.
    """
    if a.momentum is None:
        check_average(a.running_mean, a.num_batches_tracked)
    mean, var = (None if v is None else v.clone() for v in (a.running_mean, a.running_var))
    return a._replace(running_mean=mean, running_var=var, num_batches_tracked=None, momentum=0.0)


def _composite(a: BatchNormArguments) -> Tensor:
    """Compute the whole with ATen's ops, which have derivatives of every kind.

    A cumulative average does not wait for the device to report its count.
    """
    tracked = a.num_batches_tracked
    cumulative = a.training and a.momentum is None
    if (
        cumulative
        and type(tracked) is Tensor
        and tracked.device.type == "cpu"
        and not (is_compiling() or is_observed())
    ):
        # torch's weight, to the bit.
        a = a._replace(momentum=1.0 / (tracked.item() + 1))
        cumulative = False
    batch_mean, batch_var = a.running_mean, a.running_var
    if cumulative and batch_mean is not None and batch_var is not None:
        batch_mean, batch_var = torch.zeros_like(batch_mean), torch.zeros_like(batch_var)
    factor = 1.0 if a.momentum is None else a.momentum
    try:
        y = F.batch_norm(a.x, batch_mean, batch_var, a.weight, a.bias, a.training, factor, a.eps)
    except ValueError:
        check_batch(a.x, a.training)
        raise
    if tracked is not None:
        tracked.add_(1)
    if cumulative and a.x.numel() > 0 and tracked is not None:
        for running, batch in ((a.running_mean, batch_mean), (a.running_var, batch_var)):
            if running is not None and batch is not None:
                precise = torch.promote_types(running.dtype, torch.float32)
                running.lerp_(batch, tracked.to(precise).reciprocal().to(running.dtype))
    if a.residual is not None:
        y = y + a.residual
    return y if a.activation == "identity" else activate(y, a.activation, a.negative_slope)


_LIBRARY = torch.library.Library("bn_lightning", "DEF")
_FORWARD_SCHEMA = (
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, "
    "float eps, str activation, float negative_slope"
)
_LIBRARY.define(f"batch_norm({_FORWARD_SCHEMA}) -> Tensor")
_LIBRARY.define(
    f"batch_norm_forward({_FORWARD_SCHEMA}, bool writes_mask) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor? x, Tensor? residual, Tensor? y, Tensor? mask, "
    "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool channels_last, bool training, "
    "float eps, str activation, float negative_slope, bool needs_dx, bool needs_affine, "
    "bool needs_dresidual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bn_lightning.kernels.launch import run_forward

    *fields, writes_mask = arguments
    a = BatchNormArguments(*fields)
    running = RunningStatistics(a.running_mean, a.running_var, a.num_batches_tracked, a.momentum)
    call = Forward(
        a.x, a.residual, a.weight, a.bias, a.activation, a.negative_slope, writes_mask=writes_mask
    )
    y, mask, mean, rstd = run_forward(call, running, a.eps, training=a.training)
    return y, mean, rstd, or_empty(mask, a.x)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, *_, writes_mask = arguments
    channels_last = is_channels_last(x)
    y = torch.empty_like(as_layout(x, channels_last))
    mean, rstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    shape = mask_shape(x.shape, channels_last)
    mask = x.new_empty(shape, dtype=torch.uint8) if writes_mask else None
    return y, mean, rstd, or_empty(mask, x)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bn_lightning.kernels.launch import run_backward

    call, needs, _ = unpack_backward(*arguments)
    return _backward_results(call, *run_backward(call, needs))


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, needs, _ = unpack_backward(*arguments)
    sums = call.new_sums() if needs.affine else (None, None)
    return _backward_results(call, *call.in_layout().new_gradients(needs), *sums)


def _backward_results(
    call: Backward,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `batch_norm_backward`, in its order."""
    likes = (call.dy, call.mean, call.mean, call.dy)
    dx, dweight, dbias, dresidual = map(or_empty, (dx, dweight, dbias, dresidual), likes)
    return dx, dweight, dbias, dresidual


def or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """Return `value`, or a tensor of shape (0,) for None, which an op cannot return."""
    return like.new_empty(0) if value is None else value


def _with_gradient(*arguments: Any) -> Tensor:
    """The Autograd kernel of `batch_norm`."""
    a = BatchNormArguments(*arguments)
    if _differentiates_otherwise(a.inputs):
        return _composite(a)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in a.inputs):
        return torch.ops.bn_lightning.batch_norm_forward(*a, False)[0]
    return BatchNormFunction.apply(*a, saves_mask(a.activation, a.residual is not None))[0]


def _differentiates_otherwise(inputs: list[Tensor]) -> bool:
    """Return whether torch.func or forward-mode differentiation is active.

    Autograd functions around Triton kernels support neither.
    """
    # torch.func has no public function that tells.
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(t).tangent is not None for t in inputs
    )


def _without_gradient(*arguments: Any) -> Tensor:
    """The CPU and CUDA kernel of `batch_norm`."""
    return _forward(*arguments, False)[0]


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped dimension into C: B BatchNorms of C channels are one of B * C."""
    a: Any = BatchNormArguments(*arguments)
    dims: Any = BatchNormArguments(*in_dims)
    B = info.batch_size

    def fold(value: Tensor | None, dim: int | None) -> Any:
        """(N, C, ...) with B anywhere, or without it, to (N, B * C, ...), and (C,) to (B * C,)."""
        if value is None:
            return None
        value = value.expand(B, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1) if value.dim() == 2 else value.movedim(0, 1).flatten(1, 2)

    updates = a.training and a.running_mean is not None
    if updates and (dims.running_mean is None or dims.running_var is None):
        raise RuntimeError(
            "expected `running_mean` and `running_var` to be mapped by vmap, because they are "
            "updated in place, got at least one that is not; pass in_dims for them, or None for "
            "both statistics"
        )
    if updates and a.momentum is None:
        raise RuntimeError("expected `momentum` to be a number under vmap, got None; pass one")
    folded: Any = a._replace(
        x=fold(a.x, dims.x),
        residual=fold(a.residual, dims.residual),
        weight=fold(a.weight, dims.weight),
        bias=fold(a.bias, dims.bias),
        running_mean=fold(a.running_mean, dims.running_mean),
        running_var=fold(a.running_var, dims.running_var),
        num_batches_tracked=None,
    )
    y = torch.ops.bn_lightning.batch_norm(*folded)
    if updates:
        for value, dim, new in (
            (a.running_mean, dims.running_mean, folded.running_mean),
            (a.running_var, dims.running_var, folded.running_var),
        ):
            value.movedim(dim, 0).copy_(new.unflatten(0, (B, -1)))
    if a.training and a.num_batches_tracked is not None:
        a.num_batches_tracked.add_(1)
    return y.unflatten(1, (B, -1)), 1


_LIBRARY.impl("batch_norm", _with_gradient, "Autograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("batch_norm", _without_gradient, _key)
    _LIBRARY.impl("batch_norm_forward", _forward, _key)
    _LIBRARY.impl("batch_norm_backward", _backward, _key)
for _name, _fake in (
    ("batch_norm", lambda *arguments: _fake_forward(*arguments, False)[0]),
    ("batch_norm_forward", _fake_forward),
    ("batch_norm_backward", _fake_backward),
):
    torch.library.register_fake(f"bn_lightning::{_name}", _fake, lib=_LIBRARY)
torch.library.register_vmap("bn_lightning::batch_norm", _vmap, lib=_LIBRARY)
