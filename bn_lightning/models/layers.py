"""Layers that several networks share: linear or convolution, normalization, activation."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from bn_lightning.models.normalization import NormFactory

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}

NormPosition = Literal["before", "after"]

ActivationFactory = Callable[[], nn.Module]


def activation_factory(name: str, options: Mapping[str, Any] | None = None) -> ActivationFactory:
    """Return a function that builds an activation, to be called once per layer.

    Args:
        name: key of `ACTIVATION_MODULES`.
        options: arguments of the activation's class, e.g. `{"negative_slope": 0.3}` for leaky_relu.

    Raises:
        ValueError: If the name is unknown or the class does not take an option.
    """
    if name not in ACTIVATION_MODULES:
        names = ", ".join(ACTIVATION_MODULES)
        raise ValueError(f"expected `activation` to be one of {names}, got {name!r}")
    options = dict(options or {})
    factory = partial(ACTIVATION_MODULES[name], **options)
    try:
        factory()
    except TypeError as error:
        raise ValueError(
            f"expected `activation_options` to be arguments of {name}, got {options}: {error}"
        ) from error
    return factory


class HiddenLayer(nn.Sequential):
    """Linear layer, normalization and activation: (N, in_features) -> (N, out_features).

    Ioffe & Szegedy normalize the input of the activation (section 3.2, z = g(BN(Wu))); other
    sources normalize its output. The linear layer keeps its bias under BatchNorm, where the bias is
    redundant, so that networks with and without BatchNorm have the same weights.

    Args:
        in_features: number of input features.
        out_features: number of units.
        activation: builds the activation.
        norm: builds the normalization; None for no normalization.
        norm_position: "before" or "after" the activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: ActivationFactory,
        norm: NormFactory | None,
        norm_position: NormPosition,
    ) -> None:
        modules: dict[str, nn.Module] = {
            "linear": nn.Linear(in_features, out_features),
            "activation": activation(),
        }
        order = ["linear", "activation"]
        if norm is not None:
            modules["norm"] = norm(out_features)
            order.insert(1 if norm_position == "before" else 2, "norm")
        super().__init__(OrderedDict((name, modules[name]) for name in order))


class ConvLayer(nn.Sequential):
    """2D convolution, normalization and activation: (N, C, H, W) -> (N, D, H', W').

    Zero padding makes H' = ceil(H / stride) and W' = ceil(W / stride) for every input size.

    Args:
        in_channels: number of input channels C.
        out_channels: number of output channels D.
        kernel_size: side of the square kernel in pixels, odd.
        stride: stride of the convolution.
        bias: whether the convolution has a bias. Under BatchNorm the bias is redundant.
        norm: builds the normalization before the activation; None for no normalization.
        activation: key of `ACTIVATION_MODULES`; "identity" adds no module.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2: z = g(BN(Wu)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool,
        norm: NormFactory | None,
        activation: str,
    ) -> None:
        padding = kernel_size // 2
        modules: list[tuple[str, nn.Module]] = [
            ("conv", nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias))
        ]
        if norm is not None:
            modules.append(("norm", norm(out_channels, spatial_dims=2)))
        if activation != "identity":
            modules.append(("activation", ACTIVATION_MODULES[activation]()))
        super().__init__(OrderedDict(modules))


def check_positive_integers(**sizes: Any) -> None:
    """Check that each argument is a positive integer or a sequence of them.

    Raises:
        ValueError: If one is not. The message names the argument.
    """
    for name, value in sizes.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if is_list else [value]
        if any(type(size) is not int or size < 1 for size in values):
            what, got = ("positive integers", values) if is_list else ("a positive integer", value)
            raise ValueError(f"expected `{name}` to be {what}, got {got!r}")
