"""A convolutional network for small images: a few convolutions, then a multilayer perceptron."""

from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.layers import (
    ConvLayer,
    HiddenLayer,
    activation_factory,
    check_positive_integers,
)
from bn_lightning.models.normalization import NormFactory


class CNN(nn.Module):
    """Convolutions with 2x2 max pooling, then dense layers, dropout and a linear output.

    BatchNorm comes before the activation, pooling after it. Layers keep their biases under
    BatchNorm, where they are redundant, so that networks with and without BatchNorm have the same
    weights.

    Args:
        in_channels: number of image channels.
        image_size: side of the square image in pixels; each pooling halves it, rounded down.
        channels: output channels of each convolution, in order; at least one.
        kernel_size: side of each kernel in pixels, odd.
        widths: number of units of each dense layer, in order; may be empty.
        out_features: number of units of the output layer.
        activation: activation of all hidden layers, a key of `layers.ACTIVATION_MODULES`.
        norm: builds the normalization of each convolution; None for no normalization.
        dense_norm: builds the normalization of each dense layer; None for no normalization.
        dropout: probability in [0, 1] of zeroing an output of the last dense layer in training.

    Raises:
        ValueError: If a size is not a positive integer, `kernel_size` is even, the image is too
            small for the poolings, the activation is unknown, or `dropout` is outside [0, 1].
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        channels: list[int],
        kernel_size: int,
        widths: list[int],
        out_features: int,
        activation: str,
        norm: NormFactory | None,
        dense_norm: NormFactory | None,
        dropout: float,
    ) -> None:
        check_positive_integers(
            in_channels=in_channels,
            image_size=image_size,
            channels=channels,
            kernel_size=kernel_size,
            widths=widths,
            out_features=out_features,
        )
        if not channels:
            raise ValueError("expected `channels` to have at least one number, got []")
        if kernel_size % 2 == 0:
            raise ValueError(f"expected `kernel_size` to be odd, got {kernel_size}")
        side = image_size >> len(channels)
        if side < 1:
            raise ValueError(
                f"expected `image_size` to be at least {2 ** len(channels)} pixels for"
                f" {len(channels)} poolings that halve it, got {image_size}"
            )
        factory = activation_factory(activation)
        super().__init__()
        self.convolutions = nn.Sequential()
        for inputs, outputs in zip([in_channels, *channels], channels, strict=False):
            layer = ConvLayer(
                inputs, outputs, kernel_size, bias=True, norm=norm, activation=activation
            )
            layer.add_module("pool", nn.MaxPool2d(2))
            self.convolutions.append(layer)
        features = [channels[-1] * side * side, *widths]
        self.hidden = nn.Sequential(
            *(
                HiddenLayer(fan_in, width, factory, dense_norm, "before")
                for fan_in, width in zip(features[:-1], widths, strict=True)
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(features[-1], out_features)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.output(self.dropout(self.hidden(self.convolutions(x).flatten(1))))
