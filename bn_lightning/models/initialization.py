"""Initial weights from one seeded generator, the same for networks with and without BatchNorm.

`initialize` goes through a network's linear and convolution layers in the order of registration and
draws every weight from one generator. Normalization layers draw nothing, so two networks that
differ only in normalization start from the same weights and can be compared as a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Scheme = Callable[[Tensor, torch.Generator], object]
"""Fills a weight (out_features, in_features, *kernel) in place from the generator."""

_INITIALIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class DefaultScheme:
    """A scheme that nobody chose (`init=default`): for networks of this project only.

    Attributes:
        scheme: the scheme.
    """

    scheme: Scheme

    def __call__(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill a weight in place."""
        self.scheme(weight, generator)


def initialize_as_configured(network: nn.Module, scheme: Scheme | None, seed: int) -> str | None:
    """Initialize a network with the scheme of the config group `init`.

    A network of another package keeps the weights of its constructor unless a scheme was chosen.

    Args:
        network: modified in place.
        scheme: None (`init=none`) keeps the weights of any network.
        seed: as for `initialize`.

    Returns:
        A sentence that says whether `init` replaced the weights of a network of another package;
        None for a network of this project, and with `init=none`.
    """
    cls = type(network)
    name = f"{cls.__module__}.{cls.__qualname__}"
    is_own = cls.__module__.startswith("bn_lightning.")
    layers = sum(isinstance(module, _INITIALIZED) for module in network.modules())
    if scheme is None:
        return None
    if isinstance(scheme, DefaultScheme) and not is_own:
        return f"{name} keeps the weights of its constructor; init=he, for example, replaces them"
    initialize(network, scheme, seed)
    if is_own or not layers:
        return None
    return f"init replaces the weights of {layers} layers of {name}; init=none keeps them"


def initialize(network: nn.Module, scheme: Scheme, seed: int) -> None:
    """Fill the weights of linear and convolution layers with `scheme`, and their biases with 0.

    Other layers, including transposed convolutions, keep their values.

    Args:
        network: modified in place; its parameters may be on any device.
        scheme: a function of this module with its keyword arguments bound, or a user's own.
        seed: seed of the generator. The global random state is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _INITIALIZED):
            # On the CPU and contiguous, so that a seed gives the same weights on every device and
            # in every memory format.
            weight = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            scheme(weight, generator)
            with torch.no_grad():
                module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.zero_()


def normal(weight: Tensor, generator: torch.Generator, *, std: float) -> None:
    """Draw w ~ N(0, std²), the paper's "small random Gaussian values" (section 4.1)."""
    nn.init.normal_(weight, 0.0, std, generator=generator)


def uniform(weight: Tensor, generator: torch.Generator, *, bound: float) -> None:
    """Draw w ~ U(-bound, bound)."""
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def zeros(weight: Tensor, generator: torch.Generator) -> None:
    """Set w = 0. All units of a hidden layer then stay identical in training."""
    nn.init.zeros_(weight)


def xavier(
    weight: Tensor, generator: torch.Generator, *, distribution: Literal["normal", "uniform"]
) -> None:
    """Draw w with variance 2 / (fan_in + fan_out). Glorot & Bengio 2010, equation 16.

    Raises:
        ValueError: If `distribution` is neither normal nor uniform.
    """
    fill = {"normal": nn.init.xavier_normal_, "uniform": nn.init.xavier_uniform_}
    if distribution not in fill:
        raise ValueError(f"expected `distribution` to be normal or uniform, got {distribution!r}")
    fill[distribution](weight, generator=generator)


def he(weight: Tensor, generator: torch.Generator) -> None:
    """Draw w ~ N(0, 2 / fan_in). He et al. 2015, equation 10."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def lecun(weight: Tensor, generator: torch.Generator) -> None:
    """Draw w ~ N(0, 1 / fan_in). LeCun et al. 1998, Efficient BackProp, equation 16."""
    nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)


def orthogonal(weight: Tensor, generator: torch.Generator, *, gain: float) -> None:
    """Draw orthonormal rows or columns, times `gain`. Saxe et al. 2014."""
    nn.init.orthogonal_(weight, gain, generator=generator)
