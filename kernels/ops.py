"""Batch Normalization as PyTorch ops: ATen's, or custom ones around the Triton kernels.

Three ops in the namespace `bn_lightning`, each with its fake beside it:

    batch_norm           what the public function calls; knows its gradient and vmap
    batch_norm_forward   x, parameters, statistics -> y, mean, rstd, bits; updates the statistics
    batch_norm_backward  dy and what was saved -> dx, dweight, dbias, dresidual

PyTorch registers no gradient for an op that writes into its arguments, so `batch_norm` brings its
own kernel for the Autograd key: an autograd function around `batch_norm_forward`, which has none.
A compiler sees one op, AOTAutograd goes through it, and a statistic is written where it was read.

What is saved for the backward: x, fp32 mean and rstd, weight and bias, and what activations.py says
for a residual. In evaluation and frozen, x only where the activation or dweight needs it.

Triton is imported only inside the ops and the checks of dispatch.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from bn_lightning.kernels import reference
from bn_lightning.kernels.activations import activate, recomputes_z, saves_bits, saves_output
from bn_lightning.kernels.arguments import BackwardCall, ForwardCall
from bn_lightning.kernels.checks import check_average, check_batch, check_choices, check_like_aten
from bn_lightning.kernels.dispatch import (
    as_layout,
    check_device,
    contiguous,
    is_channels_last,
    is_recomputation,
    schedule_of,
    uses_triton,
)
from bn_lightning.kernels.schedule import Regime

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
    """Normalises each channel of `x`, adds a residual and applies an activation.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with the mean and the biased variance of the batch in training, the running ones in evaluation.
    In training `running = (1 - momentum) * running + momentum * batch`, in place, with the unbiased
    variance of the batch. A training forward inside a backward pass is the recomputation of a
    checkpoint: it leaves the statistics alone.

    The Triton kernels read contiguous and channels-last memory, and y has the layout of `x`; an `x`
    of other strides is copied once, and y is then contiguous. A residual or an upstream gradient
    in another layout than `x` is copied once. They compute in fp32 and give the same bits for the
    same inputs. An empty `x` always goes to ATen.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        weight: (C,) on the device of `x`; None stands for ones.
        bias: (C,) on the device of `x`; None stands for zeros.
        running_mean: (C,) on the device of `x`; needed in evaluation.
        running_var: (C,), unbiased, on the device of `x`; needed in evaluation.
        training: normalise by the batch's statistics, and update the running ones if given.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average
            over all batches, which `num_batches_tracked` counts.
        eps: added to the variance, > 0.
        activation: "identity", "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh",
            "hardswish", "mish", "sigmoid" or "tanh".
        negative_slope: of "leaky_relu" below zero; the others do not read it.
        residual: with the shape, dtype and device of `x`, added before the activation.
        num_batches_tracked: int64 scalar on the device of `x`, to which training adds one.
        backend: "native" for ATen; "triton" for the kernels: `x` in fp32, fp16 or bf16, parameters
            and statistics each in any float dtype; "auto" for the kernels where `x` is a CUDA or
            ROCm tensor of such a dtype and Triton is installed, else ATen.

    Returns:
        y, with the shape, dtype and device of `x`.

    Raises:
        ValueError: an unknown backend or activation; "triton" for a tensor it cannot take; a
            residual of another shape or dtype; one value per channel in training; one running
            statistic without the other; `eps` not positive in training; `momentum` None without
            `num_batches_tracked`.
        RuntimeError: running statistics missing in evaluation; a per-channel tensor of another
            length than C; a tensor on another device.
        NotImplementedError: an `x` of integers.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """
    check_choices(x, residual, activation, backend)
    triton = uses_triton(x, backend)
    if training:
        if momentum is None:
            check_average(running_mean, num_batches_tracked)
        if is_recomputation():
            # Copies: what is saved must be as many tensors as the first time.
            momentum, num_batches_tracked = 0.0, None
            running_mean = None if running_mean is None else running_mean.clone()
            running_var = None if running_var is None else running_var.clone()
    else:
        num_batches_tracked = None
    if not triton:
        return _composite(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )

    check_like_aten(x, weight, bias, running_mean, running_var, training, eps)
    return torch.ops.bn_lightning.batch_norm(
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        0.0 if momentum is None and running_mean is None else momentum,
        eps,
        activation,
        negative_slope,
    )


def _composite(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Computes the whole with ATen's ops, which know every kind of derivative.

    A cumulative average does not ask the device for its count.
    """
    batch_mean, batch_var = running_mean, running_var
    cumulative = training and momentum is None and running_mean is not None
    if cumulative and running_mean is not None and running_var is not None:
        batch_mean, batch_var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    factor = 1.0 if momentum is None else momentum
    try:
        y = F.batch_norm(x, batch_mean, batch_var, weight, bias, training, factor, eps)
    except ValueError:
        check_batch(x, training)
        raise
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if cumulative and x.numel() > 0 and num_batches_tracked is not None:
        for running, batch in ((running_mean, batch_mean), (running_var, batch_var)):
            if running is not None and batch is not None:
                precise = torch.promote_types(running.dtype, torch.float32)
                running.lerp_(batch, num_batches_tracked.to(precise).reciprocal().to(running.dtype))
    if residual is not None:
        y = y + residual
    return y if activation == "identity" else activate(y, activation, negative_slope)


_LIBRARY = torch.library.Library("bn_lightning", "DEF")
_STATE = (
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, "
    "float eps, str activation, float negative_slope"
)
_LIBRARY.define(f"batch_norm({_STATE}) -> Tensor")
_LIBRARY.define(
    f"batch_norm_forward({_STATE}, bool writes_bits) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor? x, Tensor? residual, Tensor? y, Tensor? bits, "
    "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool channels_last, bool training, "
    "float eps, str activation, float negative_slope, bool needs_dx, bool needs_affine, "
    "bool needs_dresidual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    writes_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bn_lightning.kernels import normalize
    from bn_lightning.kernels import persistent as resident
    from bn_lightning.kernels import single_launch as small
    from bn_lightning.kernels import stats as statistics

    check_device(x)
    channels_last = is_channels_last(x)
    x = as_layout(x, channels_last)
    new_mean, new_var = contiguous(running_mean), contiguous(running_var)
    call = ForwardCall(
        x,
        None if residual is None else as_layout(residual, channels_last),
        contiguous(weight),
        contiguous(bias),
        new_mean,
        new_var,
        num_batches_tracked,
        momentum,
        eps,
        activation,
        negative_slope,
        writes_bits,
    )
    schedule = schedule_of(x, channels_last, writes_bits, training and momentum is None)
    bits: Tensor | None
    with torch.cuda.device_of(x):
        if not training:
            if new_mean is None or new_var is None:
                raise RuntimeError(
                    "expected `running_mean` and `running_var` in evaluation, got None for at "
                    "least one; pass both, or training=True"
                )
            mean, rstd = statistics.evaluation_statistics(new_mean, new_var, eps)
            y, bits = normalize.normalize(call, mean, rstd, schedule)
        elif schedule.regime is Regime.SMALL:
            y, bits, mean, rstd = small.forward(call, schedule)
        elif schedule.regime is Regime.RESIDENT:
            y, bits, mean, rstd = resident.forward(call, schedule)
        else:
            partials = statistics.partial_statistics(x, schedule)
            mean, rstd = statistics.finish_statistics(partials, call, schedule)
            y, bits = normalize.normalize(call, mean, rstd, schedule)
    if training:
        for old, new in ((running_mean, new_mean), (running_var, new_var)):
            if old is not None and new is not None and new is not old:
                old.copy_(new)
        state = (running_mean, running_var, num_batches_tracked)
        torch.autograd.graph.increment_version([v for v in state if v is not None])
    return y, mean, rstd, _nothing(x) if bits is None else bits


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    writes_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(as_layout(x, is_channels_last(x)))
    mean, rstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8) if writes_bits else _nothing(x)
    return y, mean, rstd, bits


def _backward(
    dy: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels_last: bool,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    needs_dx: bool,
    needs_affine: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes dx, dweight, dbias, dresidual; what is not needed comes back with shape (0,)."""
    from bn_lightning.kernels import backward
    from bn_lightning.kernels import persistent as resident
    from bn_lightning.kernels import single_launch as small

    dy = as_layout(dy, channels_last)
    call = BackwardCall(
        dy,
        None if x is None else as_layout(x, channels_last),
        None if residual is None else as_layout(residual, channels_last),
        y,
        bits,
        mean,
        rstd,
        contiguous(weight),
        contiguous(bias),
        activation,
        negative_slope,
        training,
        needs_dx,
        needs_affine,
        needs_dresidual,
    )
    schedule = schedule_of(dy, channels_last, False, False)
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    with torch.cuda.device_of(dy):
        sums = needs_affine or (training and needs_dx)
        if not sums:
            dx, dresidual = backward.input_gradients(call, None, None, schedule)
        elif schedule.regime is Regime.SMALL:
            dx, dresidual, dweight, dbias = small.backward(call, schedule)
        elif schedule.regime is Regime.RESIDENT:
            dx, dresidual, dweight, dbias = resident.backward(call, schedule)
        else:
            dweight, dbias = backward.affine_gradients(call, schedule)
            dx, dresidual = backward.input_gradients(call, dweight, dbias, schedule)
    if not needs_affine:
        dweight = dbias = None
    return (
        _nothing(dy) if dx is None else dx,
        _nothing(mean) if dweight is None else dweight,
        _nothing(mean) if dbias is None else dbias,
        _nothing(dy) if dresidual is None else dresidual,
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels_last: bool,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    needs_dx: bool,
    needs_affine: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = as_layout(dy, channels_last)
    dx = torch.empty_like(dy) if needs_dx else _nothing(dy)
    dresidual = torch.empty_like(dy) if needs_dresidual else _nothing(dy)
    if needs_affine:
        return dx, torch.empty_like(mean), torch.empty_like(mean), dresidual
    return dx, _nothing(mean), _nothing(mean), dresidual


class _BatchNorm(torch.autograd.Function):
    """`batch_norm_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, rstd, bits = torch.ops.bn_lightning.batch_norm_forward(*args)
        x, residual, weight, bias, _, _, _, training, _, eps, activation, slope, writes_bits = args
        ctx.mark_non_differentiable(mean, rstd, bits)
        ctx.set_materialize_grads(False)
        needs_dx, _, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        needs_affine = needs_dweight or needs_dbias
        has_residual = residual is not None
        from_z = recomputes_z(activation, has_residual)
        needs_x = from_z or needs_affine or (training and needs_dx)
        ctx.save_for_backward(
            x if needs_x else None,
            residual if from_z else None,
            y if saves_output(activation, has_residual) else None,
            bits if writes_bits else None,
            mean,
            rstd,
            weight,
            bias if from_z else None,
        )
        ctx.options = (is_channels_last(x), training, eps, activation, slope)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, mean, rstd, bits

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 13
        if dy is None:
            return nothing
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        needs_affine = needs_dweight or needs_dbias
        # Without an activation the residual's gradient is dy itself.
        identity = ctx.options[3] == "identity"
        writes_dresidual = needs_dresidual and not identity
        dx = dweight = dbias = None
        dresidual: Tensor | None = dy
        if needs_dx or needs_affine or writes_dresidual:
            *tensors, weight, bias = ctx.saved_tensors
            flags = (needs_dx, needs_affine, writes_dresidual)
            arguments = (dy, *tensors, weight, bias, *ctx.options, *flags)
            if torch.is_grad_enabled():
                results = _BatchNormBackward.apply(*arguments)
            else:
                results = torch.ops.bn_lightning.batch_norm_backward(*arguments)
            dx, dweight, dbias, written = results
            dresidual = dy if identity else written
            if needs_dweight:
                dweight = dweight.to(weight.dtype)
            if needs_dbias:
                dbias = dbias.to(ctx.bias_dtype)
        return (
            dx if needs_dx else None,
            dresidual if needs_dresidual else None,
            dweight if needs_dweight else None,
            dbias if needs_dbias else None,
            *nothing[4:],
        )


class _BatchNormBackward(torch.autograd.Function):
    """`batch_norm_backward` with its gradient, which is that of the composite in reference.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:9])
        ctx.options = args[9:]
        return torch.ops.bn_lightning.batch_norm_backward(*args)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        channels_last, training, eps, activation, slope, *needed = ctx.options
        needs_dx, needs_affine, needs_dresidual = needed
        with torch.enable_grad():
            # Views, so that the way from the saved tensors to here is open to a third derivative.
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            results = reference.fused_backward(
                *tensors,
                channels_last=channels_last,
                training=training,
                eps=eps,
                activation=activation,
                negative_slope=slope,
            )
            used = (needs_dx, needs_affine, needs_affine, needs_dresidual)
            pairs = [
                (r, u)
                for r, u, use in zip(results, upstream, used, strict=True)
                if use and u is not None and r is not None and r.requires_grad
            ]
            wanted = [t for t in tensors if t is not None and t.requires_grad]
            gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if pairs and wanted:
                gradients = torch.autograd.grad(
                    [r for r, _ in pairs],
                    wanted,
                    [u for _, u in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
        found = iter(gradients)
        by_tensor = [next(found) if t is not None and t.requires_grad else None for t in tensors]
        return (*by_tensor, *(None for _ in ctx.options))


def _with_gradient(*args: Any) -> Tensor:
    """The Autograd kernel of `batch_norm`."""
    inputs = [t for t in args[:4] if t is not None]
    if _differentiates_otherwise(inputs):
        return _composite(*args)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return torch.ops.bn_lightning.batch_norm_forward(*args, False)[0]
    return _BatchNorm.apply(*args, saves_bits(args[10], args[1] is not None))[0]


def _differentiates_otherwise(inputs: list[Tensor]) -> bool:
    """Says whether torch.func or forward-mode differentiation is at work, which autograd functions
    of Triton kernels have no part in."""
    # torch.func has no public way to ask.
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(t).tangent is not None for t in inputs
    )


def _without_gradient(*args: Any) -> Tensor:
    """The CPU and CUDA kernel of `batch_norm`."""
    return _forward(*args)[0]


def _fake(*args: Any) -> Tensor:
    return _fake_forward(*args)[0]


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """Folds the mapped dimension into C: B BatchNorms of C channels are one of B * C."""
    B = info.batch_size
    tensors: list[Any] = [
        None if value is None else _mapped_first(value, dim, B)
        for value, dim in zip(args[:6], in_dims[:6], strict=True)
    ]
    x, residual, *per_channel = tensors
    C = x.shape[2]
    running, tracked, training, momentum = args[4:6], args[6], args[7], args[8]
    updates = training and running[0] is not None
    if updates and (in_dims[4] is None or in_dims[5] is None):
        raise RuntimeError(
            "expected `running_mean` and `running_var` to be mapped by vmap as `x` is, for they "
            "are updated in place; pass in_dims for them, or None for both"
        )
    if updates and momentum is None:
        raise RuntimeError("expected `momentum` to be a number under vmap, got None")
    folded: list[Any] = [None if v is None else v.reshape(B * C) for v in per_channel]
    y = torch.ops.bn_lightning.batch_norm(
        _fold(x), None if residual is None else _fold(residual), *folded, None, *args[7:]
    )
    if updates:
        for value, dim, new in zip(running, in_dims[4:6], folded[2:], strict=True):
            value.movedim(dim, 0).copy_(new.reshape(B, C))
    if training and tracked is not None:
        tracked.add_(1)
    return y.unflatten(1, (B, C)), 1


def _mapped_first(value: Tensor, dim: int | None, B: int) -> Tensor:
    return value.expand(B, *value.shape) if dim is None else value.movedim(dim, 0)


def _fold(value_BNC: Tensor) -> Tensor:
    return value_BNC.movedim(0, 1).flatten(1, 2)


_LIBRARY.impl("batch_norm", _with_gradient, "Autograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("batch_norm", _without_gradient, _key)
    _LIBRARY.impl("batch_norm_forward", _forward, _key)
    _LIBRARY.impl("batch_norm_backward", _backward, _key)
torch.library.register_fake("bn_lightning::batch_norm", _fake, lib=_LIBRARY)
torch.library.register_fake("bn_lightning::batch_norm_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("bn_lightning::batch_norm_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_vmap("bn_lightning::batch_norm", _vmap, lib=_LIBRARY)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)
