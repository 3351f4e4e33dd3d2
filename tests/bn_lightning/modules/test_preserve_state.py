"""preserve_state: a network that is called comes back as it was, whatever it shares."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import bn_lightning
from bn_lightning.modules.preserve_state import preserve_generators, preserve_state


class TwoNames(nn.Module):
    """Its one submodule hangs under two names."""

    def __init__(self, make: Any = nn) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), make.BatchNorm1d(3))
        self.alias = self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.net(x)[:, [0, 1, 2, 0]])


class Counting(nn.Module):
    """Its forward replaces one buffer, fills an empty one, and registers a third."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last = x.clone()
        self.register_buffer("mean", x.mean(0))
        return x


class Broadcast(nn.Module):
    """Its buffer is expanded, and changes through the tensor that it was expanded from."""

    def __init__(self) -> None:
        super().__init__()
        self.one = [torch.zeros(1)]
        self.register_buffer("all", self.one[0].expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.one[0] += 1
        return x + self.all


def tied() -> nn.Module:
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    second.weight, second.running_mean = first.weight, first.running_mean
    return nn.Sequential(first, second)


def views(is_buffer: bool) -> nn.Module:
    """A BatchNorm whose statistics are rows of one tensor."""
    network = nn.Sequential(nn.BatchNorm1d(4))
    rows = torch.stack([torch.zeros(4), torch.ones(4)])
    network[0].running_mean, network[0].running_var = rows
    if is_buffer:
        network.register_buffer("rows", rows)
    return network


def partly_in_evaluation() -> nn.Module:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    network[0].eval()
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm1d(4)),
    "two_names": TwoNames,
    "two_names_ours": lambda: TwoNames(bn_lightning),
    "tied": tied,
    "views_of_a_buffer": lambda: views(is_buffer=True),
    "views_of_another_tensor": lambda: views(is_buffer=False),
    "expanded": Broadcast,
    "replaced": Counting,
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4))),
    "partly_in_evaluation": partly_in_evaluation,
}


def state_of(network: nn.Module) -> dict[str, Any]:
    """Everything that preserve_state restores: objects, values, modes."""
    tensors = {
        **dict(network.named_buffers(remove_duplicate=False)),
        **dict(network.named_parameters(remove_duplicate=False)),
    }
    return {
        "objects": {name: (id(x), x.data_ptr()) for name, x in tensors.items()},
        "values": {name: x.tolist() for name, x in tensors.items()},
        "modes": [module.training for module in network.modules()],
        "empty": [[k for k, x in m._buffers.items() if x is None] for m in network.modules()],
    }


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_network_comes_back_as_it_was(make: Callable[[], nn.Module], fails: bool) -> None:
    torch.manual_seed(0)
    network = make()
    before = state_of(network)
    with suppress(RuntimeError), torch.no_grad(), preserve_state(network):
        network.train()
        for _ in range(3):
            network(torch.randn(8, 4) * 3 + 1)
        assert state_of(network) != before
        if fails:
            network.eval()
            raise RuntimeError
    assert state_of(network) == before


def test_parameters_are_restored_on_request() -> None:
    network = TwoNames()
    before = state_of(network)
    with torch.no_grad(), preserve_state(network, parameters=True):
        for parameter in network.parameters():
            parameter.add_(1)
        network.net[0].weight = nn.Parameter(torch.zeros(3, 4))
    assert state_of(network) == before


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_random_states(fails: bool) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), np.random.rand(), random.random()

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with suppress(RuntimeError), preserve_state(nn.Linear(2, 2)):
        first = draw()
        if fails:
            raise RuntimeError
    assert draw() == first


def test_a_graph_from_before_can_still_be_differentiated() -> None:
    """Evaluation saves the running statistics for the backward pass."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    y = network(torch.randn(8, 4))
    with torch.no_grad(), preserve_state(network):
        network.train()
        network(torch.randn(8, 4))
    (y * torch.randn(8, 4)).sum().backward()
    assert network[0].weight.grad is not None


def test_buffers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        network = nn.BatchNorm1d(4)
    before = state_of(network)
    with torch.no_grad(), preserve_state(network):
        network.eval()(torch.randn(8, 4))
    with torch.inference_mode(), preserve_state(network):
        network.train()(torch.randn(8, 4))
        assert state_of(network) != before
    assert state_of(network) == before


def test_generators_of_a_loader() -> None:
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(range(9), shuffle=True, generator=generator)
    with preserve_generators(loader):
        first = torch.cat(list(loader)).tolist()
    assert torch.cat(list(loader)).tolist() == first
    assert torch.cat(list(loader)).tolist() != first
    with preserve_generators([1, 2]):  # anything that can be iterated may be a loader
        pass
