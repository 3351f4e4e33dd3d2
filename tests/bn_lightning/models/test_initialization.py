"""Initial weights: the distribution of each scheme, and one generator for all networks."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bn_lightning.models import initialization
from bn_lightning.models.initialization import (
    DefaultScheme,
    Scheme,
    initialize,
    initialize_as_configured,
)
from bn_lightning.models.mlp import MLP

FAN_IN, FAN_OUT = 400, 250  # 100,000 values: two standard errors of their variance are 1%

NORMAL = partial(initialization.normal, std=0.05)
RANDOM: dict[str, tuple[Scheme, float, str]] = {
    "normal": (NORMAL, 0.05**2, "normal"),
    "uniform": (partial(initialization.uniform, bound=0.3), 0.3**2 / 3, "uniform"),
    "xavier_normal": (
        partial(initialization.xavier, distribution="normal"),
        2 / (FAN_IN + FAN_OUT),
        "normal",
    ),
    "xavier_uniform": (
        partial(initialization.xavier, distribution="uniform"),
        2 / (FAN_IN + FAN_OUT),
        "uniform",
    ),
    "he": (initialization.he, 2 / FAN_IN, "normal"),
    "lecun": (initialization.lecun, 1 / FAN_IN, "normal"),
}
ORTHOGONAL = partial(initialization.orthogonal, gain=2.0)
# Fourth moment over the square of the second.
KURTOSIS = {"normal": 3.0, "uniform": 1.8}


def filled(scheme: Scheme, layer: nn.Module | None = None, seed: int = 0) -> torch.Tensor:
    layer = layer or nn.Linear(FAN_IN, FAN_OUT)
    initialize(layer, scheme, seed)
    return layer.weight.detach()


def arms() -> dict[str, MLP]:
    norms = {"none": None, "torch": lambda n, spatial_dims=0: nn.BatchNorm1d(n)}
    return {name: MLP(9, [8, 7], 3, "relu", norm, "before") for name, norm in norms.items()}


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in network.named_parameters()
        if "norm" not in name
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class TestSchemes:
    @pytest.mark.parametrize(("scheme", "var", "shape"), RANDOM.values(), ids=RANDOM.keys())
    def test_mean_variance_and_shape(self, scheme: Scheme, var: float, shape: str) -> None:
        weight = filled(scheme).double()
        count = weight.numel()
        # Four standard errors of a mean; the seed is fixed, so this passes always or never.
        assert abs(weight.mean()) < 4 * math.sqrt(var / count)
        assert weight.var() == pytest.approx(var, rel=0.02)
        kurtosis = weight.pow(4).mean() / weight.square().mean() ** 2
        assert kurtosis == pytest.approx(KURTOSIS[shape], rel=0.03)
        assert weight.unique().numel() > 0.9 * count

    def test_uniform_stays_within_its_bound(self) -> None:
        weight = filled(RANDOM["uniform"][0])
        assert 0.299 < weight.abs().max() <= 0.3

    @pytest.mark.parametrize(("fan_in", "fan_out"), [(6, 4), (4, 6), (5, 5)], ids=str)
    def test_orthogonal(self, fan_in: int, fan_out: int) -> None:
        weight = filled(ORTHOGONAL, nn.Linear(fan_in, fan_out)).double()
        gram = weight @ weight.T if fan_out <= fan_in else weight.T @ weight
        expected = 4 * torch.eye(min(fan_in, fan_out), dtype=torch.float64)
        torch.testing.assert_close(gram, expected, atol=1e-5, rtol=0)

    def test_zeros(self) -> None:
        assert not filled(initialization.zeros).any()

    @pytest.mark.parametrize("name", ["he", "lecun", "xavier_normal"])
    def test_fans_of_a_convolution_count_its_kernel(self, name: str) -> None:
        scheme = RANDOM[name][0]
        channels, kernel, out = 16, 25, 64
        var = {
            "he": 2 / (channels * kernel),
            "lecun": 1 / (channels * kernel),
            "xavier_normal": 2 / ((channels + out) * kernel),
        }[name]
        assert filled(scheme, nn.Conv2d(channels, out, 5)).var() == pytest.approx(var, rel=0.03)

    def test_a_custom_scheme(self) -> None:
        def twos(weight: torch.Tensor, generator: torch.Generator) -> None:
            weight.fill_(2)

        assert (filled(twos) == 2).all()


class TestStream:
    @pytest.mark.parametrize(
        "scheme",
        [NORMAL, RANDOM["xavier_uniform"][0], initialization.he, ORTHOGONAL],
        ids=["normal", "xavier", "he", "orthogonal"],
    )
    def test_the_arms_start_from_the_same_weights(self, scheme: Scheme) -> None:
        both = arms()
        for network in both.values():
            initialize(network, scheme, 5)
        assert same(weights(both["none"]), weights(both["torch"]))

    def test_layers_differ(self) -> None:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        initialize(network, NORMAL, 0)
        assert not torch.equal(network[0].weight, network[1].weight)

    def test_the_seed_alone_decides(self) -> None:
        network = arms()["none"]
        initialize(network, NORMAL, 1)
        first = weights(network)
        initialize(network, NORMAL, 2)
        second = weights(network)
        for name in first:
            if name.endswith("weight"):
                assert not torch.equal(first[name], second[name])
        torch.manual_seed(99)
        initialize(network, NORMAL, 1)
        assert same(first, weights(network))

    def test_the_global_generator_is_not_used(self) -> None:
        network = arms()["torch"]
        before = torch.get_rng_state()
        initialize(network, ORTHOGONAL, 3)
        assert torch.equal(torch.get_rng_state(), before)


class TestNetwork:
    def test_biases_become_zero(self) -> None:
        network = arms()["torch"]
        initialize(network, NORMAL, 0)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                assert not module.bias.any()

    def test_normalization_is_not_changed(self) -> None:
        norm = nn.BatchNorm1d(4)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        before = {name: value.clone() for name, value in norm.state_dict().items()}
        initialize(nn.Sequential(nn.Linear(4, 4), norm), NORMAL, 0)
        assert same(before, norm.state_dict())

    @pytest.mark.parametrize(
        "layer",
        [nn.Linear(4, 6), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 3)],
        ids=["linear", "conv1d", "conv2d", "conv3d"],
    )
    def test_linear_and_convolution_layers(self, layer: Any) -> None:
        nn.init.constant_(layer.weight, 7.0)
        nn.init.constant_(layer.bias, 7.0)
        initialize(nn.Sequential(nn.Sequential(layer)), NORMAL, 0)
        assert layer.weight.abs().max() < 1
        assert not layer.bias.any()

    def test_a_layer_without_bias(self) -> None:
        layer = nn.Linear(40, 60, bias=False)
        assert filled(NORMAL, layer).std() == pytest.approx(0.05, rel=0.1)

    def test_parameters_stay_the_same_objects(self, device: str) -> None:
        layer = nn.Linear(4, 6, device=device, dtype=torch.float64)
        layer.weight.requires_grad_(False)
        weight = layer.weight
        initialize(layer, NORMAL, 0)
        assert layer.weight is weight
        assert (weight.device.type, weight.dtype, weight.requires_grad) == (
            device,
            torch.float64,
            False,
        )

    def test_a_seed_gives_the_same_weights_on_every_device(self, device: str) -> None:
        on_cpu, on_device = nn.Linear(8, 8), nn.Linear(8, 8, device=device)
        for layer in (on_cpu, on_device):
            initialize(layer, NORMAL, 4)
        assert torch.equal(on_device.weight.cpu(), on_cpu.weight)


class Own(nn.Sequential):
    """A network that is not of this project."""


@pytest.mark.parametrize(
    ("make", "scheme", "is_replaced", "told"),
    [
        (lambda: Own(nn.Linear(3, 2)), NORMAL, True, "init replaces the weights of 1 .*Own"),
        (lambda: Own(nn.Linear(3, 2)), DefaultScheme(NORMAL), False, "Own keeps .* init=he"),
        (lambda: Own(nn.Linear(3, 2)), None, False, None),
        (lambda: Own(nn.BatchNorm1d(3)), NORMAL, False, None),
        (lambda: MLP(3, [], 2, "relu", None, "before"), DefaultScheme(NORMAL), True, None),
        (lambda: MLP(3, [], 2, "relu", None, "before"), None, False, None),
    ],
    ids=["chosen", "default", "none", "nothing_to_replace", "of_ours_default", "of_ours_none"],
)
def test_whose_weights_are_replaced(make, scheme, is_replaced, told) -> None:
    network = make()
    before = weights(network)
    found = initialize_as_configured(network, scheme, 0)
    assert same(before, weights(network)) != is_replaced
    assert found is None if told is None else re.search(told, found)
