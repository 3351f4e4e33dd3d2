"""BN-Inception, and Inception, which is the same network without BatchNorm."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.layers import ConvLayer, check_positive_integers
from bn_lightning.models.normalization import NormFactory

InceptionActivation = Literal["relu", "sigmoid"]


class BlockChannels(NamedTuple):
    """Output channels of one block's convolutions, a row of the paper's Figure 5.

    Attributes:
        conv_1x1: of the 1x1 branch. 0 for none: the block then halves height and width by stride 2
            in its last convolutions and its pooling.
        reduce_3x3: of the 1x1 convolution before the 3x3 convolution.
        conv_3x3: of the 3x3 convolution.
        reduce_double_3x3: of the 1x1 convolution before the two 3x3 convolutions.
        double_3x3: of each of the two 3x3 convolutions.
        pool: kind of pooling, "avg" or "max".
        projection: of the 1x1 convolution after the pooling; 0 for none.
    """

    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_double_3x3: int
    double_3x3: int
    pool: Literal["avg", "max"]
    projection: int


FIGURE_5 = {
    "3a": BlockChannels(64, 64, 64, 64, 96, "avg", 32),
    "3b": BlockChannels(64, 64, 96, 64, 96, "avg", 64),
    "3c": BlockChannels(0, 128, 160, 64, 96, "max", 0),
    "4a": BlockChannels(224, 64, 96, 96, 128, "avg", 128),
    "4b": BlockChannels(192, 96, 128, 96, 128, "avg", 128),
    "4c": BlockChannels(160, 128, 160, 128, 160, "avg", 128),
    "4d": BlockChannels(96, 128, 192, 160, 192, "avg", 128),
    "4e": BlockChannels(0, 128, 192, 192, 256, "max", 0),
    "5a": BlockChannels(352, 192, 320, 160, 224, "avg", 128),
    "5b": BlockChannels(352, 192, 320, 192, 224, "max", 128),
}
"""The paper's Figure 5. It lists 576 outputs for 4c and 4d, but their branches sum to 608."""


class InceptionBlock(nn.Module):
    """The parallel branches of one row of `FIGURE_5`, their outputs concatenated.

    Maps (N, C, H, W) to (N, out_channels, H, W), or to half the height and width, rounded up.

    Args:
        in_channels: number of input channels C.
        channels: output channels of the branches.
        conv: builds a convolution with its normalization and activation, as `ConvLayer` does.
    """

    def __init__(
        self, in_channels: int, channels: BlockChannels, conv: Callable[..., ConvLayer]
    ) -> None:
        super().__init__()
        stride = 1 if channels.conv_1x1 else 2
        branches: dict[str, nn.Module] = {}
        if channels.conv_1x1:
            branches["one"] = conv(in_channels, channels.conv_1x1, 1)
        branches["three"] = nn.Sequential(
            conv(in_channels, channels.reduce_3x3, 1),
            conv(channels.reduce_3x3, channels.conv_3x3, 3, stride=stride),
        )
        branches["double_three"] = nn.Sequential(
            conv(in_channels, channels.reduce_double_3x3, 1),
            conv(channels.reduce_double_3x3, channels.double_3x3, 3),
            conv(channels.double_3x3, channels.double_3x3, 3, stride=stride),
        )
        pool: nn.Module
        if channels.pool == "max":
            pool = nn.MaxPool2d(3, stride, padding=1)
        else:
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        if channels.projection:
            pool = nn.Sequential(pool, conv(in_channels, channels.projection, 1))
        branches["pool"] = pool
        self.branches = nn.ModuleDict(branches)
        pooled = channels.projection or in_channels
        self.out_channels = channels.conv_1x1 + channels.conv_3x3 + channels.double_3x3 + pooled

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D I J"]:
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


class Inception(nn.Module):
    """The network of the paper's ImageNet experiment, with or without normalization.

    With 1,000 classes, three channels, BatchNorm and `bias` it has 11,295,240 parameters: 20,032 of
    BatchNorm and 10,016 redundant biases. For images of 224x224 pixels, blocks 3a to 3c work at
    28x28, 4a to 4e at 14x14, and 5a and 5b at 7x7, as in the paper. Other sizes work too, because
    the last pooling is global.

    The paper counts 13.6 million parameters. Here the first convolution is plain, as in public
    implementations, not separable with depth multiplier 8; GoogLeNet's auxiliary classifiers are
    left out. The paper does not state how pooling pads: here as the convolutions beside it do, with
    averages that exclude the padding.

    Args:
        in_channels: number of image channels.
        num_classes: number of logits.
        activation: "relu", or "sigmoid" as in BN-x5-Sigmoid.
        norm: builds the normalization between each of the 69 convolutions and its activation; None
            for no normalization.
        bias: whether the convolutions have a bias, redundant under BatchNorm; keep it there to
            compare networks with the same weights.
        dropout: probability in [0, 1) of dropping a feature before the linear output.
        local_response_norm: whether to normalize across channels after the first and before the
            second pooling as GoogLeNet does. Caffe's values, because the papers give none: 5
            channels, alpha 1e-4, beta 0.75, k 1.

    Raises:
        ValueError: If a size is not a positive integer, the activation is unknown, or `dropout` is
            outside [0, 1).

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2 and Figure 5; Szegedy et al. 2014,
    arXiv 1409.4842, for dropout and local response normalization.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        activation: InceptionActivation,
        norm: NormFactory | None,
        bias: bool,
        dropout: float,
        local_response_norm: bool,
    ) -> None:
        check_positive_integers(in_channels=in_channels, num_classes=num_classes)
        if activation not in get_args(InceptionActivation):
            raise ValueError(f"expected `activation` to be relu or sigmoid, got {activation!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected `dropout` to be in [0, 1), got {dropout}")
        super().__init__()

        conv = partial(ConvLayer, bias=bias, norm=norm, activation=activation)

        def response_norm() -> nn.Module:
            return nn.LocalResponseNorm(5) if local_response_norm else nn.Identity()

        self.stem = nn.Sequential(
            OrderedDict(
                conv1=conv(in_channels, 64, 7, stride=2),
                pool1=nn.MaxPool2d(3, 2, padding=1),
                response_norm1=response_norm(),
                reduce2=conv(64, 64, 1),
                conv2=conv(64, 192, 3),
                response_norm2=response_norm(),
                pool2=nn.MaxPool2d(3, 2, padding=1),
            )
        )
        channels = 192
        self.blocks = nn.Sequential()
        for name, block_channels in FIGURE_5.items():
            block = InceptionBlock(channels, block_channels, conv)
            self.blocks.add_module(name, block)
            channels = block.out_channels
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        x = self.blocks(self.stem(x))
        return self.output(self.dropout(x.mean((2, 3))))
