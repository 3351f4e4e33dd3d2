"""The activations a BatchNorm can end in: one table, name -> value, and what its gradient needs.

    y = act(z),  z = bn(x) + residual

The backward needs act'(z). Without a residual, z is recomputed from x, which is saved anyway. With
one, the smallest thing that is right is saved beside x:

    MASK      act' takes two values: one bit an element says which
    OUTPUT    act' is a function of y, which exists anyway
    RESIDUAL  neither serves: the residual, which in a network lives on as its block's input

The Triton side, `activate` and `multiply_derivative`, is in elements.py under the same names; a
test holds the two against each other.
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
class Activation:
    """An activation in torch.

    Attributes:
        value: z -> act(z), differentiable as often as torch's own; leaky_relu's takes the slope.
        saves: what the gradient needs beside x when there is a residual.
        derivative_of_output: y -> act'(z), where `saves` is OUTPUT.
    """

    value: Callable[..., Tensor]
    saves: Saves
    derivative_of_output: Callable[[Tensor], Tensor] | None = None


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z: z, Saves.NOTHING),
    "relu": Activation(F.relu, Saves.MASK),
    "relu6": Activation(F.relu6, Saves.MASK),
    "leaky_relu": Activation(F.leaky_relu, Saves.MASK),
    "elu": Activation(F.elu, Saves.OUTPUT, lambda y: torch.where(y > 0, 1.0, y + 1)),
    "silu": Activation(F.silu, Saves.RESIDUAL),
    "gelu": Activation(F.gelu, Saves.RESIDUAL),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), Saves.RESIDUAL),
    "hardswish": Activation(F.hardswish, Saves.RESIDUAL),
    "mish": Activation(F.mish, Saves.RESIDUAL),
    "sigmoid": Activation(torch.sigmoid, Saves.OUTPUT, lambda y: y * (1 - y)),
    "tanh": Activation(torch.tanh, Saves.OUTPUT, lambda y: 1 - y * y),
}


def recomputes_z(activation: str, has_residual: bool) -> bool:
    """Says whether the gradient computes z again: from x, bias and, if there is one, residual."""
    if activation == "identity":
        return False
    return not has_residual or ACTIVATIONS[activation].saves is Saves.RESIDUAL


def saves_mask(activation: str, has_residual: bool) -> bool:
    """Says whether the forward writes a bit an element for the gradient."""
    return has_residual and ACTIVATIONS[activation].saves is Saves.MASK


def saves_output(activation: str, has_residual: bool) -> bool:
    """Says whether the gradient reads y."""
    return has_residual and ACTIVATIONS[activation].saves is Saves.OUTPUT


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Computes act(z).

    Args:
        z: any shape, any float dtype.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu below zero; the others do not read it.

    Returns:
        act(z), with the shape and dtype of `z`.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return ACTIVATIONS[activation].value(z)


def derivative(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Computes act'(z) by torch's own derivative, differentiable in `z`.

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
    """Says, where `saves` is MASK, at which z the derivative is 1: the bit that is saved."""
    above = z > 0
    return above & (z < 6) if activation == "relu6" else above


def lower_derivative(activation: str, negative_slope: float) -> float:
    """Returns the derivative where `upper_branch` is false."""
    return negative_slope if activation == "leaky_relu" else 0.0
