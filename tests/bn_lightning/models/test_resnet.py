"""CIFARResNet: the paper's table, its shortcuts, with and without BatchNorm."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import convert_batchnorm
from bn_lightning.models import initialization
from bn_lightning.models.initialization import initialize
from bn_lightning.models.normalization import batch_norm, torch_batch_norm
from bn_lightning.models.resnet import CIFARResNet

TORCH = partial(torch_batch_norm, eps=1e-5, momentum=0.1)
OURS = partial(batch_norm, eps=1e-5, momentum=0.1, backend="auto")


def resnet(depth: int = 14, **options: Any) -> CIFARResNet:
    defaults = {"in_channels": 3, "num_classes": 10, "norm": TORCH, "bias": False}
    return CIFARResNet(depth, **{**defaults, **options})


class TestPaper:
    @pytest.mark.parametrize(
        # The paper's Table 6 has 0.27, 0.85 and 1.7 million.
        ("depth", "parameters"),
        [(20, 269_722), (56, 853_018), (110, 1_727_962)],
        ids=str,
    )
    def test_parameters(self, depth: int, parameters: int) -> None:
        with torch.device("meta"):
            network = resnet(depth)
        assert sum(p.numel() for p in network.parameters()) == parameters
        weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(weighted) == depth
        assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == depth - 1

    def test_outputs(self) -> None:
        with torch.device("meta"):
            network = resnet(20)
            x = torch.empty(2, 3, 32, 32)
        shapes = [tuple((x := part(x)).shape[1:]) for part in (network.stem, *network.blocks)]
        groups = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
        assert shapes == [groups[0]] + [shape for shape in groups for _ in range(3)]

    @pytest.mark.parametrize("size", [(32, 32), (33, 5), (1, 1)], ids=str)
    def test_any_size(self, size: tuple[int, int]) -> None:
        network = resnet(8, in_channels=1, num_classes=4, norm=None)
        assert network(torch.randn(2, 1, *size)).shape == (2, 4)


class TestBlock:
    @pytest.mark.parametrize("index", [1, 2], ids=["same_size", "half_size"])
    def test_forward_is_that_formula(self, index: int) -> None:
        torch.manual_seed(0)
        block = resnet(14, norm=None, bias=True).blocks[index]
        x = torch.randn(2, 16, 5, 6)
        first, second = block.layer1.conv, block.conv2
        h = F.conv2d(x, first.weight, first.bias, stride=index, padding=1).relu()
        residual = F.conv2d(h, second.weight, second.bias, padding=1)
        expected = residual.clone()
        # Option A: every second pixel, and zeros in the new channels.
        expected[:, :16] += x[:, :, ::index, ::index]
        torch.testing.assert_close(block(x), expected.relu())

    def test_both_convolutions_are_normalized_before_the_activation(self) -> None:
        block = resnet(14).blocks[0]
        nn.init.zeros_(block.norm2.weight)
        nn.init.constant_(block.norm2.bias, -0.25)
        x = torch.randn(2, 16, 4, 4)
        torch.testing.assert_close(block(x), (x - 0.25).relu())
        nn.init.constant_(block.layer1.norm.weight, 0.0)
        nn.init.constant_(block.layer1.norm.bias, -1.0)
        assert not block.layer1(x).any()


class TestArms:
    def test_norm_batch_is_norm_torch(self) -> None:
        torch.manual_seed(0)
        ours, torchs = resnet(norm=OURS), resnet(norm=TORCH)
        ours.load_state_dict(torchs.state_dict())
        x = torch.randn(6, 3, 32, 32)
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-5)

    def test_both_arms_start_from_the_same_weights(self) -> None:
        states = []
        for norm in (TORCH, None):
            network = resnet(norm=norm, bias=True)
            initialize(network, initialization.he, seed=3)
            states.append({k: v for k, v in network.named_parameters() if ".norm" not in k})
        assert states[0].keys() == states[1].keys()
        assert len(states[0]) == 2 * 14
        for name, weight in states[0].items():
            assert torch.equal(weight, states[1][name]), name

    def test_every_batchnorm_is_fused(self) -> None:
        network = resnet(14)
        x = torch.randn(4, 3, 16, 16)
        expected = network(x)
        assert len(convert_batchnorm(network, fuse=True).fusable) == 13
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


class TestArguments:
    @pytest.mark.parametrize("depth", [2, 18, 21, 20.0, True], ids=str)
    def test_depth(self, depth: Any) -> None:
        with pytest.raises(ValueError, match=rf"`depth`.*6n \+ 2.*{depth!r}"):
            resnet(depth)

    @pytest.mark.parametrize("options", [{"in_channels": 0}, {"num_classes": "ten"}], ids=str)
    def test_sizes(self, options: dict[str, Any]) -> None:
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"`{name}`.*positive integer.*{value!r}"):
            resnet(**options)
