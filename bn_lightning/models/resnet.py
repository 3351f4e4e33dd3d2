"""The residual networks for CIFAR of He et al. 2015: ResNet-20, 56, 110 and their kin."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.models.convolution import ConvLayer, check_ends
from bn_lightning.models.normalization import NormFactory

DEEPEST = 1202
"""Layers of the deepest network in the source; one of a few zeros more is never built."""


class ResidualBlock(nn.Module):
    """y = relu(F(x) + x) with two 3x3 convolutions: (N, inputs, H, W) -> (N, outputs, H', W').

    Where the size changes, the shortcut takes every second pixel and fills new channels with zeros:
    the source's option A, which has no parameters.

    Args:
        inputs: channels of x.
        outputs: channels of y, at least `inputs`.
        stride: of the first convolution, 1 or 2.
        norm: makes the normalisation of so many channels; None leaves it out.
        bias: whether the convolutions have one.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: NormFactory | None, bias: bool
    ) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, outputs - inputs
        self.layer1 = ConvLayer(
            inputs, outputs, 3, stride=stride, bias=bias, norm=norm, activation="relu"
        )
        # Called here, beside the addition, so that convert_batchnorm can fuse the two.
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = nn.Identity() if norm is None else norm(outputs, spatial_dims=2)
        self.activation = nn.ReLU()

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D I J"]:
        shortcut = x
        if self.stride > 1 or self.new_channels:
            x_half = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(x_half, (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.norm2(self.conv2(self.layer1(x))) + shortcut)


class CIFARResNet(nn.Module):
    """A 3x3 convolution, three groups of residual blocks of 16, 32 and 64 channels, a linear layer.

    Of images of 32x32 pixels the groups see 32x32, 16x16 and 8x8; any other size works. Each group
    has (depth - 2) / 6 blocks of two convolutions. Without biases, with BatchNorm and ten classes,
    ResNet-20 has 269,722 parameters, ResNet-56 853,018 and ResNet-110 1,727,962.

    Args:
        depth: layers with weights, 8, 14, 20, ...: 6n + 2, at most `DEEPEST`.
        in_channels: channels of the images.
        num_classes: logits.
        norm: builds the normalisation after each convolution; None for none.
        bias: of the convolutions; kept under BatchNorm so that both arms hold the same weights.

    Raises:
        ValueError: a depth that is not 6n + 2 or is too large, or a size that is no positive
            integer.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """

    def __init__(
        self, depth: int, in_channels: int, num_classes: int, norm: NormFactory | None, bias: bool
    ) -> None:
        if type(depth) is not int or not 8 <= depth <= DEEPEST or depth % 6 != 2:
            raise ValueError(
                f"`depth` expected 6n + 2, as 20, 56 or 110, and at most {DEEPEST}, got {depth!r}"
            )
        check_ends(in_channels, num_classes)
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
