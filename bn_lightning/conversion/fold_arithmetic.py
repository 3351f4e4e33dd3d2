"""Computes the weights of a layer that a BatchNorm is folded into, and what takes its place.

    s = weight / sqrt(running_var + eps),  t = bias - running_mean s

    layer first:      bn(W x + b) = (s W) x + (s b + t)
    BatchNorm first:  W bn(x) + b = (W s) x + (W t + b)

The arithmetic is fp64; the results are rounded once, to the dtype of the layer.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.conversion.adapters import find_adapter
from bn_lightning.kernels.activations import activate

TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FoldedPair:
    """A BatchNorm and the layers that it can be folded into.

    Attributes:
        norm: the BatchNorm.
        layers: convolutions or linear layers, at least one.
        layers_first: whether they come before the BatchNorm.
        rows_only: whether a BatchNorm1d beside a linear layer takes (N, C).
    """

    norm: nn.Module
    layers: tuple[nn.Module, ...]
    layers_first: bool = True
    rows_only: bool = False


class RowsOnly(nn.Module):
    """Checks the input of a BatchNorm1d that is folded into a Linear, which must be (N, C).

    For an input (N, C, L) they cannot be folded: Linear computes features in the last dimension,
    BatchNorm1d normalizes the second.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`, or raise a ValueError if its shape is not (N, C)."""
        if input.dim() != 2:
            raise ValueError(
                "expected `input` to have the shape (N, C) where a BatchNorm1d is folded into a"
                f" Linear, got {tuple(input.shape)}; use the model before fold_batchnorm"
            )
        return input


class Activation(nn.Module):
    """Computes the activation of a folded BatchNorm.

    Args:
        name: activation of `bn_lightning.kernels.batch_norm`.
        negative_slope: slope of "leaky_relu".
    """

    def __init__(self, name: str, negative_slope: float) -> None:
        super().__init__()
        self.name = name
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of `input`."""
        return activate(input, self.name, self.negative_slope)

    def extra_repr(self) -> str:
        """Return the name."""
        return self.name


def normalize_in_evaluation(norm: Any, input: Tensor) -> Tensor:
    """Compute a BatchNorm of any known class in evaluation, by torch's function."""
    adapter = find_adapter(norm)
    if adapter is not None and adapter.scale_and_shift and input.dtype != norm.weight.dtype:
        input = input.to(torch.promote_types(input.dtype, norm.weight.dtype))
    state = norm.running_mean, norm.running_var, *_affine(norm)
    return follow_norm(norm)(F.batch_norm(input, *state, training=False, eps=_eps(norm)))


def follow_norm(norm: Any, rows_only: bool = False) -> nn.Module:
    """Return the module that takes the place of a folded BatchNorm: all but the normalization.

    Args:
        norm: of torch, of this package, or with an adapter.
        rows_only: whether it takes (N, C) only.
    """
    adapter = find_adapter(norm)
    owner: Any = norm if adapter is None else adapter
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if rows_only:
        parts["rows_only"] = RowsOnly()
    if getattr(owner, "activation", "identity") != "identity":
        parts["activation"] = Activation(owner.activation, owner.negative_slope)
    for name in () if adapter is None else adapter.after:
        parts[name] = norm._modules[name]
    return nn.Sequential(parts) if parts else nn.Identity()


@torch.no_grad()
def fold_pair(pair: FoldedPair) -> None:
    """Give the layers of a pair their new weights and biases, as new parameters."""
    norm: Any = pair.norm
    weight, bias = _affine(norm)
    scale = (norm.running_var.double() + _eps(norm)).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    for layer in pair.layers:
        if pair.layers_first:
            _scale_output(layer, scale, shift)
        else:
            _scale_input(layer, scale, shift)


def _scale_output(layer: Any, scale: Tensor, shift: Tensor) -> None:
    old = layer.weight.double()
    if isinstance(layer, TRANSPOSED_CONVS):  # (inputs, outputs / groups, ...)
        groups = old.unflatten(0, (layer.groups, -1))
        scales = scale.view(layer.groups, 1, -1, *(1 for _ in layer.kernel_size))
        new = (groups * scales).flatten(0, 1)
    else:
        new = old * scale.view(-1, *(1 for _ in old.shape[1:]))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    _set_parameters(layer, new, bias)


def _scale_input(layer: Any, scale: Tensor, shift: Tensor) -> None:
    old = layer.weight.double()  # (outputs, inputs / groups, ...)
    groups = getattr(layer, "groups", 1)
    by_group = old.unflatten(0, (groups, -1))
    shape = (groups, 1, -1, *(1 for _ in old.shape[2:]))
    new = (by_group * scale.view(shape)).flatten(0, 1)
    bias = (by_group * shift.view(shape)).flatten(0, 1).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    _set_parameters(layer, new, bias)


def _set_parameters(layer: Any, weight: Tensor, bias: Tensor) -> None:
    old = layer.weight
    layer.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)


def _affine(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _eps(norm: Any) -> float:
    adapter = find_adapter(norm)
    return norm.eps if adapter is None or adapter.eps is None else adapter.eps
