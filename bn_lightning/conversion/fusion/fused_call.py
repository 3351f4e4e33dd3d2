"""One fused call of a BatchNorm, or separate calls where fusion would not be equivalent."""

import operator
from typing import Any

from torch import Tensor, nn

from bn_lightning.conversion.tracing import has_own_forward
from bn_lightning.kernels.activations import activate
from bn_lightning.modules.batch_norm import BatchNorm2d

# A key of kernels.activations.ACTIVATIONS and a negative slope.
NamedActivation = tuple[str, float]
SLOPE = 0.01  # torch's default for leaky_relu, ignored by the others

_MODULE_ACTIVATIONS: dict[type[nn.Module], str] = {
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
    activation: nn.Module | NamedActivation | None = None,
    in_place: bool = False,
) -> Tensor:
    """Compute activation(bn(x) + residual), in one call where that is equivalent.

    Args:
        bn: a BatchNorm. It is fused if it is this package's and has no hooks.
        x: its input.
        residual: fused if it is a tensor with the shape, dtype and device of `x`; otherwise added
            as in the original forward.
        activation: a module is fused if it has no hooks and the kernels know its activation.
        in_place: whether the original forward adds `residual` to bn(x) in place.

    Returns:
        The result of the three operations in order.
    """
    named = _to_named(activation)
    if (
        named is not None
        and isinstance(x, Tensor)
        and is_fusable(bn)
        and bn.activation == "identity"
        and not is_hooked(bn)
        and (residual is None or _matches(residual, x))
    ):
        return bn(x, residual, activation=named[0], negative_slope=named[1])
    y = bn(x)
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual
    if activation is None:
        return y
    return activation(y) if isinstance(activation, nn.Module) else activate(y, *activation)


def is_fusable(module: nn.Module) -> bool:
    """Return whether a module's forward is this package's: it takes residual and activation."""
    return getattr(type(module), "forward", None) is BatchNorm2d.forward


def activation_of(module: nn.Module) -> NamedActivation | None:
    """Return the activation of a torch module, None if the kernels do not have it."""
    if type(module) in _MODULE_ACTIVATIONS:
        return _MODULE_ACTIVATIONS[type(module)], SLOPE
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if type(module) is nn.ELU and module.alpha == 1:
        return "elu", SLOPE
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh", SLOPE
    return None


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, or its instance its own forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_own_forward(module)
    )


def _to_named(activation: nn.Module | NamedActivation | None) -> NamedActivation | None:
    if activation is None:
        return "identity", SLOPE
    if isinstance(activation, nn.Module):
        return None if is_hooked(activation) else activation_of(activation)
    return activation


def _matches(residual: Any, x: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
