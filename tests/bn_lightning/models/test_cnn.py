"""CNN: its modules, their order and shapes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning.models.cnn import CNN


def norm(num_features: int, spatial_dims: int = 0) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[spatial_dims](num_features)


def cnn(**options: Any) -> CNN:
    defaults: dict[str, Any] = {
        "in_channels": 1,
        "image_size": 9,
        "channels": [2, 3],
        "kernel_size": 3,
        "widths": [5],
        "out_features": 4,
        "activation": "relu",
        "norm": norm,
        "dense_norm": norm,
        "dropout": 0.0,
    }
    return CNN(**{**defaults, **options})


def kinds(network: CNN) -> list[list[str]]:
    layers = [*network.convolutions, *network.hidden]
    return [[type(module).__name__ for module in layer] for layer in layers]


CONV, DENSE = ["Conv2d", "ReLU", "MaxPool2d"], ["Linear", "ReLU"]
CONV_NORM, DENSE_NORM = ["Conv2d", "BatchNorm2d", *CONV[1:]], ["Linear", "BatchNorm1d", "ReLU"]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [CONV_NORM, CONV_NORM, DENSE_NORM]),
        ({"dense_norm": None}, [CONV_NORM, CONV_NORM, DENSE]),
        ({"norm": None, "dense_norm": None}, [CONV, CONV, DENSE]),
        ({"widths": [], "channels": [2]}, [CONV_NORM]),
    ],
    ids=["throughout", "in the convolutions", "none", "no dense layer"],
)
def test_modules_and_their_order(options: dict[str, Any], layers: list[list[str]]) -> None:
    assert kinds(cnn(**options)) == layers


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [8, 9], ids=["even", "odd"])
def test_forward_is_that_formula(kernel_size: int, size: int) -> None:
    torch.manual_seed(0)
    network = cnn(kernel_size=kernel_size, image_size=size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = h = torch.randn(7, 1, size, size) + 1

    def normalized(u: torch.Tensor, bn: Any) -> torch.Tensor:
        return F.batch_norm(u, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

    for layer in network.convolutions:
        u = F.conv2d(h, layer.conv.weight, layer.conv.bias, padding=kernel_size // 2)
        h = F.max_pool2d(normalized(u, layer.norm).relu(), 2)
    (dense,) = network.hidden
    h = normalized(F.linear(h.reshape(7, -1), dense.linear.weight, dense.linear.bias), dense.norm)
    expected = F.linear(h.relu(), network.output.weight, network.output.bias)
    torch.testing.assert_close(network(x), expected)


def test_the_network_of_the_experiment() -> None:
    """28x28 images become 7x7 of 64 channels."""
    network = cnn(image_size=28, channels=[32, 64], widths=[128], out_features=10)
    weights = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 49 * 128 + 128 + 128 * 10 + 10
    assert sum(p.numel() for p in network.parameters()) == weights + 2 * (32 + 64 + 128)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_dropout_acts_on_the_last_dense_layer_in_training_only() -> None:
    network = cnn(dropout=1.0)
    nn.init.constant_(network.output.bias, 2.0)
    x = torch.randn(6, 1, 9, 9)
    assert torch.equal(network(x), torch.full((6, 4), 2.0))
    assert not torch.equal(network.eval()(x), torch.full((6, 4), 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": []}, "`channels`.*\\[\\]"),
        ({"channels": [2, 0]}, "`channels`.*positive integers"),
        ({"widths": [-5]}, "`widths`.*positive integers"),
        ({"kernel_size": 2.5}, "`kernel_size`.*positive integer"),
        ({"kernel_size": 4}, "`kernel_size`.*odd.*4"),
        ({"image_size": 3}, "`image_size`.*at least 4 pixels.*got 3"),
        ({"activation": "swoosh"}, "`activation`.*'swoosh'"),
        ({"dropout": 1.5}, "dropout probability .*1.5"),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cnn(**options)
