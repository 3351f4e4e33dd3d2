"""A stacked network against its members, each trained alone by torch."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning.models.cnn import CNN
from bn_lightning.models.inception import Inception
from bn_lightning.models.mlp import MLP
from bn_lightning.models.normalization import batch_norm, ghost_batch_norm, torch_batch_norm
from bn_lightning.models.resnet import CIFARResNet
from bn_lightning.stack import network as network_module
from bn_lightning.stack.context import DropoutStreams, Placed, leading
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.optimizers import StackedOptimizer
from bn_lightning.stack.same_architecture import NotStackableError

BATCH = partial(batch_norm, eps=1e-5, momentum=0.1, backend="auto")
NORMS = {
    "batch": BATCH,
    "none": None,
    "torch": partial(torch_batch_norm, eps=1e-5, momentum=0.1),
    "average": partial(torch_batch_norm, eps=1e-5, momentum=None),
    "ghost": partial(ghost_batch_norm, eps=1e-5, momentum=0.1, backend="auto", ghost_size=3),
}
# Of the largest value in a member: rounding of a different order of summation, after one step.
ONE_STEP = {torch.float32: 1e-6, torch.float64: 1e-12}


def mlp(norm, position="before"):
    return MLP(12, [7, 5], 4, "sigmoid", norm, position, input_norm=norm), (12,)


def mlp_after(norm):
    """No parameter is redundant: Adam divides a gradient of rounding alone by itself."""
    return mlp(norm, "after")


def cnn(norm):
    return CNN(1, 8, [3, 4], 3, [6], 4, "relu", norm, norm, 0.0), (1, 8, 8)


def resnet(norm):
    return CIFARResNet(8, 3, 4, norm, bias=True), (3, 8, 8)


def inception(norm):
    return Inception(3, 4, "relu", norm, bias=True, dropout=0.0, local_response_norm=True), (
        3,
        64,
        64,
    )


def flat(norm):
    """Flattens before and after layers that put the members elsewhere."""
    norms = [] if norm is None else [norm(3)]
    flatten, linear = [nn.Flatten(2), nn.Flatten(-2)], [nn.Linear(4, 6), nn.Linear(18, 4)]
    return nn.Sequential(flatten[0], linear[0], *norms, nn.Sigmoid(), flatten[1], linear[1]), (
        3,
        2,
        2,
    )


class Tied(nn.Module):
    """Two layers with one weight, a parameter and a norm of its own that no fast layer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.output = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x))) * self.scale
        return self.output(self.twice(self.twice(self.norm(x)).relu()))


OPTIMIZERS: dict[str, list[Callable]] = {
    # For each a number that all members share and numbers that differ.
    "sgd": [partial(torch.optim.SGD, lr=0.1)],
    "sgd_rates": [partial(torch.optim.SGD, lr=rate) for rate in (0.1, 0.7)],
    "sgd_decay": [partial(torch.optim.SGD, lr=0.1, weight_decay=d) for d in (0.0, 0.3)],
    "momentum": [partial(torch.optim.SGD, lr=0.1, momentum=m) for m in (0.0, 0.9)],
    "dampening": [partial(torch.optim.SGD, lr=0.1, momentum=m, dampening=0.4) for m in (0.0, 0.9)],
    "nesterov": [
        partial(torch.optim.SGD, lr=0.1, momentum=m, nesterov=True, weight_decay=0.1)
        for m in (0.5, 0.9)
    ],
    "maximize": [partial(torch.optim.SGD, lr=0.1, maximize=True)],
    "adam": [partial(torch.optim.Adam, lr=rate) for rate in (0.001, 0.01)],
    "adam_numbers": [
        partial(torch.optim.Adam, lr=0.01, betas=betas, eps=eps, weight_decay=0.1)
        for betas, eps in (((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3))
    ],
    "adamw": [partial(torch.optim.AdamW, lr=0.01, weight_decay=decay) for decay in (0.0, 0.5)],
    "adagrad": [
        partial(torch.optim.Adagrad, lr=rate, lr_decay=decay, initial_accumulator_value=0.1)
        for rate, decay in ((0.1, 0.0), (0.5, 0.2))
    ],
}


def train_alone(network, factory, batches, clip=None):
    """The losses of a plain loop."""
    optimizer = factory(network.parameters())
    losses = []
    for x, target in batches:
        loss = F.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_stacked(networks, factories, batches, clip=None):
    """The stacked network after a loop, and its losses (steps, K)."""
    stacked = StackedNetwork(networks)
    optimizers = [factory(n.parameters()) for n, factory in zip(networks, factories, strict=True)]
    optimizer = StackedOptimizer(stacked.network.parameters(), optimizers, clip)
    losses = []
    for x, target in batches:
        stacked.context.calls.clear()
        stacked.context.update = optimizer.update
        loss = stacked.map(lambda _, logits, y: F.cross_entropy(logits, y), stacked(x), target)
        loss.backward(torch.ones_like(loss))
        optimizer.step()
        losses.append(loss.detach())
    return stacked, torch.stack(losses)


def members_of(make, size, dtype, norm=BATCH):
    """Networks of different weights, a function of them for their input's shape."""
    networks = []
    for seed in range(size):
        torch.manual_seed(seed)
        network, shape = make(norm)
        networks.append(network.to(dtype))
    return networks, shape


def batches_of(shape, steps, dtype, size=None, samples=7):
    """Shared batches, or with a size those of each member."""
    generator = torch.Generator().manual_seed(5)
    lead = () if size is None else (size,)
    dim = None if size is None else 0
    return [
        (
            Placed(
                torch.randn(*lead, samples, *shape, dtype=dtype, generator=generator) + 0.5, dim
            ),
            Placed(torch.randint(0, 4, (*lead, samples), generator=generator), dim),
        )
        for _ in range(steps)
    ]


def compare(networks, factories, batches, tolerance, clip=None):
    """Train alone and stacked, and compare losses, parameters and buffers."""
    alone = copy.deepcopy(networks)
    stacked, losses = train_stacked(networks, factories, batches, clip)
    for k, (network, factory) in enumerate(zip(alone, factories, strict=True)):
        own = [tuple(p.value if p.dim is None else p.value[k] for p in pair) for pair in batches]
        expected = train_alone(network, factory, own, clip)
        torch.testing.assert_close(losses[:, k], expected, rtol=tolerance, atol=tolerance)
        state, found = network.state_dict(), stacked.member_state(k)
        assert list(found) == list(state)
        largest = max(v.abs().max() for v in state.values() if v.is_floating_point())
        for name, value in state.items():
            error = (found[name] - value).abs().max()
            assert error <= tolerance * largest, (k, name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("make", [mlp, mlp_after, cnn, flat], ids=["mlp", "after", "cnn", "flat"])
def test_one_step_of_each_network(make, own, norm, dtype):
    if norm == "ghost" and dtype == torch.float32:
        pytest.skip("variances of three samples multiply rounding; double precision shows it")
    networks, shape = members_of(make, 2, dtype, NORMS[norm])
    batches = batches_of(shape, 1, dtype, 2 if own else None)
    compare(
        networks, [partial(torch.optim.SGD, lr=r) for r in (0.1, 0.5)], batches, ONE_STEP[dtype]
    )


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(("make", "is_known"), [(mlp, True), (flat, True), (cnn, False)])
def test_a_network_of_known_layers_needs_no_vmap(make, is_known, own, monkeypatch):
    networks, shape = members_of(make, 2, torch.float64)
    ((x, _),) = batches_of(shape, 1, torch.float64, 2 if own else None)
    stacked = StackedNetwork(networks)
    mapped = stacked.map(lambda member, x: member(x), x)
    monkeypatch.setattr(network_module, "vmap", None)
    if is_known:
        torch.testing.assert_close(leading(stacked(x), 2), mapped, rtol=0, atol=1e-12)
    else:
        with pytest.raises(TypeError, match="NoneType"):
            stacked(x)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    "make", [resnet, pytest.param(inception, marks=pytest.mark.slow)], ids=["resnet", "inception"]
)
def test_one_step_of_deep_networks(make, norm):
    networks, shape = members_of(make, 2, torch.float64, NORMS[norm])
    batches = batches_of(shape, 1, torch.float64, samples=3)
    compare(networks, [partial(torch.optim.SGD, lr=0.1)] * 2, batches, 1e-12)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("size", [1, 2, pytest.param(33, marks=pytest.mark.slow)])
def test_one_step_of_each_optimizer(name, own, size):
    networks, shape = members_of(mlp_after, size, torch.float64)
    factories = [OPTIMIZERS[name][k % len(OPTIMIZERS[name])] for k in range(size)]
    compare(networks, factories, batches_of(shape, 1, torch.float64, size if own else None), 1e-12)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_four_steps_of_each_optimizer(name):
    networks, shape = members_of(mlp_after, 2, torch.float64)
    factories = [OPTIMIZERS[name][k % len(OPTIMIZERS[name])] for k in range(2)]
    compare(networks, factories, batches_of(shape, 4, torch.float64), 1e-9)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", ["sgd_rates", "nesterov", "adam", "adamw", "adagrad"])
def test_one_step_in_single_precision_errs_as_torch_does(name, norm):
    """Adam divides rounding by itself, so both are compared with double precision."""
    networks, shape = members_of(mlp_after, 2, torch.float32, NORMS[norm])
    exact = [copy.deepcopy(network).double() for network in networks]
    alone = copy.deepcopy(networks)
    batches = batches_of(shape, 1, torch.float32)
    stacked, _ = train_stacked(networks, OPTIMIZERS[name], batches)
    x, target = (part.value for part in batches[0])
    for k, factory in enumerate(OPTIMIZERS[name]):
        train_alone(alone[k], factory, [(x, target)])
        train_alone(exact[k], factory, [(x.double(), target)])
        state, ours = exact[k].state_dict(), stacked.member_state(k)
        floats = [name for name, value in state.items() if value.is_floating_point()]
        largest = max(state[name].abs().max() for name in floats)
        theirs = max((alone[k].state_dict()[name] - state[name]).abs().max() for name in floats)
        error = max((ours[name] - state[name]).abs().max() for name in floats)
        assert error <= 2 * theirs + 1e-6 * largest


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_two_hundred_steps(norm):
    networks, shape = members_of(mlp, 2, torch.float64, NORMS[norm])
    factories = [partial(torch.optim.SGD, lr=0.1)] * 2
    compare(networks, factories, batches_of(shape, 200, torch.float64), 1e-9)


def test_clipping_limits_the_norm_of_each_member():
    networks, shape = members_of(mlp, 2, torch.float64)
    factories = [partial(torch.optim.SGD, lr=0.1)] * 2
    compare(networks, factories, batches_of(shape, 3, torch.float64), 1e-12, clip=0.05)


@pytest.mark.parametrize("name", ["sgd_rates", "adam"])
def test_a_network_of_unknown_layers_and_shared_weights(name):
    networks, shape = members_of(lambda norm: (Tied(), (6,)), 2, torch.float64)
    compare(networks, OPTIMIZERS[name], batches_of(shape, 2, torch.float64), 1e-12)


def test_a_nan_stays_with_its_member():
    networks, shape = members_of(mlp, 3, torch.float64)
    with torch.no_grad():
        networks[1].output.weight.fill_(float("nan"))
    alone = copy.deepcopy(networks)
    batches = batches_of(shape, 2, torch.float64)
    stacked, losses = train_stacked(networks, [partial(torch.optim.SGD, lr=0.1)] * 3, batches)
    assert losses.isnan().any(0).tolist() == [False, True, False]
    for k in (0, 2):
        train_alone(
            alone[k], partial(torch.optim.SGD, lr=0.1), [(x.value, y.value) for x, y in batches]
        )
        for name, value in alone[k].state_dict().items():
            torch.testing.assert_close(stacked.member_state(k)[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["momentum", "adam_numbers", "adagrad"])
def test_members_leave_with_their_optimizers(name):
    """After the first of three left, the others go on as if they had been alone."""
    factories = [*OPTIMIZERS[name], OPTIMIZERS[name][0]]
    networks, shape = members_of(mlp_after, 3, torch.float64)
    alone = copy.deepcopy(networks)
    batches = batches_of(shape, 4, torch.float64)
    stacked = StackedNetwork(networks)
    made = [factory(n.parameters()) for n, factory in zip(networks, factories, strict=True)]
    optimizer = StackedOptimizer(stacked.network.parameters(), made)
    for step, (x, target) in enumerate(batches):
        if step == 2:
            stacked.take([2, 1])
            optimizer.take([2, 1], stacked.network.parameters())
        loss = stacked.map(lambda net, x, y: F.cross_entropy(net(x), y), x, target)
        loss.backward(torch.ones_like(loss))
        optimizer.step()
    assert stacked.size == 2
    for place, k in enumerate([2, 1]):
        train_alone(alone[k], factories[k], [(x.value, y.value) for x, y in batches])
        for name, value in alone[k].state_dict().items():
            torch.testing.assert_close(stacked.member_state(place)[name], value, rtol=0, atol=1e-9)


def test_dropout_draws_the_masks_of_each_seed():
    def make(p):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 50), nn.Dropout(p), nn.ReLU(), nn.Dropout(p), nn.Linear(50, 4)
        )

    networks = [make(p).double() for p in (0.5, 0.5, 0.2, 0.0)]
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    alone = copy.deepcopy(networks)
    stacked = StackedNetwork(networks)
    stacked.context.streams = DropoutStreams([states[k] for k in (0, 1, 1, 0)])
    batches = batches_of((6,), 2, torch.float64)
    found = [stacked.map(lambda net, x: net(x), x) for x, _ in batches]
    for k, seed in enumerate([3, 4, 4, 3]):
        torch.manual_seed(seed)
        for (x, _), outputs in zip(batches, found, strict=True):
            torch.testing.assert_close(outputs[k], alone[k](x.value), rtol=0, atol=1e-12)
    stacked.network.eval()
    x = batches[0][0]
    for k, outputs in enumerate(stacked.map(lambda net, x: net(x), x)):
        torch.testing.assert_close(outputs, alone[k].eval()(x.value), rtol=0, atol=1e-12)


def with_hook(network):
    network.hidden[0].register_forward_hook(lambda *_: None)


def with_another_width(network):
    network.output = nn.Linear(5, 3)


def with_another_activation(network):
    network.hidden[0].activation = nn.Tanh()


@pytest.mark.parametrize(
    ("change", "named"),
    [(with_hook, "hidden.0"), (with_another_width, "shapes"), (with_another_activation, "modules")],
    ids=["hook", "width", "activation"],
)
def test_what_cannot_be_stacked_is_named(change, named):
    networks, _ = members_of(mlp, 2, torch.float32)
    change(networks[1])
    if change is with_hook:
        networks.reverse()
    with pytest.raises(NotStackableError, match=named):
        StackedNetwork(networks)


@pytest.mark.parametrize(
    ("factories", "named"),
    [
        ([torch.optim.RMSprop] * 2, "RMSprop"),
        ([partial(torch.optim.Adam, amsgrad=True)] * 2, "amsgrad"),
        ([torch.optim.SGD, torch.optim.Adam], "differ"),
        ([torch.optim.SGD, partial(torch.optim.SGD, maximize=True)], "differ"),
        ([lambda ps: torch.optim.SGD([{"params": [p]} for p in ps])] * 2, "groups"),
    ],
    ids=["rule", "option", "classes", "options", "groups"],
)
def test_optimizers_that_cannot_be_stacked_are_named(factories, named):
    networks, _ = members_of(mlp, 2, torch.float32)
    made = [factory(n.parameters()) for n, factory in zip(networks, factories, strict=True)]
    with pytest.raises(NotStackableError, match=named):
        StackedOptimizer(StackedNetwork(networks).network.parameters(), made)
