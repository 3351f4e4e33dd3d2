"""The modules compared with torch's: state, steps, checkpoints both ways, errors."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_lightning.kernels import dispatch
from bn_lightning.kernels.activations import activate
from bn_lightning.modules import batch_norm

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
backends = pytest.mark.parametrize(
    "backend", ["native", pytest.param("triton", marks=needs_triton)]
)
# Name -> ours, torch's, shape of the input.
MODULES: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "1d_rows": (batch_norm.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    "1d": (batch_norm.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "2d": (batch_norm.BatchNorm2d, nn.BatchNorm2d, (3, 3, 2, 4)),
    "3d": (batch_norm.BatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
}
modules = pytest.mark.parametrize(("ours", "torchs", "shape"), MODULES.values(), ids=MODULES.keys())
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cumulative": {"momentum": None},
    "large_momentum": {"momentum": 0.9, "eps": 1e-2},
    "plain": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "add_relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "neither": {"affine": False, "track_running_stats": False},
}
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())

FUSED = {"activation": "identity", "negative_slope": 0.01}

# Four fp32 steps on values of about 3; each term is rounded by 2^-24.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _pair(
    ours: type[nn.Module], torchs: type[nn.Module], device: str, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """Build both modules with the same random state."""
    backend = kwargs.pop("backend", "auto")
    a = ours(3, **kwargs, device=device, backend=backend)
    fused = {k: kwargs.pop(k, v) for k, v in FUSED.items()}
    b = torchs(3, **kwargs, device=device)
    b.register_forward_hook(lambda module, inputs, y: activate(y, **fused))
    g = torch.Generator().manual_seed(8)
    for value in b.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(3, generator=g) + 0.5)
    a.load_state_dict(b.state_dict())
    return a, b


def _input(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 2 + 3).to(device)


def _step(module: nn.Module, shape: tuple[int, ...], device: str, seed: int) -> list[Tensor]:
    """Run forward and backward, and take a gradient step."""
    x = _input(shape, device, seed).requires_grad_()
    y = module(x)
    parameters = list(module.parameters())
    dx, *gradients = torch.autograd.grad(y, (x, *parameters), _input(shape, device, seed + 100))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.1 * gradient
    return [y, dx, *gradients]


@backends
@options
@modules
def test_steps_are_torchs(
    ours: type[nn.Module],
    torchs: type[nn.Module],
    shape: tuple[int, ...],
    kwargs: dict[str, Any],
    backend: str,
    device: str,
) -> None:
    a, b = _pair(ours, torchs, device, **kwargs, backend=backend)
    for seed, training in enumerate([True, True, False, True, False]):
        a.train(training)
        b.train(training)
        results = (_step(m, shape, device, seed) for m in (a, b))
        torch.testing.assert_close(*results, **TOLERANCE)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), **TOLERANCE)


@options
@modules
def test_checkpoints_load_both_ways(
    ours: type[nn.Module],
    torchs: type[nn.Module],
    shape: tuple[int, ...],
    kwargs: dict[str, Any],
    device: str,
) -> None:
    a, b = _pair(ours, torchs, device, **kwargs)
    assert list(a.state_dict()) == list(b.state_dict())
    _step(a, shape, device, seed=1)
    b.load_state_dict(a.state_dict())
    a.eval()
    b.eval()
    x = _input(shape, device, seed=2)
    torch.testing.assert_close(a(x), b(x), **TOLERANCE)
    _step(b.train(), shape, device, seed=3)
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a(x), b.eval()(x), **TOLERANCE)


@modules
def test_modules_are_subclasses_of_torchs(
    ours: type[nn.Module], torchs: type[nn.Module], shape: tuple[int, ...], device: str
) -> None:
    a, b = _pair(ours, torchs, device)
    assert isinstance(a, torchs)
    assert a.extra_repr() == b.extra_repr() + ", backend=auto"
    assert repr(a).startswith(type(b).__name__)
    again = pickle.loads(pickle.dumps(copy.deepcopy(a)))
    assert again.backend == "auto"
    x = _input(shape, device, seed=0)
    assert torch.equal(again(x), a(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtype_is_that_of_parameters_and_buffers(dtype: torch.dtype, device: str) -> None:
    module = batch_norm.BatchNorm1d(3, device=device, dtype=dtype)
    states = dict(module.state_dict())
    assert states.pop("num_batches_tracked").dtype == torch.int64
    assert {v.dtype for v in states.values()} == {dtype}
    assert module(torch.randn(4, 3, device=device, dtype=dtype)).dtype == dtype


@pytest.mark.skipif(
    "bias" not in inspect.signature(torch.nn.BatchNorm1d).parameters,
    reason="torch before 2.13 has no BatchNorm without a bias",
)
def test_without_bias(device: str) -> None:
    module = batch_norm.BatchNorm1d(3, bias=False, device=device)
    assert module.bias is None and module.weight is not None
    assert module(_input((4, 3), device, seed=0)).shape == (4, 3)


@backends
def test_rebound_statistics_and_untracked_training(backend: str, device: str) -> None:
    # SWA rebinds running_mean, and Lightning's BaseFinetuning.freeze sets
    # track_running_stats=False.
    x = _input((4, 3), device, seed=0)
    a, b = _pair(batch_norm.BatchNorm1d, nn.BatchNorm1d, device, backend=backend)
    for module in (a, b):
        module.running_mean = torch.full((3,), 2.0, device=device)
        module(x)
        module.track_running_stats = False
        module(x)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **TOLERANCE)
    torch.testing.assert_close(a.eval()(x), b.eval()(x), **TOLERANCE)


@backends
@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_one_value_per_channel_raises_and_changes_nothing(
    momentum: float | None, backend: str, device: str
) -> None:
    module = batch_norm.BatchNorm1d(3, momentum=momentum, device=device, backend=backend)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
        module(torch.ones(1, 3, device=device))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert module.eval()(torch.ones(1, 3, device=device)).shape == (1, 3)


@modules
def test_wrong_dimensions_raise_as_torch_does(
    ours: type[nn.Module], torchs: type[nn.Module], shape: tuple[int, ...], device: str
) -> None:
    a, b = _pair(ours, torchs, device)
    x = torch.ones(3, device=device)
    messages = []
    for module in (a, b):
        with pytest.raises(ValueError) as raised:
            module(x)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"num_features": 0}, "num_features"),
        ({"eps": -1e-5}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"backend": "cudnn"}, "backend"),
        ({"activation": "swish"}, "activation"),
    ],
    ids=[
        "num_features",
        "eps",
        "nan_eps",
        "large_momentum",
        "negative_momentum",
        "backend",
        "activation",
    ],
)
def test_constructor_checks_its_arguments(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"expected `{argument}` to be .*, got "):
        batch_norm.BatchNorm1d(**{"num_features": 3} | kwargs)


@backends
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_without_a_graph_break(training: bool, backend: str, device: str) -> None:
    a, _ = _pair(batch_norm.BatchNorm1d, nn.BatchNorm1d, device, backend=backend)
    b = copy.deepcopy(a)
    a.train(training)
    b.train(training)
    torch.compiler.reset()
    compiled = torch.compile(a, fullgraph=True, backend="aot_eager")
    x = _input((4, 3, 5), device, seed=0)
    assert torch.equal(compiled(x), b(x))
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@backends
def test_residual(backend: str, device: str) -> None:
    a, b = _pair(batch_norm.BatchNorm2d, nn.BatchNorm2d, device, backend=backend)
    a.activation = "silu"
    x, residual = (_input((3, 3, 2, 4), device, seed) for seed in (0, 1))
    torch.testing.assert_close(a(x, residual), nn.functional.silu(b(x) + residual), **TOLERANCE)


RESIDUALS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda x: x[:1], ValueError, "`residual`.*shape"),
    "device": (lambda x: x.to("meta"), RuntimeError, "`residual`.*meta"),
}


@backends
@pytest.mark.parametrize(("change", "error", "match"), RESIDUALS.values(), ids=RESIDUALS.keys())
def test_wrong_residuals_raise_and_change_nothing(
    change: Any, error: type[Exception], match: str, backend: str, device: str
) -> None:
    module = batch_norm.BatchNorm1d(3, activation="relu", backend=backend, device=device)
    before = copy.deepcopy(module.state_dict())
    x = _input((4, 3), device, seed=0)
    with pytest.raises(error, match=match):
        module(x, change(x))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@backends
def test_frozen_statistics_survive_train(backend: str, device: str) -> None:
    a, b = _pair(batch_norm.BatchNorm1d, nn.BatchNorm1d, device, backend=backend)
    before = copy.deepcopy(a.state_dict())
    x = _input((4, 3), device, seed=0)
    assert a.freeze_stats() is a
    a.train()
    b.eval()
    torch.testing.assert_close(a(x), b(x), **TOLERANCE)
    again = pickle.loads(pickle.dumps(copy.deepcopy(a)))
    torch.testing.assert_close(again(x), b(x), **TOLERANCE)
    torch.testing.assert_close(a.state_dict(), before, rtol=0, atol=0)
    assert "stats_frozen=True" in repr(a)
    # One value per channel is enough, and weight and bias are still trained.
    a(x[:1]).sum().backward()
    assert a.weight.grad is not None and a.bias.grad is not None
    torch.testing.assert_close(a.freeze_stats(False)(x), b.train()(x), **TOLERANCE)
    assert a.num_batches_tracked == before["num_batches_tracked"] + 1


def test_freezing_without_statistics_raises() -> None:
    with pytest.raises(ValueError, match="`track_running_stats`"):
        batch_norm.BatchNorm1d(3, track_running_stats=False).freeze_stats()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_jit_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), batch_norm.BatchNorm1d(3))
    message = "torch.jit.*torch.nn.BatchNorm1d"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(network)
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(network, torch.randn(4, 3))


@backends
def test_a_cumulative_average_compiles(backend: str, device: str) -> None:
    # Reading the count on the host would break the graph.
    a, b = _pair(batch_norm.BatchNorm1d, nn.BatchNorm1d, device, momentum=None, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(a, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = _input((4, 3, 5), device, seed)
        torch.testing.assert_close(compiled(x), b(x), **TOLERANCE)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), **TOLERANCE)


def test_an_activation_for_one_call_does_not_change_the_module():
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    module = batch_norm.BatchNorm1d(3, activation="tanh").eval()
    plain = nn.BatchNorm1d(3).eval()
    z = plain(x) + residual
    torch.testing.assert_close(module(x, residual, activation="relu"), z.relu())
    torch.testing.assert_close(
        module(x, residual, activation="leaky_relu", negative_slope=0.3),
        torch.nn.functional.leaky_relu(z, 0.3),
    )
    torch.testing.assert_close(module(x, residual), z.tanh())


def test_fx_records_a_call_as_one_node():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = batch_norm.BatchNorm1d(3)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.bn(x, residual, activation="relu") + self.bn(x)

    block = Block().eval()
    traced = torch.fx.symbolic_trace(block)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x, residual = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(traced(x, residual), block(x, residual))
