"""Folding with example inputs: what the exported graph shows, and what the examples must be."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from foreign_batch_norms import BatchNormAct2d, FrozenBatchNormAct2d
from module_snapshot import snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning import BatchNorm2d, fold_batchnorm
from bn_lightning.conversion.fold import FoldError, find_foldable, fold_with_report


def images(channels: int = 4, size: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, channels, size, size, generator=g, dtype=torch.float64)


def trained(model: nn.Module) -> nn.Module:
    """Give BatchNorms random statistics and parameters, in fp64 and evaluation."""
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if "running_mean" in m._buffers:
            for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return model.double().eval()


class Network(nn.Module):
    """The children and the forward of each test."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class SamePadding(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias)


class OwnLayer(nn.Module):
    """Calls a function of torch with a weight of its own, and a bias or None."""

    def __init__(self, function: Callable[..., Tensor], *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0])) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.bias)


class WithoutBias(nn.Conv2d):
    """Ignores a bias that it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class Standardized(nn.Conv2d):
    """Computes its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class AlwaysTrains(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "AlwaysTrains":
        return super().train()


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **options)


def chain(self: Any, x: Tensor) -> Tensor:
    for child in self.children():
        x = child(x)
    return x


def branching(self: Any, x: Tensor, *, skip: bool = False) -> dict[str, list[Tensor]]:
    if isinstance(self.conv, nn.Conv2d) and x.shape[0] > 1 and not skip:
        return {"features": [self.bn(self.conv(x))]}
    return {"features": [x]}


def shared_head(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(self.bn(self.conv(y)).relu() for y in (x, x[..., :4, :4]))


def rows_in_between(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    return self.bn(y.flatten(0, 2)).reshape_as(y)


def transposed(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.linear(x.flatten(1, 2)).transpose(1, 2)).transpose(1, 2)


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.bn(self.conv(x))
    return y.relu()


def two_readers(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    return self.a(y) + self.b(y)


# What can be folded: the network, and name of the BatchNorm -> name of the layers.
FOLDED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "own_padding": (
        lambda: Network(chain, conv=SamePadding(4, 4, 3, bias=False), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "branches_and_outputs": (
        lambda: Network(branching, conv=conv(), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "without_gradients": (
        lambda: Network(without_gradients, conv=conv(), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "head_of_two_maps": (
        lambda: Network(shared_head, conv=conv(bias=False), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "rows_in_between": (
        lambda: Network(rows_in_between, linear=nn.Linear(6, 5), bn=nn.BatchNorm1d(5)),
        {"bn": "linear"},
    ),
    "transposed": (
        lambda: Network(transposed, linear=nn.Linear(6, 5), bn=nn.BatchNorm1d(5)),
        {"bn": "linear"},
    ),
    "dropout_in_between": (
        lambda: Network(chain, conv=conv(), drop=nn.Dropout(), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "activation_of_the_class": (
        lambda: Network(
            chain,
            a=conv(),
            norm=BatchNormAct2d(4, nn.Identity(), nn.SiLU(inplace=True)),
            b=conv(bias=False),
            frozen=FrozenBatchNormAct2d(4),
        ),
        {"norm": "a", "frozen": "b"},
    ),
    "our_activation": (
        lambda: Network(chain, conv=conv(), bn=BatchNorm2d(4, activation="gelu")),
        {"bn": "conv"},
    ),
    "a_class_of_its_own_without_bias": (
        lambda: Network(chain, conv=OwnLayer(F.conv2d, 4, 4, 3, 3), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "in_a_list": (
        lambda: Network(listed, conv=conv(), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
    ),
    "before_convolutions": (
        lambda: Network(two_readers, bn=nn.BatchNorm2d(4), a=conv(groups=2), b=conv(bias=False)),
        {"bn": "a, b"},
    ),
    "before_a_linear_layer": (
        lambda: Network(chain, flat=nn.Flatten(), bn=nn.BatchNorm1d(144), linear=nn.Linear(144, 3)),
        {"bn": "linear"},
    ),
    "before_a_reflected_border": (
        lambda: Network(chain, bn=nn.BatchNorm2d(4), conv=conv(padding=1, padding_mode="reflect")),
        {"bn": "conv"},
    ),
    "between_two_convolutions": (
        lambda: Network(
            chain, bn0=nn.BatchNorm2d(4), conv=conv(), bn1=nn.BatchNorm2d(4), next=conv()
        ),
        {"bn0": "conv", "bn1": "conv"},
    ),
}


@pytest.mark.parametrize(("make", "wanted"), FOLDED.values(), ids=FOLDED.keys())
def test_it_is_folded(make: Callable[[], nn.Module], wanted: dict[str, str]) -> None:
    model, x = trained(make()), images()
    expected = model(x.clone())
    folded, folding = fold_with_report(model, x)
    assert folding.folded == wanted
    assert not any("running_mean" in m._buffers for m in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)


def listed(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "layers"):
        self.layers = list(self.children())
    for layer in self.layers:
        x = layer(x)
    return x


def test_a_batch_norm_before_a_linear_layer_takes_rows_only() -> None:
    model = trained(Network(chain, bn=nn.BatchNorm1d(5), linear=nn.Linear(5, 3)))
    folded = fold_batchnorm(model, images()[:, 0, :5, 0])
    with pytest.raises(ValueError, match=r"shape \(N, C\)"):
        folded(torch.randn(2, 5, 5, dtype=torch.float64))


def wrong_dimension(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.linear(x.flatten(2)))


def tied() -> nn.Module:
    model = Network(chain, a=conv(padding=1), bn=nn.BatchNorm2d(4), b=conv())
    model.b.weight = model.a.weight
    return model


def two_norms(self: Any, x: Tensor) -> Tensor:
    return self.a(self.conv(x)) + self.b(self.conv(x))


def not_called(self: Any, x: Tensor) -> Tensor:
    return self.conv(x)


def depends_on_values(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) if x.sum() > 1e9 else x


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ignores_a_bias": (
        lambda: Network(chain, conv=WithoutBias(4, 4, 3, bias=False), bn=nn.BatchNorm2d(4)),
        "a layer whose weights are computed",
    ),
    "transposed_by_its_own_class": (
        lambda: Network(
            chain, conv=OwnLayer(F.conv_transpose2d, 4, 4, 3, 3, bias=True), bn=nn.BatchNorm2d(4)
        ),
        "used unlike torch's layers",
    ),
    "grouped_by_its_own_class": (
        lambda: Network(
            chain,
            bn=nn.BatchNorm2d(4),
            conv=OwnLayer(partial(F.conv2d, groups=2), 4, 2, 3, 3, bias=True),
        ),
        "an input of the model comes before it",
    ),
    "computed_weights": (
        lambda: Network(chain, conv=Standardized(4, 4, 3), bn=nn.BatchNorm2d(4)),
        "a layer whose weights are computed",
    ),
    "tied_weights": (tied, "a layer whose weights are computed, or shared"),
    "two_norms": (
        lambda: Network(two_norms, conv=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)),
        "used elsewhere",
    ),
    "another_dimension": (
        lambda: Network(wrong_dimension, linear=nn.Linear(36, 4), bn=nn.BatchNorm1d(4)),
        "its channels are not those",
    ),
    "always_trains": (
        lambda: Network(chain, conv=conv(), bn=AlwaysTrains(4, momentum=0.0)),
        "in training mode",
    ),
    "before_zeros": (
        lambda: Network(chain, bn=nn.BatchNorm2d(4), conv=conv(padding=1)),
        "an input of the model comes before it",
    ),
    "before_an_activation": (
        lambda: Network(chain, bn=nn.BatchNorm2d(4), act=nn.ReLU(), conv=conv()),
        "an input of the model comes before it",
    ),
    "pooling_in_between": (
        lambda: Network(chain, conv=conv(), pool=nn.MaxPool2d(2), bn=nn.BatchNorm2d(4)),
        "max_pool2d comes before it",
    ),
    "not_called": (
        lambda: Network(not_called, conv=conv(), bn=nn.BatchNorm2d(4)),
        "do not reach it",
    ),
    "not_exportable": (
        lambda: Network(depends_on_values, conv=conv(), bn=nn.BatchNorm2d(4)),
        "torch.export cannot export the model, and Network.forward of the model itself cannot be "
        "followed without inputs (GuardOnDataDependentSymNode: ",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_it_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    model, x = trained(make()), images()
    folded, folding = fold_with_report(model, x)
    assert not folding.folded and all(reason in found for found in folding.skipped.values())
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_an_unknown_class_is_named() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = trained(Network(chain, conv=conv(), bn=Doubled(4)))
    assert "Doubled is not torch's" in find_foldable(model, images()).skipped["bn"]


@pytest.mark.parametrize(
    "name",
    [n if n == "mobilenetv2" else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)
def test_architectures(name: str) -> None:
    """At least what is folded without inputs."""
    torch.manual_seed(0)
    model = trained(ARCHITECTURES[name].build())
    x = torch.randn(ARCHITECTURES[name].shape, dtype=torch.float64)
    with_inputs, without = find_foldable(model, x), find_foldable(model)
    assert with_inputs.folded.items() >= without.folded.items() and without.folded
    assert 0 <= with_inputs.difference < 1e-10 and without.difference is None
    assert "outputs differ by" in str(with_inputs)


def test_inputs_by_name_and_by_position() -> None:
    model = trained(Network(branching, conv=conv(), bn=nn.BatchNorm2d(4)))
    assert find_foldable(model, (images(),)).folded
    assert not find_foldable(model, {"x": images(), "skip": True}).folded


def draws(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.bn(self.conv(x)))


def no_floats(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)).argmax(1)


def only_nan(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) * float("nan")


@pytest.mark.parametrize(
    ("forward", "examples", "options", "error", "message"),
    [
        (draws, images(), {}, FoldError, "`model` to have the same outputs in two evaluations"),
        (chain, images(5), {}, FoldError, "`example_inputs` to run.*got RuntimeError"),
        (chain, (images(), 3), {}, FoldError, "`example_inputs` to run.*got TypeError"),
        (no_floats, images(), {}, FoldError, "tensors of floats"),
        (only_nan, images(), {}, FoldError, "finite"),
        (chain, images(), {"tolerance": 1e-30}, FoldError, "set `tolerance`"),
        (chain, images(), {"tolerance": 0}, ValueError, "`tolerance`"),
        (chain, 3, {}, TypeError, "`example_inputs`.*got int"),
    ],
    ids=[
        "random",
        "another_shape",
        "too_many",
        "no_floats",
        "only_nan",
        "beyond_the_tolerance",
        "tolerance",
        "no_inputs",
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(
    forward: Any, examples: Any, options: Any, error: type[Exception], message: str
) -> None:
    model = trained(Network(forward, conv=conv(), bn=nn.BatchNorm2d(4))).train()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fold_batchnorm(model, examples, **options)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def in_place(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return self.bn(self.conv(x.relu_()))


def test_neither_model_nor_inputs_change() -> None:
    model, x = trained(Network(in_place, conv=conv(), bn=nn.BatchNorm2d(4))), images()
    before, values = snapshot(model), x.clone()
    folded = fold_batchnorm(model, x)
    assert torch.equal(x, values) and snapshot(model) == before and not hasattr(folded, "calls")
    assert isinstance(folded.conv, nn.Conv2d) and not isinstance(folded.bn, _BatchNorm)
