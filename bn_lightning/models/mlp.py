"""A fully connected network with BatchNorm before the activation, after it, or not at all."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.normalization import NormFactory

ACTIVATIONS: dict[str, type[nn.Module]] = {
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
    """What builds an activation of this name, one for each layer.

    Args:
        name: a key of `ACTIVATIONS`.
        options: arguments of its class, `{"negative_slope": 0.3}` for leaky_relu; None for none.

    Raises:
        ValueError: an unknown name, or an option that the class does not take.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    options = dict(options or {})
    factory = partial(ACTIVATIONS[name], **options)
    try:
        factory()
    except TypeError as error:
        raise ValueError(
            f"`activation_options` expected arguments of {name}, got {options}: {error}"
        ) from error
    return factory


class HiddenLayer(nn.Sequential):
    """Linear layer, normalisation and activation: (N, in_features) -> (N, width).

    Ioffe & Szegedy normalise the input of the activation (section 3.2, z = g(BN(Wu))); other
    sources normalise its output. The linear layer keeps its bias under BatchNorm, which makes it
    redundant, so that networks with and without BatchNorm hold the same weights.

    Args:
        in_features: of the input.
        width: units.
        activation: makes the activation.
        norm: makes the normalisation of so many features; None leaves it out.
        norm_position: "before" or "after" the activation.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        activation: ActivationFactory,
        norm: NormFactory | None,
        norm_position: NormPosition,
    ) -> None:
        modules: dict[str, nn.Module] = {
            "linear": nn.Linear(in_features, width),
            "activation": activation(),
        }
        order = ["linear", "activation"]
        if norm is not None:
            modules["norm"] = norm(width)
            order.insert(1 if norm_position == "before" else 2, "norm")
        super().__init__(OrderedDict((name, modules[name]) for name in order))


class MLP(nn.Module):
    """Multilayer perceptron: flatten, normalisation of the input if wanted, hidden layers, output.

    The network of Ioffe & Szegedy 2015, section 4.1, is `MLP(784, [100, 100, 100], 10, "sigmoid",
    norm, "before")`.

    Args:
        in_features: numbers in one input, all its dimensions multiplied.
        widths: units of each hidden layer, in order; may be empty.
        out_features: units of the output layer.
        activation: name of the hidden layers' activation, a key of `ACTIVATIONS`.
        norm: builds each hidden layer's normalisation; None for a network without.
        norm_position: "before" the activation or "after" it.
        activation_options: arguments of the activation; see `activation_factory`.
        input_norm: builds the normalisation of the flattened input; None for none.

    Raises:
        ValueError: a size that is not a positive integer, an unknown activation, option or
            position.
    """

    def __init__(
        self,
        in_features: int,
        widths: list[int],
        out_features: int,
        activation: str,
        norm: NormFactory | None,
        norm_position: NormPosition,
        activation_options: Mapping[str, Any] | None = None,
        input_norm: NormFactory | None = None,
    ) -> None:
        sizes = [in_features, *widths, out_features]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(
                "`in_features`, `widths` and `out_features` expected positive integers, "
                f"got {in_features!r}, {list(widths)!r} and {out_features!r}"
            )
        factory = activation_factory(activation, activation_options)
        if norm_position not in get_args(NormPosition):
            raise ValueError(f"`norm_position` expected before or after, got {norm_position!r}")
        super().__init__()
        self.input_norm = nn.Identity() if input_norm is None else input_norm(in_features)
        self.hidden = nn.Sequential(
            *(
                HiddenLayer(fan_in, width, factory, norm, norm_position)
                for fan_in, width in zip(sizes[:-2], widths, strict=True)
            )
        )
        self.output = nn.Linear(sizes[-2], out_features)

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N K"]:
        return self.output(self.hidden(self.input_norm(x.flatten(1))))
