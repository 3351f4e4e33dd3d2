"""ConvLayer: order of its modules, formula and sizes. HiddenLayer is tested with MLP."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning.models.layers import ConvLayer


def norm(num_features: int, spatial_dims: int = 0) -> nn.Module:
    assert spatial_dims == 2
    return nn.BatchNorm2d(num_features)


def test_normalization_comes_before_the_activation() -> None:
    torch.manual_seed(0)
    layer = ConvLayer(3, 5, 3, stride=2, bias=True, norm=norm, activation="sigmoid")
    assert list(dict(layer.named_children())) == ["conv", "norm", "activation"]
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(4, 3, 7, 8) + 1
    u = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=1)
    mean, var = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)
    z = (u - mean[:, None, None]) / (var[:, None, None] + layer.norm.eps).sqrt()
    z = z * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    torch.testing.assert_close(layer(x), z.sigmoid())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"norm": None}, ["conv", "activation"]),
        ({"activation": "identity"}, ["conv", "norm"]),
        ({"norm": None, "activation": "identity"}, ["conv"]),
    ],
    ids=["no_norm", "no_activation", "neither"],
)
def test_modules_that_are_left_out(options: dict, names: list[str]) -> None:
    layer = ConvLayer(3, 5, 1, **{"bias": False, "norm": norm, "activation": "relu", **options})
    assert list(dict(layer.named_children())) == names
    assert layer.conv.bias is None


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_sizes_are_rounded_up(kernel_size: int, stride: int, size: int) -> None:
    layer = ConvLayer(1, 1, kernel_size, stride=stride, bias=True, norm=None, activation="relu")
    half = -(-size // stride)
    assert layer(torch.randn(1, 1, size, 9)).shape == (1, 1, half, -(-9 // stride))
