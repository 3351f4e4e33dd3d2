"""The Triton ops inside PyTorch: what is saved, compilers, vmap, checkpoints, autocast, graphs."""

import io
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bn_lightning.kernels import batch_norm
from bn_lightning.kernels.activations import ACTIVATIONS, Saves, activate
from bn_lightning.modules.batch_norm import BatchNorm2d

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
SHAPE = (4, 3, 2, 4)
# One fp32 rounding of values of about 5, and a few more on the way.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


def _inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(21)
    x, residual, dy = (torch.randn(SHAPE, generator=g).to(device, dtype) for _ in range(3))
    return x * 2 + 3, residual, dy


def _module(device: str, activation: str = "relu", **kwargs: Any) -> BatchNorm2d:
    torch.manual_seed(22)
    module = BatchNorm2d(3, activation=activation, backend="triton", device=device, **kwargs)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def _saved_bytes(function: Callable[[], Tensor]) -> dict[int, int]:
    """Return the bytes of each storage that a forward saves for its backward."""
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        function()
    return storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(16, 8, 7, 7), (8, 8, 8, 8)], ids=["odd", "even"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_bytes(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    size = x.numel() * x.element_size()
    per_channel = 4 * 8 * 4  # mean, rstd, weight and bias, fp32

    def run(with_residual: bool, training: bool = True) -> dict[int, int]:
        return _saved_bytes(
            lambda: batch_norm(
                x,
                weight if training else weight.detach(),
                bias if training else bias.detach(),
                *((None, None) if training else (torch.zeros_like(bias), torch.ones_like(bias))),
                training=training,
                activation=activation,
                residual=residual if with_residual else None,
                backend="triton",
            )
        )

    assert sum(run(False).values()) <= size + per_channel
    extra = sum(run(True).values()) - size
    saves = ACTIVATIONS[activation].saves
    if saves in (Saves.NOTHING, Saves.MASK):
        assert extra <= per_channel + size / 16
    else:
        # y or the residual, each of which exists anyway.
        assert extra <= per_channel + size
    if activation == "identity":
        assert sum(run(False, training=False).values()) <= per_channel


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_double_backward(activation: str, device: str) -> None:
    def second(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        x, residual, dy = (v.to(dtype).requires_grad_() for v in _inputs(device))
        weight = torch.linspace(0.5, 1.5, 3, device=device, dtype=dtype).requires_grad_()
        y = batch_norm(
            x, weight, training=True, activation=activation, residual=residual, backend=backend
        )
        first = torch.autograd.grad(y, (x, weight, residual), dy, create_graph=True)
        penalty = sum((v * v).sum() for v in first)
        return torch.autograd.grad(penalty, (x, weight, dy, residual), allow_unused=True)

    for ours, true in zip(
        second(torch.float32, "triton"), second(torch.float64, "native"), strict=True
    ):
        if ours is None or true is None:
            # relu's second derivative is 0: torch says so with a tensor, we with none.
            assert all(v is None or v.count_nonzero() == 0 for v in (ours, true))
        else:
            torch.testing.assert_close(
                ours.double(), true, rtol=0, atol=5e-6 * true.abs().max().item()
            )


# torch's own, at the first import of Inductor.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("activation", "compiler"),
    [
        ("relu", "aot_eager"),
        ("gelu_tanh", "aot_eager"),
        pytest.param("relu", "inductor", marks=needs_compiler),
    ],
)
def test_compiles_with_a_dynamic_batch(activation: str, compiler: str, device: str) -> None:
    torch.compiler.reset()
    eager, compiled_module = _module(device, activation), _module(device, activation)
    compiled = torch.compile(compiled_module, fullgraph=True, dynamic=True, backend=compiler)
    for N in (4, 6):
        g = torch.Generator().manual_seed(N)
        x, residual, dy = (torch.randn(N, *SHAPE[1:], generator=g).to(device) for _ in range(3))
        results = []
        for module in (eager, compiled):
            inputs = [v.clone().requires_grad_() for v in (x, residual)]
            y = module(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, dy)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(eager.state_dict(), compiled_module.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_exports(training: bool, device: str) -> None:
    x, residual, _ = _inputs(device)
    module = _module(device).train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (x, residual), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    expected = _module(device).train(training)(x[:3], residual[:3])
    for exported in (program, torch.export.load(file)):
        torch.testing.assert_close(exported.module()(x[:3], residual[:3]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap_folds_into_the_channels(in_dim: int, device: str) -> None:
    B = 3
    x = torch.randn(B, *SHAPE, device=device)
    weight, mean, var = (torch.rand(B, 3, device=device) + 0.5 for _ in range(3))
    expected_mean, expected_var = mean.clone(), var.clone()

    def function(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, backend: str) -> Tensor:
        return batch_norm(
            x, weight, None, mean, var, training=True, activation="silu", backend=backend
        )

    expected = torch.stack(
        [function(*v, "native") for v in zip(x, weight, expected_mean, expected_var, strict=True)]
    )
    mapped = torch.func.vmap(function, in_dims=(in_dim, 0, 0, 0, None))
    y = mapped(x.movedim(0, in_dim), weight, mean, var, "triton")
    torch.testing.assert_close(y, expected, **TOLERANCE)
    torch.testing.assert_close((mean, var), (expected_mean, expected_var), **TOLERANCE)
    # Statistics that are not mapped cannot be updated, and are not.
    with pytest.raises(RuntimeError, match="`running_mean` and `running_var` to be mapped"):
        torch.func.vmap(function, in_dims=(0, 0, None, None, None))(
            x, weight, mean[0], var[0], "triton"
        )


# torch's own, at the first forward-mode derivative.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_torch_func_is_atens(activation: str, device: str) -> None:
    # Inside grad, jvp and their kin, and in forward mode, ATen computes.
    x, residual, dy = _inputs(device)
    weight = torch.linspace(0.5, 1.5, 3, device=device)

    def results(backend: str) -> list[Any]:
        def loss(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
            y = batch_norm(
                x, weight, training=True, activation=activation, residual=residual, backend=backend
            )
            return (y * dy).sum()

        inputs = (x, weight, residual)
        gradient = torch.func.grad(loss, argnums=(0, 1, 2))
        xs = torch.stack((x, residual))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, dy)
            forward = torch.autograd.forward_ad.unpack_dual(loss(dual, weight, residual)).tangent
        return [
            gradient(*inputs),
            torch.func.jvp(loss, inputs, (dy, weight, x)),
            torch.func.vmap(gradient, in_dims=(0, None, None))(xs, weight, residual),
            torch.func.grad(lambda x: gradient(x, weight, residual)[0].square().sum())(x),
            forward,
        ]

    for ours, native in zip(results("triton"), results("native"), strict=True):
        torch.testing.assert_close(ours, native, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_checkpointing_updates_the_statistics_once(
    backend: str, use_reentrant: bool, device: str
) -> None:
    x, residual, dy = _inputs(device)
    plain, checkpointed = _module(device), _module(device)
    plain.backend = checkpointed.backend = backend
    results = []
    for run in (plain, lambda *v: checkpoint(checkpointed, *v, use_reentrant=use_reentrant)):
        inputs = [v.clone().requires_grad_() for v in (x, residual)]
        run(*inputs).backward(dy)
        results.append([v.grad for v in inputs])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(plain.state_dict(), checkpointed.state_dict(), rtol=0, atol=0)
    assert checkpointed.num_batches_tracked.item() == 1


def test_two_forwards_before_a_backward(device: str) -> None:
    x, residual, dy = _inputs(device)
    module = _module(device)
    results = []
    for inputs in ((x, residual), (residual, x)):
        leaf = inputs[0].clone().requires_grad_()
        results.append((leaf, module(leaf, inputs[1])))
    for (leaf, y), inputs in zip(results, ((x, residual), (residual, x)), strict=True):
        alone = inputs[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(_module(device)(alone, inputs[1]), alone, dy)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], expected)


def test_evaluation_backward_after_a_training_step(device: str) -> None:
    x, _, dy = _inputs(device)
    module = _module(device, "silu").eval()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf), leaf, dy)
    y = module(leaf)
    module.train()(x)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_is_torchs(dtype: torch.dtype, device: str) -> None:
    x, _, _ = _inputs(device, dtype)
    with torch.autocast(device, torch.bfloat16):
        torchs = nn.BatchNorm2d(3, device=device)(x)
        ours = _module(device, "identity")(x)
    assert ours.dtype == torchs.dtype


def test_gradients_of_another_layout(device: str) -> None:
    x, residual, dy = _inputs(device)
    cl = torch.channels_last
    for x_format, other_format in ((torch.contiguous_format, cl), (cl, torch.contiguous_format)):
        results = []
        for backend in ("triton", "native"):
            leaves = [v.to(memory_format=x_format).requires_grad_() for v in (x.clone(),)]
            other = residual.to(memory_format=other_format)
            y = batch_norm(
                leaves[0], training=True, activation="relu", residual=other, backend=backend
            )
            results.append((y, *torch.autograd.grad(y, leaves, dy.to(memory_format=other_format))))
        torch.testing.assert_close(*results, **TOLERANCE)
        assert results[0][0].is_contiguous(memory_format=x_format)


@pytest.mark.parametrize(
    ("activation", "has_residual", "training"),
    [("leaky_relu", False, True), ("silu", True, True), ("tanh", True, False)],
    ids=["leaky_relu_training", "add_silu_training", "add_tanh_evaluation"],
)
def test_gradcheck_in_fp64(
    activation: str, has_residual: bool, training: bool, device: str
) -> None:
    x, residual, _ = (v[:3, :2, :1, :2].double().requires_grad_() for v in _inputs(device))
    weight, bias = (torch.rand(2, dtype=torch.float64, device=device) + 0.5 for _ in range(2))
    state = torch.zeros(2, device=device).double(), torch.ones(2, device=device).double()

    def function(*inputs: Tensor) -> Tensor:
        return batch_norm(
            *inputs[:3],
            *(v.clone() for v in state),
            training=training,
            activation=activation,
            residual=inputs[3] if has_residual else None,
        )

    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), residual)
    inputs = inputs if has_residual else inputs[:3]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_the_residuals_gradient(device: str) -> None:
    x, residual, dy = _inputs(device)
    for activation in ("identity", "relu", "silu", "sigmoid"):
        gradients = []
        for backend in ("triton", "native"):
            leaf = residual.clone().requires_grad_()
            y = batch_norm(x, training=True, activation=activation, residual=leaf, backend=backend)
            gradients.append(torch.autograd.grad(y, leaf, dy)[0])
        torch.testing.assert_close(*gradients, **TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("regime", ["single_launch", "two_pass"])
def test_cuda_graph_capture_and_replay(regime: str) -> None:
    from bn_lightning.kernels.schedule import Regime, forced_regime

    x, residual, dy = _inputs("cuda")
    module, plain = _module("cuda"), _module("cuda")
    static = [v.clone().requires_grad_() for v in (x, residual)]

    def step() -> tuple[Tensor, ...]:
        y = module(*static)
        return (y, *torch.autograd.grad(y, static, dy))

    with forced_regime(Regime(regime)):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        module.load_state_dict(plain.state_dict())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for scale in (1.0, 2.0):
            with torch.no_grad():
                static[0].copy_(x * scale)
            graph.replay()
            leaves = [v.clone().requires_grad_() for v in (x * scale, residual)]
            y = plain(*leaves)
            expected = (y, *torch.autograd.grad(y, leaves, dy))
            torch.testing.assert_close(results, expected, **TOLERANCE)
            torch.testing.assert_close(module.state_dict(), plain.state_dict(), **TOLERANCE)


def test_activate_is_torchs() -> None:
    z = torch.linspace(-2, 2, 9)
    assert torch.equal(activate(z, "leaky_relu", 0.2), torch.nn.functional.leaky_relu(z, 0.2))
