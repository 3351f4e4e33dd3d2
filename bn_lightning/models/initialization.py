"""Initial weights from one seeded stream, the same for networks with and without BatchNorm.

`initialize` walks a network's linear and convolution layers in the order in which they were
registered and draws every weight from one generator. Normalisation layers draw nothing, so two
networks that differ only in them start from the same weights: the arms of a comparison are paired.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Scheme = Callable[[Tensor, torch.Generator], object]
"""Fills a weight (out_features, in_features, *kernel) in place from the generator."""

_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
)


def initialize(network: nn.Module, scheme: Scheme, seed: int) -> None:
    """Fill the weights of linear and convolution layers by `scheme`, and their biases with 0.

    Other layers, transposed convolutions among them, keep what they have.

    Args:
        network: changed in place, whatever the device its parameters are on.
        scheme: one of this module's functions with its own arguments bound, or the user's own.
        seed: of the stream of random numbers; the global stream is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _WEIGHTED):
            # Drawn on the CPU, so that a seed gives the same weights on every device,
            # and contiguous, so in every memory format.
            weight = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            scheme(weight, generator)
            with torch.no_grad():
                module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.zero_()


def normal(weight: Tensor, generator: torch.Generator, *, std: float) -> None:
    """w ~ N(0, std²). The paper's "small random Gaussian values" (section 4.1)."""
    nn.init.normal_(weight, 0.0, std, generator=generator)


def uniform(weight: Tensor, generator: torch.Generator, *, bound: float) -> None:
    """w ~ U(-bound, bound)."""
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def zeros(weight: Tensor, generator: torch.Generator) -> None:
    """w = 0: every unit of a layer stays the same as its neighbours."""
    nn.init.zeros_(weight)


def xavier(
    weight: Tensor, generator: torch.Generator, *, distribution: Literal["normal", "uniform"]
) -> None:
    """Variance 2 / (fan_in + fan_out). Glorot & Bengio 2010, equation 16.

    Raises:
        ValueError: `distribution` is neither normal nor uniform.
    """
    fill = {"normal": nn.init.xavier_normal_, "uniform": nn.init.xavier_uniform_}
    if distribution not in fill:
        raise ValueError(f"`distribution` expected normal or uniform, got {distribution!r}")
    fill[distribution](weight, generator=generator)


def he(weight: Tensor, generator: torch.Generator) -> None:
    """w ~ N(0, 2 / fan_in). He et al. 2015, equation 10."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def lecun(weight: Tensor, generator: torch.Generator) -> None:
    """w ~ N(0, 1 / fan_in). LeCun et al. 1998, Efficient BackProp, equation 16."""
    nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)


def orthogonal(weight: Tensor, generator: torch.Generator, *, gain: float) -> None:
    """Orthonormal rows or columns times `gain`. Saxe et al. 2014."""
    nn.init.orthogonal_(weight, gain, generator=generator)
