"""Networks that cannot be members of one stack are refused by name when it is built."""

import pytest
import torch
from torch import nn

from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.same_architecture import NotStackableError


def members():
    return [
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.1), nn.Linear(5, 4))
        for _ in range(2)
    ]


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"calls": 0}


def freeze(network):
    network[0].requires_grad_(False)


def evaluate(network):
    network[1].eval()


def other_momentum(network):
    network[1].momentum = 0.5


def other_slope(network):
    network[2].negative_slope = 0.2


def tensor_attribute(network):
    network[0].mask = torch.ones(5)


def average_of_another_count(network):
    network[1].num_batches_tracked.fill_(3)


def hook_of_parameter(network):
    network[0].weight.register_hook(lambda gradient: 2 * gradient)


def hook_of_module(network):
    network[0].register_forward_hook(lambda *_: None)


def two_dtypes(network):
    network[3].double()


def extra_state(network):
    network[3] = WithExtraState(5, 4)


def without_shape(network):
    network[3] = nn.LazyLinear(4)


def parametrized(network):
    nn.utils.parametrizations.weight_norm(network[3])


def compiled(network):
    network[3]._compiled_call_impl = network[3]._call_impl


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (freeze, "which parameters are trained"),
        (other_momentum, "`1.momentum`"),
        (other_slope, "`2.negative_slope`"),
        (tensor_attribute, "`0.mask`"),
        (evaluate, "`1` is in evaluation mode"),
        (hook_of_parameter, "`0.weight` has hooks"),
        (hook_of_module, "`0` has hooks"),
        (two_dtypes, "float32 and torch.float64"),
        (extra_state, "modules|`3` has state"),
        (without_shape, "`3.weight` has no shape"),
        (compiled, "`3` is compiled"),
        (parametrized, "`3` has a parametrization"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
def test_what_differs_or_cannot_be_followed_is_named(change, named, place):
    networks = members()
    change(networks[place])
    with pytest.raises(NotStackableError, match=named):
        StackedNetwork(networks)


def test_averages_over_other_counts_are_refused():
    networks = members()
    for network in networks:
        network[1].momentum = None
    assert StackedNetwork(networks).size == 2
    average_of_another_count(networks[1])
    with pytest.raises(NotStackableError, match="numbers of batches"):
        StackedNetwork(networks)


def test_frozen_and_unlike_values_can_be_stacked():
    networks = members()
    for k, network in enumerate(networks):
        freeze(network)
        nn.init.constant_(network[0].weight, k)
        average_of_another_count(network) if k else None
    assert StackedNetwork(networks).size == 2
