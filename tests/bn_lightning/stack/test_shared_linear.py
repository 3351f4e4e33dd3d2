"""The product of all members' weights with a shared input, against double precision."""

import pytest
import torch
from torch import nn

from bn_lightning.stack import shared_linear as module
from bn_lightning.stack.context import Placed
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.shared_linear import add_weight_gradient, shared_linear

SHAPES = [(1, 1, 1), (7, 12, 35), (60, 30, 330), (0, 4, 6)]
# Of the sum of the products' magnitudes.
ERROR = {torch.float32: 1e-6, torch.float64: 1e-15}


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def kernels(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(module, "_has_onednn", lambda: False)
    elif not module._has_onednn():
        pytest.skip("this build of torch has no oneDNN")


def drawn(shape, dtype, gaps):
    """x, dy, weight, bias; with gaps the rows of x and dy are every second one of two."""
    n, i, m = shape
    generator = torch.Generator().manual_seed(3)
    step = 2 if gaps else 1
    x, dy = (
        torch.randn(step * n, step * size, dtype=dtype, generator=generator)[::step, ::step]
        for size in (i, m)
    )
    weight = torch.randn(m, i, dtype=dtype, generator=generator)
    return x, dy, weight, torch.randn(m, dtype=dtype, generator=generator)


def check(found, expected, magnitude):
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= ERROR[found.dtype] * magnitude).all()


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_products(shape, dtype, gaps):
    x, dy, weight, bias = drawn(shape, dtype, gaps)
    exact = [tensor.double() for tensor in (x, dy, weight, bias)]
    x64, dy64, weight64, bias64 = exact
    reach = x64.abs() @ weight64.abs().t()
    check(shared_linear(x, weight), x64 @ weight64.t(), reach)
    check(shared_linear(x, weight, bias), x64 @ weight64.t() + bias64, reach + bias64.abs())
    expected = weight64 - 0.3 * dy64.t() @ x64
    add_weight_gradient(weight, dy, x, -0.3)
    check(weight, expected, weight64.abs() + dy64.t().abs() @ x64.abs())


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.usefixtures("kernels")
def test_second_derivatives(dtype):
    networks = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)]
    stacked = StackedNetwork([network.to(dtype) for network in networks])
    x, _, _, _ = drawn((7, 6, 5), dtype, gaps=False)

    def penalties(outputs, parameters):
        (gradient,) = torch.autograd.grad(outputs.sum(), parameters[:1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameters[:1])[0]

    found = penalties(stacked(Placed(x, None)).value, list(stacked.parameters()))
    for k, network in enumerate(networks):
        expected = penalties(network(x), list(network.parameters()))
        largest = float(expected.abs().max())
        torch.testing.assert_close(found[k], expected, rtol=0, atol=30 * ERROR[dtype] * largest)
