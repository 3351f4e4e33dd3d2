"""A multilayer perceptron with BatchNorm before the activation, after it, or not at all."""

from collections.abc import Mapping
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.layers import (
    HiddenLayer,
    NormPosition,
    activation_factory,
    check_positive_integers,
)
from bn_lightning.models.normalization import NormFactory


class MLP(nn.Sequential):
    """Multilayer perceptron: flatten, optional input normalization, hidden layers, linear output.

    The network of Ioffe & Szegedy 2015, section 4.1, is `MLP(784, [100, 100, 100], 10, "sigmoid",
    norm, "before")`.

    Args:
        in_features: number of values in one flattened input.
        widths: number of units of each hidden layer, in order; may be empty.
        out_features: number of units of the output layer.
        activation: activation of the hidden layers, a key of `layers.ACTIVATION_MODULES`.
        norm: builds the normalization of each hidden layer; None for no normalization.
        norm_position: "before" or "after" the activation.
        activation_options: arguments of the activation; see `layers.activation_factory`.
        input_norm: builds the normalization of the flattened input; None for no normalization.

    Raises:
        ValueError: If a size is not a positive integer, or an activation, option or position is
            unknown.
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
        check_positive_integers(in_features=in_features, widths=widths, out_features=out_features)
        factory = activation_factory(activation, activation_options)
        if norm_position not in get_args(NormPosition):
            raise ValueError(
                f"expected `norm_position` to be before or after, got {norm_position!r}"
            )
        super().__init__()
        self.flatten = nn.Flatten()
        self.input_norm = nn.Identity() if input_norm is None else input_norm(in_features)
        features = [in_features, *widths]
        self.hidden = nn.Sequential(
            *(
                HiddenLayer(fan_in, width, factory, norm, norm_position)
                for fan_in, width in zip(features[:-1], widths, strict=True)
            )
        )
        self.output = nn.Linear(features[-1], out_features)

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N K"]:
        # torch's `compile()` does nothing for a module that inherits its forward from torch.
        return super().forward(x)
