"""A convolution with its normalisation and its activation, as convolutional networks stack them."""

from collections import OrderedDict

from torch import nn

from bn_lightning.models.mlp import ACTIVATIONS
from bn_lightning.models.normalization import NormFactory


class ConvLayer(nn.Sequential):
    """Convolution, normalisation and activation: (N, inputs, H, W) -> (N, outputs, H', W').

    Zeros are padded so that H' = ceil(H / stride), and W' likewise, for any size.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel_size: of the square kernel, odd.
        stride: of the convolution.
        bias: of the convolution. Under BatchNorm it changes nothing that the network computes.
        norm: builds the normalisation, before the activation; None for none.
        activation: a key of `ACTIVATIONS`; "identity" for none.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2: z = g(BN(Wu)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool,
        norm: NormFactory | None,
        activation: str,
    ) -> None:
        padding = kernel_size // 2
        modules: list[tuple[str, nn.Module]] = [
            ("conv", nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=bias))
        ]
        if norm is not None:
            modules.append(("norm", norm(outputs, spatial_dims=2)))
        if activation != "identity":
            modules.append(("activation", ACTIVATIONS[activation]()))
        super().__init__(OrderedDict(modules))


def check_ends(in_channels: int, num_classes: int) -> None:
    """Refuses images and logits that a network cannot have.

    Raises:
        ValueError: one of the numbers is not a positive integer.
    """
    if any(type(size) is not int or size < 1 for size in (in_channels, num_classes)):
        raise ValueError(
            "`in_channels` and `num_classes` expected positive integers, got "
            f"{in_channels!r} and {num_classes!r}"
        )
