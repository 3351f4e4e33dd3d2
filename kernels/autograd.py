"""The gradient of a BatchNorm on the Triton kernels, and the gradient of that.

    BatchNormFunction          around the op `batch_norm_forward`, for compilers and modes
    BatchNormBackwardFunction  around the op `batch_norm_backward`, for a second derivative

eager.py has a third one, which calls no op. It saves the same tensors as `BatchNormFunction`: when
activation checkpointing re-runs a forward, it may take the other of the two.

For the backward are saved: x, fp32 mean and rstd and the mask in one tensor, weight and bias, and
with a residual what activations.py lists. In evaluation and with frozen statistics, x is saved only
if the activation or dweight needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_lightning.kernels import reference
from bn_lightning.kernels.activations import recomputes_z, saves_output
from bn_lightning.kernels.arguments import Backward, BackwardNeeds, BatchNormArguments
from bn_lightning.kernels.layout import is_channels_last, mask_shape


class SavedOptions(NamedTuple):
    """What the gradient needs beside the saved tensors.

    Attributes:
        channels_last: whether x is.
        training: whether mean and rstd were those of x.
        eps: added to the variance.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
        weight_dtype: of dweight; None without a weight.
        bias_dtype: of dbias; None without a bias.
    """

    channels_last: bool
    training: bool
    eps: float
    activation: str
    negative_slope: float
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None

    @classmethod
    def of(cls, a: BatchNormArguments) -> "SavedOptions":
        """Return the options of a call."""
        weight_dtype, bias_dtype = (None if t is None else t.dtype for t in (a.weight, a.bias))
        return cls(
            is_channels_last(a.x),
            a.training,
            a.eps,
            a.activation,
            a.negative_slope,
            weight_dtype,
            bias_dtype,
        )


class Packing(NamedTuple):
    """Where mean, rstd and the mask are in one fp32 tensor, because it takes less time to save one.

    Each begins at a multiple of 16 bytes.

    Attributes:
        rstd: the element with which it begins.
        mask: likewise, the mask's bytes.
        numel: elements of the tensor.
    """

    rstd: int
    mask: int
    numel: int

    @classmethod
    def of(cls, C: int, mask_bytes: int) -> "Packing":
        """Return where they are, with a mask of so many bytes, 0 if there is none."""
        padded = (C + 3) // 4 * 4
        return cls(padded, 2 * padded, 2 * padded + (mask_bytes + 3) // 4)


def pack_statistics(mean: Tensor, rstd: Tensor, mask: Tensor | None) -> Tensor:
    """Return mean and rstd, each (C,), and a mask of the derivative in one tensor."""
    C, mask_bytes = mean.numel(), 0 if mask is None else mask.numel()
    packing = Packing.of(C, mask_bytes)
    packed = mean.new_empty(packing.numel)
    packed[:C], packed[packing.rstd : packing.rstd + C] = mean, rstd
    if mask is not None:
        packed[packing.mask :].view(torch.uint8)[:mask_bytes] = mask.flatten()
    return packed


def _unpack_statistics(
    packed: Tensor, shape: torch.Size, channels_last: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the mask or None, mean and rstd, of an x of such a shape and layout."""
    C, (rows, row_bytes) = shape[1], mask_shape(shape, channels_last)
    packing = Packing.of(C, rows * row_bytes)
    mask = None
    if packed.numel() > packing.mask:
        mask = packed[packing.mask :].view(torch.uint8)[: rows * row_bytes].view(rows, row_bytes)
    return mask, packed[:C], packed[packing.rstd : packing.rstd + C]


class SavedTensors(NamedTuple):
    """Which tensors the gradient reads; mean, rstd and weight it always does."""

    x: bool
    residual: bool
    y: bool
    bias: bool

    @classmethod
    def of(cls, a: BatchNormArguments, needs: tuple[bool, ...]) -> "SavedTensors":
        """Return what a call saves if x, residual, weight and bias need gradients as given."""
        needs_dx, _, needs_dweight, needs_dbias = needs
        has_residual = a.residual is not None
        from_z = recomputes_z(a.activation, has_residual)
        return cls(
            x=from_z or needs_dweight or needs_dbias or (a.training and needs_dx),
            residual=from_z and has_residual,
            y=saves_output(a.activation, has_residual),
            bias=from_z,
        )


def unpack_backward(*arguments: Any) -> tuple[Backward, BackwardNeeds, float]:
    """Return the arguments of `batch_norm_backward` as `Backward`, `BackwardNeeds` and eps."""
    *tensors, channels_last, training, eps, activation, negative_slope, dx, affine, dresidual = (
        arguments
    )
    call = Backward._make((*tensors, channels_last, activation, negative_slope))
    return call, BackwardNeeds(training, dx=dx, affine=affine, dresidual=dresidual), eps


def compute_gradients(
    options: SavedOptions,
    ctx: Any,
    dy: Tensor | None,
    run: Callable[..., tuple[Tensor | None, ...]],
    saved: Sequence[Any] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return dx, dresidual, dweight and dbias, each None if it is not needed.

    Args:
        options: of the forward.
        ctx: of an autograd function whose first four inputs are x, residual, weight and bias.
        dy: gradient of y.
        run: takes the arguments of the op `batch_norm_backward` and returns its results; it is not
            called for a gradient that will be differentiated.
        saved: the saved tensors, if they were unpacked before: x, residual and y, each or None,
            what `pack_statistics` returned, weight and bias, each or None.
    """
    if dy is None:
        return (None, None, None, None)
    needs_dx, needs_dresidual, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
    is_identity = options.activation == "identity"
    # Without an activation the gradient of the residual is dy itself.
    flags = (needs_dx, needs_dweight or needs_dbias, needs_dresidual and not is_identity)
    dx = dweight = dbias = None
    dresidual: Tensor | None = dy
    if any(flags):
        if torch.is_grad_enabled():
            run = BatchNormBackwardFunction.apply
        x, residual, y, *statistics, weight, bias = ctx.saved_tensors if saved is None else saved
        if len(statistics) == 1:
            statistics = _unpack_statistics(statistics[0], dy.shape, options.channels_last)
        tensors = (dy, x, residual, y, *statistics, weight, bias)
        *settings, weight_dtype, bias_dtype = options
        dx, dweight, dbias, written = run(*tensors, *settings, *flags)
        dresidual = dy if is_identity else written
        if dweight is not None and weight_dtype is not None:
            dweight = dweight.to(weight_dtype)
        if dbias is not None and bias_dtype is not None:
            dbias = dbias.to(bias_dtype)
    return (
        dx if needs_dx else None,
        dresidual if needs_dresidual else None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
    )


class BatchNormFunction(torch.autograd.Function):
    """`batch_norm_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, rstd, mask = torch.ops.bn_lightning.batch_norm_forward(*arguments)
        *fields, writes_mask = arguments
        a = BatchNormArguments(*fields)
        ctx.mark_non_differentiable(mean, rstd, mask)
        ctx.set_materialize_grads(False)
        saves = SavedTensors.of(a, ctx.needs_input_grad[:4])
        given = mask if writes_mask else None
        # A compiler would copy them.
        is_traced = type(a.x) not in (Tensor, torch.nn.Parameter)
        ctx.save_for_backward(
            a.x if saves.x else None,
            a.residual if saves.residual else None,
            y if saves.y else None,
            *((given, mean, rstd) if is_traced else (pack_statistics(mean, rstd, given),)),
            a.weight,
            a.bias if saves.bias else None,
        )
        ctx.options = SavedOptions.of(a)
        return y, mean, rstd, mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        found = compute_gradients(ctx.options, ctx, dy, torch.ops.bn_lightning.batch_norm_backward)
        # One for each argument of the op, and `writes_mask`.
        return (*found, *(None,) * 9)


class BatchNormBackwardFunction(torch.autograd.Function):
    """`batch_norm_backward` with its gradient, which is that of the composite in reference.py."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call, ctx.needs, ctx.eps = unpack_backward(*arguments)
        *tensors, channels_last, activation, negative_slope = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options = (channels_last, activation, negative_slope)
        return torch.ops.bn_lightning.batch_norm_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        def composite(*tensors: Any) -> tuple[Tensor | None, ...]:
            call = Backward(*tensors, *ctx.options)
            return reference.fused_backward(call, training=ctx.needs.training, eps=ctx.eps)

        needs = ctx.needs
        used = (needs.dx, needs.affine, needs.affine, needs.dresidual)
        wanted = [u if use else None for u, use in zip(upstream, used, strict=True)]
        gradients = reference.vector_jacobian_product(composite, ctx.saved_tensors, wanted)
        # One for each argument of the op that is not a tensor.
        return (*gradients, *(None,) * 8)
