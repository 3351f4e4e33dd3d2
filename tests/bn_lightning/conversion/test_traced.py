"""Under torch.compile and torch.export the graph has the fused calls, and the results stay."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from swish import Swish
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning import convert_batchnorm


def pair(name: str, backend: str = "auto") -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a converted network, an unconverted copy, and an input."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    untouched = architecture.build()
    fused = copy.deepcopy(untouched)
    convert_batchnorm(fused, fuse=True, backend=backend)
    return fused, untouched, torch.randn(architecture.shape)


def count_fused(graph: fx.Graph) -> tuple[int, int]:
    """Return the number of BatchNorms with an activation or a residual, and of all."""
    calls = [n for n in graph.nodes if n.target == torch.ops.bn_lightning.batch_norm.default]
    calls += [n for n in graph.nodes if n.target == torch.ops.bn_lightning.batch_norm]
    is_fused = [n.args[1] is not None or "identity" not in n.args for n in calls]
    return sum(is_fused), len(calls)


class _GraphFound(Exception):
    pass


def compiled_graph(module: nn.Module, x: Tensor) -> fx.Graph:
    """Return the graph that a backend of torch.compile gets."""
    found = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        found.append(graph.graph)
        raise _GraphFound

    torch.compiler.reset()
    with pytest.raises(Exception, match="_GraphFound|^$"):
        torch.compile(module, backend=backend, fullgraph=True)(x)
    return found[0]


# Larger ones take a minute.
MARKS = {"mlp": [], "conv1d": [], **dict.fromkeys(["net3d", "resnet18"], [pytest.mark.slow])}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, [pytest.mark.soak])) for name in ARCHITECTURES],
)
def test_the_graph_has_what_is_fused_eagerly(name: str) -> None:
    pytest.importorskip("triton")
    fused, _, x = pair(name, backend="triton")
    total = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    wanted = (total - len(ARCHITECTURES[name].unfused), total)
    assert count_fused(compiled_graph(fused, x)) == wanted
    strict = name in ("mlp", "conv1d", "net3d")  # it takes long
    program = torch.export.export(fused.eval(), (x,), strict=strict)
    assert count_fused(program.graph) == wanted


# DenseNet only in evaluation: its dropout draws other numbers when compiled.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"),
    [("mlp", True), ("resnet18", True), ("densenet", False)],
    ids=lambda value: str(value),
)
def test_compiled_without_a_graph_break(name: str, training: bool) -> None:
    fused, untouched, x = pair(name)
    fused.train(training)
    untouched.train(training)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), untouched(x))
    torch.testing.assert_close(fused.state_dict(), untouched.state_dict())


@pytest.mark.parametrize(
    ("name", "strict"),
    [("mlp", True), ("resnet18", False), ("densenet", False), ("conv1d", True)],
    ids=lambda value: str(value),
)
def test_exported(name: str, strict: bool) -> None:
    fused, untouched, x = pair(name)
    argument = next(iter(inspect.signature(untouched.forward).parameters))
    sizes = {argument: {0: torch.export.Dim.AUTO}}
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes=sizes, strict=strict)
    assert program.graph_signature.user_inputs == (argument,)
    assert set(program.state_dict) == set(untouched.state_dict())
    y = program.module()(torch.cat([x, x]))
    torch.testing.assert_close(y, untouched.eval()(torch.cat([x, x])))


@pytest.mark.parametrize("name", ["mlp", "resnet18", "densenet"])
def test_traced_by_fx(name: str) -> None:
    fused, untouched, x = pair(name)
    again = fx.symbolic_trace(fused.eval())
    torch.testing.assert_close(again(x), untouched.eval()(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)


def read_twice(self, x):
    y = self.bn(x)
    return F.relu(y) + y


def in_place(self, x):
    y = self.bn(x)
    y += self.linear(x)
    y.relu_()
    return y * 2


def in_containers(self, x):
    y = self.bn(x)
    return {"y": y, "both": [torch.cat([y, x]), y.flatten(0)], "rows": y.shape[0]}


def through_an_autograd_function(self, x):
    return Swish.apply(self.bn(x))


def into_a_checkpoint(self, x):
    return checkpoint(lambda y: F.relu(y) * 2, self.bn(x), use_reentrant=False)


def no_grad_in_between(self, x):
    y = self.bn(x)
    with torch.no_grad():
        z = F.relu(y)
    return y * z


# torch 2.13's Dynamo does what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize(
    "forward",
    [
        read_twice,
        in_place,
        *(
            pytest.param(forward, marks=pytest.mark.slow)
            for forward in (
                in_containers,
                through_an_autograd_function,
                into_a_checkpoint,
                no_grad_in_between,
            )
        ),
    ],
    ids=lambda forward: forward.__name__,
)
def test_compiled_forwards_compute_the_same(forward: Callable[..., Any]) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    untouched = type("Forward", (Net,), {"forward": forward})()
    module = copy.deepcopy(untouched)
    convert_batchnorm(module, fuse=True, backend="triton")
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for m, function in ((module, compiled), (untouched, untouched)):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x)
        leaves = torch.utils._pytree.tree_leaves(y)
        assert all(type(leaf) in (Tensor, int) for leaf in leaves)
        loss = sum((t - 1).square().sum() for t in leaves if isinstance(t, Tensor))
        loss.backward()
        found.append([y, x.grad, m.bn.weight.grad, m.bn.bias.grad, *m.buffers()])
    # The kernels compute in fp32 and sum in another order.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
