"""Batch Normalization in plain torch, with which every other implementation here is compared.

    mean = 1/M sum x,  var = 1/M sum (x - mean)^2,  rstd = 1/sqrt(var + eps)
    x_hat = (x - mean) * rstd,  y = weight * x_hat + bias

Source: Ioffe & Szegedy 2015, arXiv 1502.03167: Algorithm 1 (forward), section 3 (gradients),
Algorithm 2 (running statistics).

Shapes: N batch, C channels, L all other dimensions, M = N * L values per channel. Tensors called
x, dy and dx are (N, C) or (N, C, ...), per-channel ones (C,). Any float dtype: fp16 and bf16 are
computed in fp32, others in their own dtype. All operations are differentiable torch operations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bn_lightning.kernels.activations import ACTIVATIONS, derivative, lower_derivative
from bn_lightning.kernels.arguments import Backward
from bn_lightning.kernels.layout import mask_rows


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of `dtype` is computed: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean and the biased variance of each channel, in two passes.

    In one pass E[x^2] - E[x]^2 would lose every digit when the mean is large.

    Args:
        x: (N, C, ...), any float dtype.

    Returns:
        The mean and the biased variance, both (C,) in the compute dtype of `x`.

    Source: Algorithm 1, lines 1 and 2.
    """
    x = x.to(compute_dtype(x.dtype))
    mean_C = _channel_mean(x)
    centred = x - as_channels(mean_C, x)
    return mean_C, _channel_mean(centred * centred)


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
) -> Tensor:
    """Normalize each channel of `x`, and in training update the running statistics in place.

    In training `running = (1 - momentum) * running + momentum * batch`. The biased variance
    normalizes, and the unbiased one, M / (M - 1) times larger, updates `running_var`.

    Args:
        x: (N, C, ...), any float dtype.
        weight: (C,), the paper's gamma, or None for ones.
        bias: (C,), the paper's beta, or None for zeros.
        running_mean: (C,); required in evaluation, updated in place in training.
        running_var: (C,), unbiased; required in evaluation, updated in place in training.
        training: normalize by the statistics of the batch, else by the running ones.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: added to the variance, > 0.

    Returns:
        y, with the shape and dtype of `x`.

    Raises:
        ValueError: fewer than two values per channel in training, or no running statistics in
            evaluation.

    Source: Algorithm 1; Algorithm 2, steps 8 to 11.
    """
    if training:
        count = _values_per_channel(x)
        if count < 2:
            raise ValueError(
                f"expected `x` to have more than 1 value per channel when training, got shape "
                f"{tuple(x.shape)}; use a larger batch"
            )
        mean_C, var_C = batch_statistics(x)
        if running_mean is not None and running_var is not None:
            unbiased_var_C = var_C * (count / (count - 1))
            _update_running(running_mean, mean_C, momentum)
            _update_running(running_var, unbiased_var_C, momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError(
                "expected `running_mean` and `running_var` to be tensors in evaluation, got None "
                "for at least one; pass both"
            )
        dtype = compute_dtype(x.dtype)
        mean_C, var_C = running_mean.to(dtype), running_var.to(dtype)
    return apply_normalization(x, mean_C, torch.rsqrt(var_C + eps), weight, bias)


def apply_normalization(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute (x - mean) * rstd * weight + bias in the dtype of `mean`, rounded to that of `x`.

    Args:
        x: (N, C, ...), any float dtype.
        mean: (C,) in the compute dtype of `x`.
        rstd: (C,), 1 / sqrt(var + eps), in the compute dtype of `x`.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.

    Returns:
        y, with the shape and dtype of `x`.

    Source: Algorithm 1, lines 3 and 4.
    """
    y = _normalized(x.to(mean.dtype), mean, rstd)
    if weight is not None:
        y = y * as_channels(weight.to(mean.dtype), x)
    if bias is not None:
        y = y + as_channels(bias.to(mean.dtype), x)
    return y.to(x.dtype)


def batch_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias from that of y.

        dbias = sum dy,  dweight = sum dy * x_hat
        training:    dx = weight * rstd * (dy - dbias / M - x_hat * dweight / M)
        evaluation:  dx = weight * rstd * dy

    The training form combines the paper's three equations for dl/dvar, dl/dmean and dl/dx. In
    evaluation mean and rstd are constants, so only the first term remains.

    Args:
        dy: (N, C, ...), any float dtype, the gradient of y.
        x: (N, C, ...), input of the forward.
        mean: (C,) in the compute dtype, as the forward used it.
        rstd: (C,) in the compute dtype, as the forward used it.
        weight: (C,) or None for ones.
        training: whether mean and rstd were those of `x`.

    Returns:
        dx with the shape and dtype of `x`; dweight and dbias, (C,) in the compute dtype.

    Source: section 3, the equations after Algorithm 1.
    """
    dy = dy.to(mean.dtype)
    x_hat = _normalized(x.to(mean.dtype), mean, rstd)
    dbias_C = channel_sum(dy)
    dweight_C = channel_sum(dy * x_hat)
    scale_C = _scale(rstd, weight)
    dx = _project(dy, x_hat) if training else dy
    return (dx * as_channels(scale_C, x)).to(x.dtype), dweight_C, dbias_C


def fused_backward(
    call: Backward, *, training: bool, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the gradients of y = act(bn(x) + residual), differentiable in all they come from.

        g = dy * act'(z), and then as `batch_norm_backward`

    In training mean and rstd are computed again from `x`, so that the gradient through them is
    part of the graph.

    Args:
        call: of any float dtype; its mean and rstd are used in evaluation.
        training: whether mean and rstd were those of `x`.
        eps: as in the forward, > 0.

    Returns:
        dx, dweight, dbias and dresidual; dweight is None without `x`.

    Raises:
        ValueError: as `gradient_of_z`.
    """
    x = call.x
    if training and x is not None:
        mean_C, var_C = batch_statistics(x)
        call = call._replace(mean=mean_C, rstd=torch.rsqrt(var_C + eps))
    g = gradient_of_z(call)
    dresidual = g.to(call.dy.dtype)
    if x is None:
        scale_C = _scale(call.rstd, call.weight)
        return (g * as_channels(scale_C, g)).to(call.dy.dtype), None, channel_sum(g), dresidual
    gradients = batch_norm_backward(g, x, call.mean, call.rstd, call.weight, training=training)
    return (*gradients, dresidual)


def gradient_of_z(call: Backward) -> Tensor:
    """Compute g = dy * act'(z) in the dtype of `mean`, from `mask`, else `y`, else z.

    Raises:
        ValueError: a `y` for an activation whose derivative is not a function of it.
    """
    dtype = call.mean.dtype
    g = call.dy.to(dtype)
    if call.activation == "identity":
        return g
    if call.mask is not None:
        lower = lower_derivative(call.activation, call.negative_slope)
        upper = unpack_mask(call.mask, call.dy.shape, call.channels_last)
        return torch.where(upper, g, g * lower)
    if call.y is not None:
        of_output = ACTIVATIONS[call.activation].derivative_of_output
        if of_output is None:
            raise ValueError(
                f"expected `y` to be None for {call.activation}, whose derivative is not a "
                f"function of y, got a tensor; pass `residual`, or None"
            )
        return g * of_output(call.y.to(dtype))
    if call.x is None:
        return g
    z = apply_normalization(call.x.to(dtype), call.mean, call.rstd, call.weight, call.bias)
    z = z if call.residual is None else z + call.residual.to(dtype)
    return g * derivative(z, call.activation, call.negative_slope)


def vector_jacobian_product(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Compute the gradients of `function(*tensors)`, differentiable again.

    Args:
        function: differentiable; some results may be None.
        tensors: its arguments, some of which may be None.
        upstream: the gradient of each result; None if there is none.

    Returns:
        The gradient of each of `tensors`; None if it needs none or has none.
    """
    with torch.enable_grad():
        # Views, so that a third derivative finds the way from the saved tensors to here.
        views = [None if t is None else t.view_as(t) for t in tensors]
        pairs = [
            (result, gradient)
            for result, gradient in zip(function(*views), upstream, strict=True)
            if gradient is not None and result is not None and result.requires_grad
        ]
        wanted = [t for t in views if t is not None and t.requires_grad]
        if not pairs or not wanted:
            return [None] * len(views)
        results, gradients = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(results, wanted, gradients, create_graph=True, allow_unused=True)
        )
    return [next(found) if t is not None and t.requires_grad else None for t in views]


def pack_mask(each: Tensor, channels_last: bool) -> Tensor:
    """Pack eight bools into a byte, in the order of memory.

    Args:
        each: (N, C, ...) bool.
        channels_last: whether memory is in the order of channels-last.

    Returns:
        uint8 of `mask_shape`.
    """
    rows, positions = mask_rows(each.shape, channels_last)
    each = (each.movedim(1, -1) if channels_last else each).reshape(rows, positions)
    each = torch.nn.functional.pad(each.to(torch.uint8), (0, -positions % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=each.device)
    return (each.unflatten(1, (-1, 8)) << shifts).sum(dim=2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """Return what `pack_mask` packed, as (N, C, ...) bool of shape `shape`."""
    each = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    each = each.flatten(1)[:, : mask_rows(shape, channels_last)[1]] != 0
    if not channels_last:
        return each.reshape(shape)
    return each.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _project(g: Tensor, x_hat: Tensor) -> Tensor:
    """Compute g - mean(g) - x_hat * mean(g * x_hat), the part of g that mean and var let pass."""
    mean_g = as_channels(_channel_mean(g), g)
    mean_gx = as_channels(_channel_mean(g * x_hat), g)
    return g - mean_g - x_hat * mean_gx


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - as_channels(mean, x)) * as_channels(rstd, x)


def _scale(rstd: Tensor, weight: Tensor | None) -> Tensor:
    return rstd if weight is None else rstd * weight.to(rstd.dtype)


def as_channels(value_C: Tensor, x: Tensor) -> Tensor:
    """Reshape a (C,) tensor so that it broadcasts to `x`."""
    return value_C.reshape(1, -1, *(1 for _ in range(x.dim() - 2)))


def channel_sum(x: Tensor) -> Tensor:
    """Sum (N, C, ...) to (C,), in its own dtype."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1])


def _channel_mean(x: Tensor) -> Tensor:
    return x.mean(dim=[d for d in range(x.dim()) if d != 1])


def _values_per_channel(x: Tensor) -> int:
    return x.shape[0] * x[0, 0].numel() if x.numel() else 0


def _update_running(running_C: Tensor, batch_C: Tensor, momentum: float) -> None:
    with torch.no_grad():
        old = running_C.to(batch_C.dtype)
        running_C.copy_((1 - momentum) * old + momentum * batch_C)
