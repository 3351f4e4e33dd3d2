"""One call of a BatchNorm with what follows it, or, where that is not the same, one by one."""

import operator
from typing import Any

from torch import Tensor, nn

from bn_lightning.conversion.tracing import has_own_forward
from bn_lightning.kernels.activations import activate
from bn_lightning.modules.batch_norm import BatchNorm2d

# An activation by its name in kernels/activations.py, with the slope of leaky_relu.
Named = tuple[str, float]
SLOPE = 0.01

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Mish: "mish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}


def call_batch_norm(
    bn: nn.Module,
    x: Tensor,
    residual: Any = None,
    activation: nn.Module | Named | None = None,
    in_place: bool = False,
) -> Tensor:
    """Computes activation(bn(x) + residual), in one call where that gives the same.

    Args:
        bn: a BatchNorm; called alone unless it is one of this package's, without hooks.
        x: its input.
        residual: fused if it is a tensor with the shape, dtype and device of `x`; anything else is
            added as the original forward would.
        activation: called by itself if it is a module with hooks, or not one of those known.
        in_place: whether the original adds `residual` to bn(x) in place.

    Returns:
        What the three do one after the other.
    """
    named = _named(activation)
    if (
        named is not None
        and isinstance(x, Tensor)
        and is_fusable(bn)
        and bn.activation == "identity"
        and not is_hooked(bn)
        and (residual is None or _is_like(residual, x))
    ):
        return bn(x, residual, activation=named[0], negative_slope=named[1])
    y = bn(x)
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual
    if activation is None:
        return y
    return activation(y) if isinstance(activation, nn.Module) else activate(y, *activation)


def is_fusable(module: nn.Module) -> bool:
    """Returns whether a module takes a residual and an activation for one call.

    By its forward: a subclass may have replaced it.
    """
    return getattr(type(module), "forward", None) is BatchNorm2d.forward


def activation_of(module: nn.Module) -> Named | None:
    """Returns the activation that a module of torch's computes, None if the kernels lack it."""
    if type(module) in _MODULES:
        return _MODULES[type(module)], SLOPE
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if type(module) is nn.ELU and module.alpha == 1:
        return "elu", SLOPE
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh", SLOPE
    return None


def is_hooked(module: nn.Module) -> bool:
    """Returns whether hooks, or a forward of the instance's own, watch over a module's calls.

    torch has no public way to ask for hooks.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_own_forward(module)
    )


def _named(activation: nn.Module | Named | None) -> Named | None:
    if activation is None:
        return "identity", SLOPE
    if isinstance(activation, nn.Module):
        return None if is_hooked(activation) else activation_of(activation)
    return activation


def _is_like(residual: Any, x: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
