"""BN-Inception, and the Inception it was made from, which is the same network without BatchNorm."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bn_lightning.models.convolution import ConvLayer, check_ends
from bn_lightning.models.normalization import NormFactory

Activation = Literal["relu", "sigmoid"]


class Branches(NamedTuple):
    """Output channels of one block's convolutions, a row of the paper's Figure 5.

    `reduce_3x3` and `reduce_double_3x3` are of the 1x1 convolutions before a branch's 3x3 ones, of
    which the double branch has two. A block without `one` and `projection` halves height and width:
    its last convolutions and its pooling have stride 2.
    """

    one: int
    reduce_3x3: int
    three: int
    reduce_double_3x3: int
    double_3x3: int
    pool: Literal["avg", "max"]
    projection: int


FIGURE_5 = {
    "3a": Branches(64, 64, 64, 64, 96, "avg", 32),
    "3b": Branches(64, 64, 96, 64, 96, "avg", 64),
    "3c": Branches(0, 128, 160, 64, 96, "max", 0),
    "4a": Branches(224, 64, 96, 96, 128, "avg", 128),
    "4b": Branches(192, 96, 128, 96, 128, "avg", 128),
    "4c": Branches(160, 128, 160, 128, 160, "avg", 128),
    "4d": Branches(96, 128, 192, 160, 192, "avg", 128),
    "4e": Branches(0, 128, 192, 192, 256, "max", 0),
    "5a": Branches(352, 192, 320, 160, 224, "avg", 128),
    "5b": Branches(352, 192, 320, 192, 224, "max", 128),
}
"""The paper's Figure 5. It lists 576 outputs of 4c and 4d, whose branches sum to 608: 608 here."""


class InceptionBlock(nn.Module):
    """The branches of one row of `FIGURE_5` side by side, their outputs one after another.

    Maps (N, inputs, H, W) to (N, outputs, H, W), or to half the height and width, rounded up.

    Args:
        inputs: channels.
        row: the branches' channels; without `one` the block halves height and width.
        conv: makes a convolution with its normalisation and activation, as `ConvLayer`.
    """

    def __init__(self, inputs: int, row: Branches, conv: Callable[..., ConvLayer]) -> None:
        super().__init__()
        stride = 1 if row.one else 2
        branches: dict[str, nn.Module] = {}
        if row.one:
            branches["one"] = conv(inputs, row.one, 1)
        branches["three"] = nn.Sequential(
            conv(inputs, row.reduce_3x3, 1), conv(row.reduce_3x3, row.three, 3, stride=stride)
        )
        branches["double_three"] = nn.Sequential(
            conv(inputs, row.reduce_double_3x3, 1),
            conv(row.reduce_double_3x3, row.double_3x3, 3),
            conv(row.double_3x3, row.double_3x3, 3, stride=stride),
        )
        pool: nn.Module
        if row.pool == "max":
            pool = nn.MaxPool2d(3, stride, padding=1)
        else:
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        branches["pool"] = pool
        if row.projection:
            branches["pool"] = nn.Sequential(pool, conv(inputs, row.projection, 1))
        self.branches = nn.ModuleDict(branches)
        self.outputs = row.one + row.three + row.double_3x3 + (row.projection or inputs)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D I J"]:
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


class Inception(nn.Module):
    """The network of the paper's ImageNet experiment, with normalisation or without.

    With 1,000 classes, three channels, BatchNorm and `bias` it has 11,295,240 parameters, 20,032 of
    them BatchNorm's and 10,016 the biases it makes redundant. At 224 pixels the blocks 3a to 3c see
    28x28, 4a to 4e 14x14 and 5a and 5b 7x7, as in the paper; any other size works, for the last
    pooling is over all that is left.

    Not as in the paper, or not stated there: the first convolution is a plain one, as in public
    implementations, where the paper's is separable with depth multiplier 8; pooling pads like the
    convolutions beside it and leaves the padding out of averages; GoogLeNet's auxiliary classifiers
    are left out. The paper counts 13.6 million parameters for its own.

    Args:
        in_channels: channels of the images.
        num_classes: logits.
        activation: "relu", or "sigmoid" as in BN-x5-Sigmoid.
        norm: builds the normalisation between each of the 69 convolutions and its activation; None
            for none.
        bias: of the convolutions; kept under BatchNorm so that both arms hold the same weights.
        dropout: probability in [0, 1) with which a feature is dropped before the linear layer.
        local_response_norm: normalise across channels after the first and before the second
            pooling, as GoogLeNet does (over 5 channels, alpha 1e-4, beta .75, k 1: Caffe's, for the
            papers give none).

    Raises:
        ValueError: a size that is not a positive integer, an unknown activation, a probability out
            of range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2 and Figure 5; Szegedy et al. 2014,
    arXiv 1409.4842, for dropout and local response normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        activation: Activation,
        norm: NormFactory | None,
        bias: bool,
        dropout: float,
        local_response_norm: bool,
    ) -> None:
        check_ends(in_channels, num_classes)
        if activation not in get_args(Activation):
            raise ValueError(f"`activation` expected relu or sigmoid, got {activation!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` expected a number in [0, 1), got {dropout}")
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
        for name, row in FIGURE_5.items():
            block = InceptionBlock(channels, row, conv)
            self.blocks.add_module(name, block)
            channels = block.outputs
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        x = self.blocks(self.stem(x))
        return self.output(self.dropout(x.mean((2, 3))))
