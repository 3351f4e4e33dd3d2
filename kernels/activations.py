"""The activations that can follow a BatchNorm: a table from name to value and gradient.

    y = act(z),  z = bn(x) + residual

The backward needs act'(z). Without a residual, z is recomputed from x, which is saved anyway. With
one, the smallest sufficient tensor is saved beside x:

    MASK      act' has two values, and one bit per element says which
    OUTPUT    act' is a function of y, which exists anyway
    RESIDUAL  otherwise the residual, which exists anyway as the input of its block

The Triton implementation is in tile_access.py; a test compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


class Saves(Enum):
    """What the gradient of act(bn(x) + residual) needs beside x."""

    NOTHING = "nothing"
    MASK = "mask"
    OUTPUT = "output"
    RESIDUAL = "residual"


@dataclass(frozen=True)
class ActivationFunction:
    """An activation in torch.

    Attributes:
        value: z -> act(z), differentiable as often as torch's; leaky_relu also takes the slope.
        saves: what the gradient needs beside x if there is a residual.
        derivative_of_output: y -> act'(z) if `saves` is OUTPUT, else None.
    """

    value: Callable[..., Tensor]
    saves: Saves
    derivative_of_output: Callable[[Tensor], Tensor] | None = None


ACTIVATIONS: dict[str, ActivationFunction] = {
    "identity": ActivationFunction(lambda z: z, Saves.NOTHING),
    "relu": ActivationFunction(F.relu, Saves.MASK),
    "relu6": ActivationFunction(F.relu6, Saves.MASK),
    "leaky_relu": ActivationFunction(F.leaky_relu, Saves.MASK),
    "elu": ActivationFunction(F.elu, Saves.OUTPUT, lambda y: torch.where(y > 0, 1.0, y + 1)),
    "silu": ActivationFunction(F.silu, Saves.RESIDUAL),
    "gelu": ActivationFunction(F.gelu, Saves.RESIDUAL),
    "gelu_tanh": ActivationFunction(partial(F.gelu, approximate="tanh"), Saves.RESIDUAL),
    "hardswish": ActivationFunction(F.hardswish, Saves.RESIDUAL),
    "mish": ActivationFunction(F.mish, Saves.RESIDUAL),
    "sigmoid": ActivationFunction(torch.sigmoid, Saves.OUTPUT, lambda y: y * (1 - y)),
    "tanh": ActivationFunction(torch.tanh, Saves.OUTPUT, lambda y: 1 - y * y),
}


def recomputes_z(activation: str, has_residual: bool) -> bool:
    """Return whether the gradient recomputes z, from x, bias and the residual if there is one."""
    if activation == "identity":
        return False
    return not has_residual or ACTIVATIONS[activation].saves is Saves.RESIDUAL


def saves_mask(activation: str, has_residual: bool) -> bool:
    """Return whether the forward writes the mask of the derivative for the gradient."""
    return has_residual and ACTIVATIONS[activation].saves is Saves.MASK


def saves_output(activation: str, has_residual: bool) -> bool:
    """Return whether the gradient reads y."""
    return has_residual and ACTIVATIONS[activation].saves is Saves.OUTPUT


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Compute act(z).

    Args:
        z: any shape, any float dtype.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu for z < 0; the others ignore it.

    Returns:
        act(z), with the shape and dtype of `z`.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return ACTIVATIONS[activation].value(z)


def derivative(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Compute act'(z) by autograd, differentiable in `z`.

    Args:
        z: any shape, any float dtype.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.

    Returns:
        act'(z), with the shape and dtype of `z`.
    """
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        y = activate(z, activation, negative_slope)
        (slope,) = torch.autograd.grad(y, z, torch.ones_like(y), create_graph=True)
    return slope


def upper_branch(z: Tensor, activation: str) -> Tensor:
    """Return where the derivative is 1: the mask, for an activation whose `saves` is MASK."""
    above = z > 0
    return above & (z < 6) if activation == "relu6" else above


def lower_derivative(activation: str, negative_slope: float) -> float:
    """Return the derivative where `upper_branch` is False."""
    return negative_slope if activation == "leaky_relu" else 0.0
