"""A convolutional network for small images: a few convolutions, then a multilayer perceptron."""

from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.convolution import ConvLayer
from bn_lightning.models.mlp import HiddenLayer, activation_factory
from bn_lightning.models.normalization import NormFactory


class CNN(nn.Module):
    """Convolutions, each halving the image, then dense layers, dropout and a linear output.

    BatchNorm, where there is any, stands before the activation, 2x2 pooling after it. Layers keep
    their biases under BatchNorm, which makes them redundant, so that networks with and without
    BatchNorm hold the same weights.

    Args:
        in_channels: of the images.
        image_size: pixels of a side; halved and rounded down by each convolution.
        channels: of each convolution, in order; at least one.
        kernel_size: pixels of a side of each kernel, odd.
        widths: units of each dense layer, in order; may be empty.
        out_features: units of the output layer.
        activation: of all these layers, a key of `bn_lightning.models.mlp.ACTIVATIONS`.
        norm: builds each convolution's normalisation; None for none.
        dense_norm: builds each dense layer's normalisation; None for none.
        dropout: share of the last dense layer's outputs set to 0 in training, in [0, 1].

    Raises:
        ValueError: a size that is not a positive integer, an even `kernel_size`, an image too
            small to be halved so often, an unknown activation, a share outside [0, 1].
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
        sizes = [in_channels, image_size, kernel_size, out_features, *channels, *widths]
        if not channels or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(
                "`in_channels`, `image_size`, `channels`, `kernel_size`, `widths` and "
                f"`out_features` expected positive integers, and some `channels`, got "
                f"{in_channels!r}, {image_size!r}, {list(channels)!r}, {kernel_size!r}, "
                f"{list(widths)!r} and {out_features!r}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` expected an odd number of pixels, got {kernel_size}")
        side = image_size >> len(channels)
        if side < 1:
            raise ValueError(
                f"`image_size` expected at least {2 ** len(channels)} pixels for {len(channels)} "
                f"convolutions that halve it, got {image_size}"
            )
        factory = activation_factory(activation)
        super().__init__()
        self.convolutions = nn.Sequential()
        planes = in_channels
        for outputs in channels:
            layer = ConvLayer(
                planes, outputs, kernel_size, bias=True, norm=norm, activation=activation
            )
            layer.add_module("pool", nn.MaxPool2d(2))
            self.convolutions.append(layer)
            planes = outputs
        units = [planes * side * side, *widths]
        self.hidden = nn.Sequential(
            *(
                HiddenLayer(fan_in, width, factory, dense_norm, "before")
                for fan_in, width in zip(units[:-1], widths, strict=True)
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(units[-1], out_features)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.output(self.dropout(self.hidden(self.convolutions(x).flatten(1))))
