"""The observer finds what can be fused and folded in forwards whose answer is known."""

from collections.abc import Callable

import pytest
import torch
from observer import Observer
from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module):
    """Two convolutions, each with a BatchNorm, and a forward given as a function."""

    def __init__(self, forward: Callable[["Network", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.other_conv, self.other_bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.dropout, self.no_dropout = nn.Dropout(0.5), nn.Dropout(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.work = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self, x)


def observed(forward: Callable[[Network, Tensor], Tensor], training: bool) -> Observer:
    torch.manual_seed(0)
    network = Network(forward).train(training)
    x = torch.randn(3, 2, 4, 4)
    with Observer(network) as observer:
        y = network(x)
    observer.returned(y)
    return observer


def read_twice(n: Network, x: Tensor) -> Tensor:
    y = n.bn(x)
    return y + F.relu(y)


def in_place(n: Network, x: Tensor) -> Tensor:
    y = n.bn(x)
    y += x
    return y * n.relu(y)  # reads the sum twice, the normalised value once


def over_another(n: Network, x: Tensor) -> Tensor:
    y = x.clone()
    y += n.bn(x)
    return y


def over_a_result(n: Network, x: Tensor) -> Tensor:
    y = n.other_bn(x)
    y += n.bn(x)
    return y


def asks_size(n: Network, x: Tensor) -> Tensor:
    y = n.bn(x)
    assert y.dim() == 4 and y.dtype == x.dtype and y.size(0) == len(y) and y.requires_grad
    return F.relu(y.view_as(y) if y.shape[1] == 3 else y)


FUSABLE: dict[str, tuple[Callable[[Network, Tensor], Tensor], list[tuple[str, ...]]]] = {
    "function": (lambda n, x: F.silu(n.bn(x)), [("bn",)]),
    "method": (lambda n, x: n.bn(x).sigmoid(), [("bn",)]),
    "module": (lambda n, x: n.relu(n.bn(x)), [("bn",)]),
    "relu6": (lambda n, x: F.hardtanh(n.bn(x), 0, 6), [("bn",)]),
    "hardtanh": (lambda n, x: F.hardtanh(n.bn(x)), []),
    "elu": (lambda n, x: F.elu(n.bn(x)), [("bn",)]),
    "elu_of_another_alpha": (lambda n, x: F.elu(n.bn(x), 0.5), []),
    "addition": (lambda n, x: x + n.bn(x), [("bn",)]),
    "addition_in_place": (in_place, [("bn",)]),
    "addition_of_two": (lambda n, x: F.relu(n.bn(x) + n.other_bn(x)), [("bn", "other_bn")]),
    "addition_over_another": (over_another, [("bn",)]),
    "addition_over_a_result": (over_a_result, [("other_bn", "bn")]),
    "addition_of_a_scalar": (lambda n, x: n.bn(x) + 1, []),
    "addition_of_a_broadcast": (lambda n, x: n.bn(x) + x[:1], []),
    "addition_scaled": (lambda n, x: torch.add(n.bn(x), x, alpha=2), []),
    "no_dropout_between": (lambda n, x: F.relu(n.no_dropout(n.bn(x)).contiguous()), [("bn",)]),
    "dropout_between": (lambda n, x: F.relu(n.dropout(n.bn(x))), []),
    "size_asked": (asks_size, [("bn",)]),
    "read_twice": (read_twice, []),
    "returned": (lambda n, x: n.bn(x), []),
    "value_asked": (lambda n, x: F.relu(y) if (y := n.bn(x)).max() > 0 else y, []),
    "each_call": (lambda n, x: F.relu(n.bn(F.relu(n.bn(x)))), [("bn",), ("bn",)]),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_fusable(name):
    forward, expected = FUSABLE[name]
    found = observed(forward, training=True).fusable()
    assert [site.modules for site in found] == expected


def read_before(n: Network, x: Tensor) -> Tensor:
    y = n.conv(x)
    return n.bn(y) + y


FOLDABLE: dict[str, tuple[Callable[[Network, Tensor], Tensor], set[str]]] = {
    "after_convolution": (lambda n, x: n.bn(n.conv(x)), {"bn"}),
    "before_unpadded_convolution": (lambda n, x: n.other_conv(n.bn(x)), {"bn"}),
    "before_padded_convolution": (lambda n, x: n.conv(n.bn(x)), set()),
    "both": (lambda n, x: n.other_bn(n.other_conv(F.relu(n.bn(n.conv(x))))), {"bn", "other_bn"}),
    "activation_between": (lambda n, x: n.bn(F.relu(n.conv(x))), set()),
    "no_dropout_between": (lambda n, x: n.bn(n.dropout(n.conv(x))), {"bn"}),
    "read_before": (read_before, set()),
    "called_twice": (lambda n, x: n.bn(n.conv(n.bn(n.conv(x)))), set()),
    "weight_used_twice": (lambda n, x: n.bn(n.conv(x)) * n.conv.weight.sum(), set()),
    "computed_weight": (lambda n, x: n.bn(F.conv2d(x, n.conv.weight * 2)), set()),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_foldable(name):
    forward, expected = FOLDABLE[name]
    assert observed(forward, training=False).foldable() == expected


class Frozen(nn.Module):
    """A BatchNorm that computes by itself, as several packages have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.running_var.rsqrt()[:, None, None]
        return x * scale - self.running_mean[:, None, None] * scale


def test_a_batch_norm_of_another_class():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), Frozen(), nn.ReLU()).eval()
    with Observer(network) as observer:
        y = network(torch.randn(1, 2, 3, 3))
    observer.returned(y)
    assert [site.modules for site in observer.fusable()] == [("1",)]
    assert observer.foldable() == {"1"}
