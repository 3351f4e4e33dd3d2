"""The residual networks of He et al. 2015 for CIFAR: ResNet-20, ResNet-56, ResNet-110, ..."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.models.layers import ConvLayer, check_positive_integers
from bn_lightning.models.normalization import NormFactory

MAX_DEPTH = 1202
"""Depth of the deepest network in the paper; catches a depth typed with too many zeros."""


class ResidualBlock(nn.Module):
    """y = relu(F(x) + x) with two 3x3 convolutions: (N, C, H, W) -> (N, D, H', W').

    Where the shape changes, the shortcut takes every second pixel and pads the new channels with
    zeros, which needs no parameters (option A of the paper).

    Args:
        in_channels: number of channels C of x.
        out_channels: number of channels D of y, at least `in_channels`.
        stride: stride of the first convolution, 1 or 2.
        norm: builds the normalization after each convolution; None for no normalization.
        bias: whether the convolutions have a bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm: NormFactory | None, bias: bool
    ) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.layer1 = ConvLayer(
            in_channels, out_channels, 3, stride=stride, bias=bias, norm=norm, activation="relu"
        )
        # In this forward, next to the addition, so that convert_batchnorm can fuse the two.
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = nn.Identity() if norm is None else norm(out_channels, spatial_dims=2)
        self.activation = nn.ReLU()

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D I J"]:
        shortcut = x
        if self.stride > 1 or self.new_channels:
            x_half = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(x_half, (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.norm2(self.conv2(self.layer1(x))) + shortcut)


class CIFARResNet(nn.Module):
    """A 3x3 convolution, residual blocks of 16, 32 and 64 channels, and a linear output.

    Each of the three groups has (depth - 2) / 6 blocks of two convolutions. For images of 32x32
    pixels they work at 32x32, 16x16 and 8x8; other sizes work too. Without biases, with BatchNorm
    and ten classes, ResNet-20 has 269,722 parameters, ResNet-56 853,018 and ResNet-110 1,727,962.

    Args:
        depth: number of layers with weights: 8, 14, 20, ... (6n + 2), at most `MAX_DEPTH`.
        in_channels: number of image channels.
        num_classes: number of logits.
        norm: builds the normalization after each convolution; None for no normalization.
        bias: whether the convolutions have a bias, redundant under BatchNorm; keep it there to
            compare networks with the same weights.

    Raises:
        ValueError: If `depth` is not 6n + 2 or too large, or a size is not a positive integer.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """

    def __init__(
        self, depth: int, in_channels: int, num_classes: int, norm: NormFactory | None, bias: bool
    ) -> None:
        if type(depth) is not int or not 8 <= depth <= MAX_DEPTH or depth % 6 != 2:
            raise ValueError(
                f"expected `depth` to be 6n + 2, e.g. 20, 56 or 110, and at most {MAX_DEPTH}, got"
                f" {depth!r}"
            )
        check_positive_integers(in_channels=in_channels, num_classes=num_classes)
        super().__init__()
        self.stem = ConvLayer(in_channels, 16, 3, bias=bias, norm=norm, activation="relu")
        self.blocks = nn.Sequential()
        channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                stride = 1 if width == channels else 2
                self.blocks.append(ResidualBlock(channels, width, stride, norm, bias))
                channels = width
        self.output = nn.Linear(channels, num_classes)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.output(self.blocks(self.stem(x)).mean((2, 3)))
