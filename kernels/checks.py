"""Check the arguments of a BatchNorm before anything is allocated or written.

Where ATen raises an error of its own, the exception and its words are ATen's.
"""

from torch import Tensor

from bn_lightning.kernels.activations import ACTIVATIONS

BACKENDS = ("auto", "native", "triton")


def check_backend(backend: str | None, may_be_none: bool = False) -> None:
    """Raise a ValueError for an unknown backend."""
    if backend not in BACKENDS and not (may_be_none and backend is None):
        choices = f"{'None or ' if may_be_none else ''}one of {BACKENDS}"
        raise ValueError(f"expected `backend` to be {choices}, got {backend!r}; choose one")


def check_activation(activation: str) -> None:
    """Raise a ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expected `activation` to be one of {tuple(ACTIVATIONS)}, got {activation!r}; choose "
            f"one"
        )


def check_average(running_mean: Tensor | None, num_batches_tracked: Tensor | None) -> None:
    """Raise a ValueError if a cumulative average (`momentum` None) lacks the number of batches."""
    if running_mean is not None and num_batches_tracked is None:
        raise ValueError(
            "expected `num_batches_tracked` to be a tensor with `momentum`=None, which averages "
            "over the batches it counts, got None; pass both, or a `momentum`"
        )


def check_choices(x: Tensor, residual: Tensor | None, activation: str, backend: str) -> None:
    """Check the arguments that torch's BatchNorm does not have, and the dtype of `x`.

    Raises:
        ValueError: an unknown activation or backend; a residual of another shape.
        RuntimeError: a residual on another device.
        NotImplementedError: an `x` of integers.
    """
    check_backend(backend)
    check_activation(activation)
    if not x.is_floating_point():
        raise NotImplementedError(
            f"expected `x` to be a tensor of floats, got {x.dtype}; convert it with x.float()"
        )
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(
            f"expected `residual` to have the shape of `x`, {tuple(x.shape)}, got "
            f"{tuple(residual.shape)}; expand or project it first"
        )
    if residual.device != x.device:
        raise _on_another_device(x, "residual", residual)


def check_batch(x: Tensor, training: bool) -> None:
    """Raise torch's error, and what to do, if a channel has one value in training."""
    if training and x.dim() > 1 and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}; "
            f"use a batch of at least 2 samples, or model.eval()"
        )


def check_like_aten(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    is_whole_batch: bool = True,
) -> None:
    """Check what ATen checks, with its exceptions and in its words.

    Without `is_whole_batch`, `x` is the batch of one rank, which may have one value per channel.

    Raises:
        ValueError: fewer than two dimensions; one value per channel in training; `eps` not
            positive in training; one running statistic without the other.
        RuntimeError: a running statistic missing in evaluation, or one that requires a gradient;
            a per-channel tensor of another length than C or on another device.
    """
    if x.dim() < 2:
        raise ValueError(
            f"expected `x` to be (N, C) or (N, C, ...), got shape {tuple(x.shape)}; add a dimension"
        )
    if is_whole_batch:
        check_batch(x, training)
    if eps < 0 or (training and eps == 0):
        raise ValueError(
            f"batch_norm eps must be positive during training, but got {eps}"
            if training
            else f"batch_norm eps must be non-negative, but got {eps}"
        )
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is None and not training:
            raise RuntimeError(
                f"{name} must be defined in evaluation mode; pass it, or training=True"
            )
        if running is not None and running.requires_grad:
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument '{name}'; "
                f"pass {name}.detach()"
            )
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    C, device = x.shape[1], x.device
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
        if value.device != device:
            raise _on_another_device(x, name, value)


def _on_another_device(x: Tensor, name: str, value: Tensor) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but `x` is on {x.device} and "
        f"`{name}` on {value.device}; move one of them"
    )
