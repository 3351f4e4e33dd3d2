"""Batch Normalization as PyTorch ops, and the choice between ATen and Triton.

Three ops in the namespace `bn_lightning`, each with its fake beside it:

    batch_norm_statistics  x -> mean, rstd; updates the running statistics; no gradient
    batch_norm_normalize   x, mean, rstd, weight, bias -> y
    batch_norm_backward    dy, x, mean, rstd, weight -> dx, dweight, dbias

The forward is two ops because PyTorch gives no gradient to an op that writes into its arguments.
The gradient of `batch_norm_normalize` in training takes mean and rstd as functions of x, so it is
the whole gradient of the BatchNorm; that of `batch_norm_backward` is the composite formula of
reference.py.

Triton is imported only inside the ops and the checks that lead to them.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.kernels import reference
from bn_lightning.kernels.schedule import make_schedule

BACKENDS = ("auto", "native", "triton")

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Normalises each channel of `x`, as `torch.nn.functional.batch_norm` does.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with the mean and the biased variance of the batch in training, the running ones in evaluation.
    In training `running = (1 - momentum) * running + momentum * batch`, in place, with the unbiased
    variance of the batch.

    The Triton kernels read contiguous memory: an `x` of other strides, channels-last among them, is
    copied once, and y is then contiguous. They compute in fp32 and give the same bits for the same
    inputs. An empty `x` always goes to ATen.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        weight: (C,) on the device of `x`; None stands for ones.
        bias: (C,) on the device of `x`; None stands for zeros.
        running_mean: (C,) on the device of `x`; needed in evaluation.
        running_var: (C,), unbiased, on the device of `x`; needed in evaluation.
        training: normalise by the batch's statistics, and update the running ones if given.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: added to the variance, > 0.
        backend: "native" for ATen; "triton" for the kernels: `x` in fp32, fp16 or bf16, parameters
            and statistics each in any float dtype; "auto" for the kernels where `x` is a CUDA or
            ROCm tensor of such a dtype and Triton is installed, else ATen.

    Returns:
        y, with the shape, dtype and device of `x`.

    Raises:
        ValueError: an unknown backend; "triton" for a tensor it cannot take; one value per channel
            in training; one running statistic without the other; `eps` not positive in training.
        RuntimeError: running statistics missing in evaluation; a per-channel tensor of another
            length than C or on another device.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """
    if backend == "auto":
        triton = x.is_cuda and _TRITON_INSTALLED and x.dtype in _TRITON_DTYPES
    elif backend == "native":
        triton = False
    elif backend == "triton":
        _check_triton_takes(x)
        triton = True
    else:
        raise ValueError(f"expected `backend` to be one of {BACKENDS}, got {backend!r}")
    if not triton or x.numel() == 0:
        try:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        except ValueError:
            _check_batch(x, training)
            raise

    _check_arguments(x, weight, bias, running_mean, running_var, training, eps)
    if training:
        x = x.contiguous()
        mean, rstd = batch_norm_statistics(x.detach(), running_mean, running_var, momentum, eps)
    else:
        mean, rstd = _evaluation_statistics(running_mean, running_var, eps)
    return batch_norm_normalize(x.contiguous(), mean, rstd, weight, bias, training, eps)


@torch.library.custom_op(
    "bn_lightning::batch_norm_statistics", mutates_args=("running_mean", "running_var")
)
def batch_norm_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Computes mean and rstd of each channel, (C,) fp32, and updates the running statistics."""
    from bn_lightning.kernels import statistics

    _check_device(x)
    schedule = make_schedule(x.shape, x.element_size())
    with torch.cuda.device_of(x):
        partials = statistics.partial_statistics(x.contiguous(), schedule)
        if running_mean is None or running_var is None:
            return statistics.finish_statistics(*partials, None, None, momentum, eps, schedule)
        new_mean, new_var = running_mean.contiguous(), running_var.contiguous()
        result = statistics.finish_statistics(*partials, new_mean, new_var, momentum, eps, schedule)
        if new_mean is not running_mean:
            running_mean.copy_(new_mean)
        if new_var is not running_var:
            running_var.copy_(new_var)
    return result


@batch_norm_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    C = x.shape[1]
    return x.new_empty(C, dtype=torch.float32), x.new_empty(C, dtype=torch.float32)


@torch.library.custom_op("bn_lightning::batch_norm_normalize", mutates_args=())
def batch_norm_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """Computes y; `training` and `eps` say how mean and rstd depend on x, for the gradient."""
    from bn_lightning.kernels import normalize

    _check_device(x)
    schedule = make_schedule(x.shape, x.element_size())
    with torch.cuda.device_of(x):
        return normalize.normalize(
            x.contiguous(), mean, rstd, _contiguous(weight), _contiguous(bias), schedule
        )


@batch_norm_normalize.register_fake
def _(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, rstd, weight, bias, ctx.training, ctx.eps = inputs
    _, _, _, needs_dweight, needs_dbias, _, _ = ctx.needs_input_grad[:7]
    # Frozen without affine gradients, dx needs no x: it need not stay in memory.
    needs_x = ctx.training or needs_dweight or needs_dbias
    ctx.save_for_backward(x if needs_x else None, mean, rstd, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    needs_dx, _, _, needs_dweight, needs_dbias, _, _ = ctx.needs_input_grad
    dx, dweight, dbias = batch_norm_backward(
        dy,
        x,
        mean,
        rstd,
        weight,
        ctx.training,
        ctx.eps,
        needs_dx,
        needs_dweight or needs_dbias,
    )
    return (
        dx if needs_dx else None,
        None,
        None,
        dweight.to(weight.dtype) if needs_dweight else None,
        dbias.to(ctx.bias_dtype) if needs_dbias else None,
        None,
        None,
    )


batch_norm_normalize.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("bn_lightning::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs_dx: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dx in the dtype of dy, and dweight and dbias, (C,) fp32.

    What is not needed comes back with shape (0,). `x` may be None in evaluation without affine
    gradients; `eps` serves the double backward.
    """
    from bn_lightning.kernels import backward

    schedule = make_schedule(dy.shape, dy.element_size())
    dy = dy.contiguous()
    weight = _contiguous(weight)
    with torch.cuda.device_of(dy):
        if x is not None and (training or needs_affine):
            x = x.contiguous()
            dweight, dbias = backward.affine_gradients(dy, x, mean, rstd, schedule)
        else:
            dweight, dbias = _nothing(mean), _nothing(mean)
        if not needs_dx:
            dx = _nothing(dy)
        elif training and x is not None:
            dx = backward.training_input_gradient(
                dy, x, mean, rstd, weight, dweight, dbias, schedule
            )
        else:
            dx = backward.evaluation_input_gradient(dy, rstd, weight, schedule)
    if not needs_affine:
        dweight, dbias = _nothing(mean), _nothing(mean)
    return dx, dweight, dbias


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs_dx: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    dx = torch.empty_like(dy, memory_format=contiguous) if needs_dx else _nothing(dy)
    if needs_affine:
        return dx, torch.empty_like(mean), torch.empty_like(mean)
    return dx, _nothing(mean), _nothing(mean)


def _save_for_double_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, ctx.training, ctx.eps, ctx.needs_dx, ctx.needs_affine = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(
    ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
) -> tuple[Tensor | None, ...]:
    dy, x, mean, rstd, weight = ctx.saved_tensors
    d_dy, d_x, d_weight = reference.batch_norm_double_backward(
        ddx if ctx.needs_dx else None,
        ddweight if ctx.needs_affine else None,
        ddbias if ctx.needs_affine else None,
        dy,
        x,
        mean,
        rstd,
        weight,
        training=ctx.training,
        eps=ctx.eps,
    )
    return d_dy, d_x, None, None, d_weight, None, None, None, None


batch_norm_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _evaluation_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(
            f"{missing} must be defined in evaluation mode; pass it, or training=True"
        )
    # A copy: a training step between this forward and its backward changes the original.
    mean = running_mean.detach().to(torch.float32, copy=True)
    return mean, torch.rsqrt(running_var.detach().to(torch.float32) + eps)


def _check_triton_takes(x: Tensor) -> None:
    advice = 'use backend="auto" or backend="native"'
    if not _TRITON_INSTALLED:
        raise ValueError(
            f'expected Triton to be installed for `backend`="triton", found none; {advice}, '
            f"or pip install triton"
        )
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f'expected `x` in fp32, fp16 or bf16 for `backend`="triton", got {x.dtype}; {advice}'
        )
    # A compiler cannot look at the kernels; there the ops check by themselves.
    if not torch.compiler.is_compiling():
        _check_device(x)


def _check_device(x: Tensor) -> None:
    """Raises where the kernels cannot reach `x`: they run on the CPU only when interpreted."""
    if x.is_cuda:
        return
    if x.device.type == "cpu":
        from triton.runtime import JITFunction

        from bn_lightning.kernels import statistics

        # What TRITON_INTERPRET was when the kernels were made is what counts.
        if not isinstance(statistics._bn_finish_statistics_kernel, JITFunction):
            return
    raise ValueError(
        f'expected `x` on a CUDA or ROCm device for `backend`="triton", got one on {x.device}; '
        f'use backend="auto" or backend="native", or, to run the kernels on CPU tensors under '
        f"Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
    )


def _check_batch(x: Tensor, training: bool) -> None:
    """Raises torch's error, and what to do, where a channel has one value in training."""
    if training and x.dim() > 1 and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}; "
            f"use a batch of at least 2 samples, or model.eval()"
        )


def _check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Checks what ATen would check, in its words, before anything is allocated or written."""
    if x.dim() < 2:
        raise ValueError(f"expected `x` to be (N, C) or (N, C, ...), got shape {tuple(x.shape)}")
    _check_batch(x, training)
    if eps < 0 or (training and eps == 0):
        raise ValueError(
            f"batch_norm eps must be positive during training, but got {eps}"
            if training
            else f"batch_norm eps must be non-negative, but got {eps}"
        )
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and running.requires_grad:
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument '{name}'; "
                f"pass {name}.detach()"
            )
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    C = x.shape[1]
    per_channel = (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    )
    for name, value in per_channel:
        if value is None:
            continue
        if value.numel() != C:
            raise RuntimeError(
                f"{name} should contain {C} elements not {value.numel()}; `x` has shape "
                f"{tuple(x.shape)}, and its second dimension is the channels"
            )
        if value.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but `x` is on {x.device} and "
                f"`{name}` on {value.device}; move one of them"
            )
