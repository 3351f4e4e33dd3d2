"""Inception: the paper's Figure 5, the number of parameters, with and without BatchNorm."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bn_lightning.models import initialization
from bn_lightning.models.inception import Inception
from bn_lightning.models.initialization import initialize
from bn_lightning.models.normalization import batch_norm, torch_batch_norm

TORCH = partial(torch_batch_norm, eps=1e-5, momentum=0.1)
OURS = partial(batch_norm, eps=1e-5, momentum=0.1, backend="auto")


def inception(**options: Any) -> Inception:
    defaults = {
        "in_channels": 3,
        "num_classes": 10,
        "activation": "relu",
        "norm": TORCH,
        "bias": True,
        "dropout": 0.0,
        "local_response_norm": False,
    }
    return Inception(**{**defaults, **options})


def count(network: nn.Module, kind: type[nn.Module] = nn.Module, name: str = "") -> int:
    """Count the parameters of the modules of a class, or only those of one name."""
    return sum(
        parameter.numel()
        for module in network.modules()
        if isinstance(module, kind)
        for key, parameter in module.named_parameters(recurse=False)
        if key == name or not name
    )


class TestPaper:
    @pytest.mark.parametrize(
        ("bias", "norm", "parameters"),
        [(True, TORCH, 11_295_240), (False, TORCH, 11_285_224), (True, None, 11_275_208)],
        ids=["bias", "no_bias", "no_norm"],
    )
    def test_parameters(self, bias: bool, norm: Any, parameters: int) -> None:
        with torch.device("meta"):
            network = inception(num_classes=1000, bias=bias, norm=norm)
        assert count(network) == parameters
        assert count(network, nn.Conv2d, "bias") == (10_016 if bias else 0)
        assert count(network, nn.BatchNorm2d) == (0 if norm is None else 20_032)
        assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 69

    def test_outputs_of_figure_5(self) -> None:
        with torch.device("meta"):
            network = inception(num_classes=1000)
            x = torch.empty(2, 3, 224, 224)
        shapes = {}
        for parts in (network.stem, network.blocks):
            for name, part in parts.named_children():
                x = part(x)
                shapes[name] = tuple(x.shape[1:])
        assert shapes == {
            "conv1": (64, 112, 112),
            "pool1": (64, 56, 56),
            "response_norm1": (64, 56, 56),
            "reduce2": (64, 56, 56),
            "conv2": (192, 56, 56),
            "response_norm2": (192, 56, 56),
            "pool2": (192, 28, 28),
            "3a": (256, 28, 28),
            "3b": (320, 28, 28),
            "3c": (576, 14, 14),
            "4a": (576, 14, 14),
            "4b": (576, 14, 14),
            "4c": (608, 14, 14),
            "4d": (608, 14, 14),
            "4e": (1056, 7, 7),
            "5a": (1024, 7, 7),
            "5b": (1024, 7, 7),
        }

    @pytest.mark.parametrize("norm", [TORCH, None], ids=["norm", "none"])
    @pytest.mark.parametrize(
        ("activation", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)], ids=str
    )
    def test_each_convolution_is_normalized_and_activated(
        self, norm: Any, activation: str, kind: type[nn.Module]
    ) -> None:
        with torch.device("meta"):
            network = inception(norm=norm, activation=activation)
        activations = {nn.ReLU: 0, nn.Sigmoid: 0, kind: 69}
        for other, number in activations.items():
            assert sum(isinstance(module, other) for module in network.modules()) == number
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        assert norms == (0 if norm is None else 69)

    def test_local_response_norm_is_where_googlenet_has_it(self) -> None:
        def kinds(network: Inception) -> list[str]:
            return [type(module).__name__ for module in network.stem]

        with torch.device("meta"):
            without, network = inception(), inception(local_response_norm=True)
        conv, pool, response_norm = "ConvLayer", "MaxPool2d", "LocalResponseNorm"
        assert kinds(network) == [conv, pool, response_norm, conv, conv, response_norm, pool]
        assert response_norm not in kinds(without)
        assert network.stem.response_norm1.size == 5

    def test_dropout_takes_features_in_training_only(self) -> None:
        network = inception(dropout=0.4)
        with torch.no_grad():
            network.output.weight.fill_(1.0)
            network.output.bias.zero_()
        seen: list[torch.Tensor] = []
        network.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        torch.manual_seed(0)
        x = torch.randn(4, 3, 32, 32)
        network(x)
        inputs = network.blocks(network.stem(x)).mean((2, 3))
        kept = seen[0] != 0
        # Three standard deviations of the share kept among 4,096 features.
        assert kept.float().mean() / (inputs != 0).float().mean() == pytest.approx(0.6, abs=0.03)
        torch.testing.assert_close(seen[0][kept], inputs[kept] / 0.6)
        network.eval()(x)
        torch.testing.assert_close(seen[1], network.blocks(network.stem(x)).mean((2, 3)))


class TestSizes:
    @pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1)], ids=str)
    def test_any_size(self, size: tuple[int, int]) -> None:
        # With a single pixel, every pooling must pad as the convolutions beside it do.
        network = inception(in_channels=2, num_classes=7, norm=None)
        assert network(torch.randn(1, 2, *size)).shape == (1, 7)


class TestArms:
    def test_norm_batch_is_norm_torch(self) -> None:
        torch.manual_seed(0)
        ours, torchs = inception(norm=OURS), inception(norm=TORCH)
        ours.load_state_dict(torchs.state_dict())
        x = torch.randn(4, 3, 64, 64)
        # 69 layers in fp32 that sum in a different order.
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
        for mine, other in zip(ours.buffers(), torchs.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-4)

    def test_all_arms_start_from_the_same_weights(self) -> None:
        arms = [inception(norm=TORCH), inception(norm=None, dropout=0.4, local_response_norm=True)]
        weights = []
        for network in arms:
            initialize(network, initialization.he, seed=3)
            weights.append(
                {k: v for k, v in network.named_parameters() if ".norm." not in k and v.dim() > 0}
            )
        assert weights[0].keys() == weights[1].keys()
        assert len(weights[0]) == 2 * 70
        for name, weight in weights[0].items():
            assert torch.equal(weight, weights[1][name]), name


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"in_channels": 0}, "`in_channels`.*positive integer.*0"),
            ({"num_classes": 2.5}, "`num_classes`.*positive integer.*2.5"),
            ({"activation": "tanh"}, "`activation`.*relu or sigmoid.*'tanh'"),
            ({"dropout": 1.0}, r"`dropout`.*\[0, 1\).*1.0"),
            ({"dropout": -0.1}, r"`dropout`.*\[0, 1\).*-0.1"),
        ],
        ids=["channels", "classes", "activation", "all_dropped", "negative"],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            inception(**options)
