"""The public function and its ops: numbers, gradients, strides, compilers, errors."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.kernels import batch_norm, dispatch, ops, reference
from bn_lightning.kernels.activations import ACTIVATIONS
from bn_lightning.kernels.layout import mask_shape

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")
needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
triton = pytest.param("triton", marks=needs_triton)
backends = pytest.mark.parametrize("backend", ["native", triton])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

# A few units in the last place, for where torch's own error happens to be zero: of the largest
# value for y and dx, of the largest sum of absolute values for dweight and dbias.
ABSOLUTE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

EPS = 1e-5


def _plain(x: Tensor) -> Tensor:
    return x


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _slice(x: Tensor) -> Tensor:
    return x[:, ::2, 1:]


# Name -> shape, and what is done to x before the BatchNorm.
CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "rows": ((7, 3), _plain),
    "m_is_2": ((2, 3), _plain),
    "l_is_1": ((5, 3, 1), _plain),
    "sequence": ((4, 3, 5), _plain),
    "one_channel": ((6, 1, 5), _plain),
    "65_channels": ((3, 65, 2), _plain),
    "one_over_a_tile_of_rows": ((129, 65), _plain),
    "one_over_a_tile_of_positions": ((1, 3, 4097), _plain),
    "images": ((3, 3, 5, 7), _plain),
    "volumes": ((2, 3, 2, 3, 2), _plain),
    "channels_last": ((2, 3, 4, 5), _channels_last),
    "slice": ((4, 6, 5), _slice),
}


def _tensors(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, C: int | None = None
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    C = C or shape[1]
    return {
        "x": (torch.randn(shape, generator=g) * 2 + 3).to(device, dtype),
        "weight": torch.randn(C, generator=g).to(device),
        "bias": torch.randn(C, generator=g).to(device),
        "running_mean": torch.randn(C, generator=g).to(device),
        "running_var": (torch.rand(C, generator=g) + 0.5).to(device),
    }


def _run(
    function: Callable[..., Tensor], t: dict[str, Tensor], dy: Tensor, **kwargs: Any
) -> dict[str, Tensor]:
    """Return y, the three gradients and the running statistics, on copies of `t`."""
    # clone keeps the strides of x.
    c = {k: v.detach().clone() for k, v in t.items()}
    inputs = [c[k].requires_grad_() for k in ("x", "weight", "bias")]
    y = function(*inputs, c["running_mean"], c["running_var"], eps=EPS, **kwargs)
    gradients = torch.autograd.grad(y, inputs, dy)
    names = ("dx", "dweight", "dbias")
    running = {k: c[k] for k in ("running_mean", "running_var")}
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True)), **running}


def _torch_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    **kwargs: Any,
) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, **kwargs)


def _assert_three_way(t: dict[str, Tensor], dy: Tensor, training: bool, backend: str) -> None:
    ours = _run(batch_norm, t, dy, training=training, backend=backend)
    torchs = _run(_torch_batch_norm, t, dy, training=training)
    t64 = {k: v.double() for k, v in t.items()}
    true = _run(reference.batch_norm, t64, dy.double(), training=training)
    x_hat = reference.batch_norm(t64["x"], training=True)
    dims = [d for d in range(dy.dim()) if d != 1]
    sums = {"dweight": (dy * x_hat).abs().sum(dims), "dbias": dy.abs().sum(dims)}
    for name, expected in true.items():
        scale = sums.get(name, expected).abs().max().clamp(min=1.0)
        assert ours[name].dtype == torchs[name].dtype
        error, torch_error = (
            (v[name].double() - expected).abs().max() / scale for v in (ours, torchs)
        )
        assert error <= 2 * torch_error + ABSOLUTE[ours[name].dtype], name


@dtypes
@modes
@backends
@pytest.mark.parametrize(("shape", "prepare"), CASES.values(), ids=CASES.keys())
def test_three_way(
    shape: tuple[int, ...],
    prepare: Callable[[Tensor], Tensor],
    backend: str,
    training: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    x = prepare(_tensors(shape, device, dtype)["x"])
    t = _tensors(shape, device, dtype, C=x.shape[1]) | {"x": x}
    g = torch.Generator().manual_seed(6)
    dy = (torch.randn(x.shape, generator=g) + 0.5).to(x)
    _assert_three_way(t, dy, training, backend)


@modes
@backends
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5)], ids=["rows", "sequence"])
def test_expanded_gradient(
    shape: tuple[int, ...], backend: str, training: bool, device: str
) -> None:
    dy = torch.randn(shape[1:], device=device).expand(shape)
    assert dy.stride(0) == 0
    t = _tensors(shape, device)
    _assert_three_way(t, dy, training, backend)
    # One value for all of a channel, as a mean over space gives it.
    dy = torch.randn(shape[1], device=device).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    _assert_three_way(t, dy, training, backend)


@backends
@modes
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)], ids=["rows", "batch", "space"])
def test_empty_input_is_torchs(
    shape: tuple[int, ...], backend: str, training: bool, device: str
) -> None:
    t = _tensors(shape, device)
    dy = torch.zeros(shape, device=device)
    ours = _run(batch_norm, t, dy, training=training, backend=backend)
    torchs = _run(_torch_batch_norm, t, dy, training=training)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)
    assert torch.equal(ours["running_mean"], t["running_mean"])


@backends
@pytest.mark.parametrize("shape", [(1, 100), (1, 3, 1), (1, 3, 1, 1)], ids=["row", "1d", "2d"])
def test_one_value_per_channel_raises_as_torch_does(
    shape: tuple[int, ...], backend: str, device: str
) -> None:
    t = _tensors(shape, device)
    before = t["running_mean"].clone()
    running = t["running_mean"], t["running_var"]
    with pytest.raises(ValueError) as torchs:
        F.batch_norm(t["x"], *running, training=True)
    with pytest.raises(ValueError) as ours:
        batch_norm(t["x"], None, None, *running, training=True, backend=backend)
    assert str(ours.value).startswith(str(torchs.value))
    assert str(ours.value).endswith("; use a batch of at least 2 samples, or model.eval()")
    assert torch.equal(t["running_mean"], before)
    # In evaluation one value is enough.
    batch_norm(t["x"], None, None, *running, training=False, backend=backend)


@backends
@modes
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
def test_weight_and_bias_are_optional(
    has_weight: bool, has_bias: bool, training: bool, backend: str, device: str
) -> None:
    t = _tensors((4, 3, 5), device)
    x = t["x"].requires_grad_()
    weight = t["weight"] if has_weight else None
    bias = t["bias"] if has_bias else None
    running = (None, None) if training else (t["running_mean"], t["running_var"])
    y = batch_norm(x, weight, bias, *running, training=training, backend=backend)
    expected = F.batch_norm(x, *running, weight, bias, training)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(v, x, dy) for v in (y, expected)))


@needs_triton
@modes
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
def test_only_the_gradients_asked_for(wanted: tuple[str, ...], training: bool, device: str) -> None:
    t = _tensors((4, 3, 5), device)
    inputs = [t[k].requires_grad_() for k in wanted]
    running = t["running_mean"].clone(), t["running_var"].clone()
    y = batch_norm(t["x"], t["weight"], t["bias"], *running, training=training, backend="triton")
    expected = F.batch_norm(
        t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], training
    )
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(v, inputs, dy) for v in (y, expected)))


@needs_triton
def test_saved_for_backward(device: str) -> None:
    t = _tensors((4, 3, 5), device)

    def saved(training: bool, *wanted: str) -> list[tuple[torch.Size, torch.dtype]]:
        c = {k: v.clone().requires_grad_(k in wanted) for k, v in t.items()}
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v: (packed.append(v), v)[1], lambda v: v
        ):
            batch_norm(**c, training=training, backend="triton")
        return [(v.shape, v.dtype) for v in packed]

    # Mean and rstd in one tensor, and the weight.
    per_channel = [(torch.Size([8]), torch.float32), (torch.Size([3]), torch.float32)]
    assert saved(True, "x", "weight", "bias") == [(t["x"].shape, torch.float32), *per_channel]
    assert saved(False, "x") == per_channel


@needs_triton
def test_parameters_and_statistics_keep_their_own_dtype(device: str) -> None:
    t = {k: v.to(torch.bfloat16) for k, v in _tensors((4, 3, 5), device).items()}
    result = _run(batch_norm, t, torch.randn_like(t["x"]), training=True, backend="triton")
    assert {v.dtype for v in result.values()} == {torch.bfloat16}
    mixed = t | {"x": t["x"].float(), "running_var": t["running_var"].float()}
    result = _run(batch_norm, mixed, torch.randn_like(mixed["x"]), training=True, backend="triton")
    assert result["y"].dtype == result["dx"].dtype == result["running_var"].dtype == torch.float32
    assert result["dweight"].dtype == result["running_mean"].dtype == torch.bfloat16


@needs_triton
def test_strided_parameters_and_statistics(device: str) -> None:
    t = _tensors((6, 3), device)
    names = ("weight", "bias", "running_mean", "running_var")
    strided = {k: torch.stack([t[k], -t[k]], dim=1)[:, 0] for k in names}
    y = batch_norm(t["x"], **strided, training=True, backend="triton")
    expected = batch_norm(**t, training=True, backend="triton")
    assert torch.equal(y, expected)
    assert torch.equal(strided["running_mean"], t["running_mean"])
    assert torch.equal(strided["running_var"], t["running_var"])


@modes
@backends
def test_two_runs_give_the_same_bits(backend: str, training: bool, device: str) -> None:
    t = _tensors((5, 3, 9), device)
    dy = torch.randn_like(t["x"])
    first, second = (_run(batch_norm, t, dy, training=training, backend=backend) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@modes
def test_gradcheck_in_fp64(training: bool, device: str) -> None:
    t = {k: v.double() for k, v in _tensors((4, 2, 3), device).items()}
    inputs = tuple(t[k].requires_grad_() for k in ("x", "weight", "bias"))

    def function(*tensors: Tensor) -> Tensor:
        running = t["running_mean"].clone(), t["running_var"].clone()
        return batch_norm(*tensors, *running, training=training)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@modes
@backends
def test_double_backward(backend: str, training: bool, device: str) -> None:
    t = _tensors((5, 3, 4), device)
    g = torch.Generator().manual_seed(7)
    dy = torch.randn(t["x"].shape, generator=g).to(device)

    def second(function: Callable[..., Tensor], dtype: torch.dtype, **kwargs: Any) -> list[Tensor]:
        c = {k: v.detach().to(dtype, copy=True) for k, v in t.items()}
        inputs = [c[k].requires_grad_() for k in ("x", "weight", "bias")]
        upstream = dy.to(dtype, copy=True).requires_grad_()
        y = function(*inputs, c["running_mean"], c["running_var"], training=training, **kwargs)
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        penalty = sum((v * v * v).sum() for v in first)
        return list(torch.autograd.grad(penalty, (*inputs[:2], upstream)))

    ours = second(batch_norm, torch.float32, backend=backend)
    true = second(reference.batch_norm, torch.float64)
    for a, b in zip(ours, true, strict=True):
        # Cubes of first gradients in fp32: a few times 2^-24 of the largest.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6 * b.abs().max().item())


@needs_triton
def test_evaluation_backward_after_a_training_step(device: str) -> None:
    # ATen reads the running statistics again in its backward and gives, without an error, the
    # gradient of the new ones: hence no native case.
    t = _tensors((4, 3, 5), device)
    x = t["x"].requires_grad_()
    running = t["running_mean"], t["running_var"]
    expected = t["weight"] * torch.rsqrt(t["running_var"] + EPS)
    y = batch_norm(x, t["weight"], None, *running, training=False, backend="triton")
    batch_norm(x.detach(), None, None, *running, training=True, backend="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, expected[:, None].expand_as(dx))


@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("activation", "training"),
    [("identity", True), ("relu", True), ("silu", False), ("tanh", False)],
)
def test_opcheck(activation: str, training: bool, device: str) -> None:
    t = _tensors((4, 3, 8), device)
    x, weight, bias = (t[k].requires_grad_() for k in ("x", "weight", "bias"))
    residual = torch.randn_like(x, requires_grad=True)
    state = t["running_mean"], t["running_var"], torch.tensor(3, device=device)
    options = (training, 0.1, EPS, activation, 0.01)
    check = torch.library.opcheck
    op = torch.ops.bn_lightning
    check(op.batch_norm.default, (x, residual, weight, bias, *state, *options))
    if training:
        check(op.batch_norm.default, (x, None, None, None, None, None, None, *options))
    plain = [v.detach() for v in (x, residual, weight, bias)]
    check(op.batch_norm_forward.default, (*plain, *state, *options, activation == "relu"))
    mean, rstd = torch.randn(3, device=device), torch.rand(3, device=device) + 0.5
    y = torch.randn_like(plain[0])
    mask = torch.zeros(mask_shape(y.shape, False), dtype=torch.uint8, device=device)
    saved = (
        plain[1] if activation == "silu" else None,
        y if activation == "tanh" else None,
        mask if activation == "relu" else None,
    )
    rest = (False, training, EPS, activation, 0.01)
    backward = op.batch_norm_backward.default
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        check(backward, (y, plain[0], *saved, mean, rstd, *plain[2:], *rest, *needed))


@modes
@backends
def test_compiles_without_a_graph_break(backend: str, training: bool, device: str) -> None:
    t = _tensors((4, 3, 5), device)
    dy = torch.randn_like(t["x"])
    torch.compiler.reset()
    compiled = torch.compile(batch_norm, fullgraph=True, backend="aot_eager")
    eager, ours = (
        _run(f, t, dy, training=training, backend=backend) for f in (batch_norm, compiled)
    )
    if device == "cuda" and backend == "native":
        # cuDNN computes eager ones, ATen's kernels compiled ones.
        torch.testing.assert_close(ours, eager)
        return
    assert all(torch.equal(eager[k], ours[k]) for k in eager)


def test_auto_is_native_on_the_cpu_and_for_fp64(device: str, monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("expected no Triton op")

    monkeypatch.setattr(ops, "check_like_aten", refuse)
    batch_norm(torch.randn(4, 3), training=True)
    batch_norm(torch.randn(4, 3, device=device).double(), training=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@needs_triton
def test_auto_is_triton_on_a_gpu() -> None:
    t = _tensors((4, 3, 5), "cuda")
    assert torch.equal(
        batch_norm(**t, training=False), batch_norm(**t, training=False, backend="triton")
    )


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[str], Tensor]:
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


# Name -> shape of x, the arguments changed, the error, the words it starts with, words it holds.
ERRORS: dict[str, tuple[tuple[int, ...], dict[str, Any], type[Exception], str, str]] = {
    "1d": ((3,), {}, ValueError, "expected `x` to be (N, C)", "(3,)"),
    "weight": (
        (4, 3),
        {"weight": _x(4)},
        RuntimeError,
        "weight should contain 3 elements not 4",
        "second dimension",
    ),
    "bias": ((4, 3), {"bias": _x(4)}, RuntimeError, "bias should contain 3 elements not 4", ""),
    "running_mean": (
        (4, 3),
        {"running_mean": _x(2), "running_var": _x(3)},
        RuntimeError,
        "running_mean should contain 3 elements not 2",
        "",
    ),
    "one_statistic": (
        (4, 3),
        {"running_mean": _x(3)},
        ValueError,
        "running_mean and running_var must either both be None or neither be None",
        "",
    ),
    "evaluation": (
        (4, 3),
        {"training": False},
        RuntimeError,
        "running_mean must be defined in evaluation mode",
        "pass it",
    ),
    "evaluation_var": (
        (4, 3),
        {"training": False, "running_mean": _x(3)},
        RuntimeError,
        "running_var must be defined in evaluation mode",
        "",
    ),
    "eps": (
        (4, 3),
        {"eps": 0.0},
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0",
        "",
    ),
    "negative_eps": (
        (4, 3),
        {"eps": -1.0, "training": False, "running_mean": _x(3), "running_var": _x(3)},
        ValueError,
        "batch_norm eps must be non-negative, but got -1.0",
        "",
    ),
    "device": (
        (4, 3),
        {"weight": lambda device: torch.ones(3, device="meta")},
        RuntimeError,
        "Expected all tensors to be on the same device",
        "`weight` on meta",
    ),
}


@backends
@pytest.mark.parametrize(
    ("of_x", "of_residual"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.int64)],
    ids=["bf16+fp32", "fp32+fp16", "fp32+int64"],
)
def test_a_residual_of_another_dtype_is_promoted_as_in_eager_code(
    of_x: torch.dtype, of_residual: torch.dtype, backend: str, device: str
) -> None:
    """Autocast makes a bf16 `x` beside an fp32 residual."""
    t = _tensors((4, 3, 5), device, of_x)
    residual = (torch.randn(4, 3, 5) * 3).to(device, of_residual)

    def eager(*arguments: Tensor, **options: Any) -> Tensor:
        return F.relu(batch_norm(*arguments, **options) + residual)

    dy = torch.randn(4, 3, 5, device=device).to(torch.result_type(t["x"], residual))
    options = {"training": True, "backend": backend}
    ours = _run(batch_norm, t, dy, residual=residual, activation="relu", **options)
    assert ours["y"].dtype == dy.dtype
    torch.testing.assert_close(ours, _run(eager, t, dy, **options), rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "changed", "error", "start", "part"), ERRORS.values(), ids=ERRORS.keys()
)
def test_wrong_arguments_raise(
    shape: tuple[int, ...],
    changed: dict[str, Any],
    error: type[Exception],
    start: str,
    part: str,
    device: str,
) -> None:
    arguments = {k: v(device) if callable(v) else v for k, v in changed.items()}
    arguments = {"training": True, "backend": "triton"} | arguments
    with pytest.raises(error) as raised:
        batch_norm(torch.ones(shape, device=device), **arguments)
    assert str(raised.value).startswith(start)
    assert part in str(raised.value)


@needs_triton
def test_running_statistics_that_require_grad_raise(device: str) -> None:
    t = _tensors((4, 3), device)
    t["running_var"].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to .*'running_var'"):
        batch_norm(**t, training=True, backend="triton")


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match="`backend` to be one of .*got 'cudnn'"):
        batch_norm(torch.ones(4, 3), training=True, backend="cudnn")


@needs_triton
def test_fp64_without_kernels_raises(device: str) -> None:
    x = torch.ones(4, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"fp32, fp16 or bf16 .* got torch\.float64; use"):
        batch_norm(x, training=True, backend="triton")


@backends
def test_integers_raise_torchs_type(backend: str, device: str) -> None:
    x = torch.ones(4, 3, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError) as torchs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(type(torchs.value), match=r"`x` to be a tensor of floats, got torch.int64"):
        batch_norm(x, training=True, backend=backend)


def test_the_docstring_names_the_activations() -> None:
    listed = re.search(r"^ +activation: (.*?)^ +negative_slope: ", batch_norm.__doc__, re.M | re.S)
    assert listed and re.findall(r'"(\w+)"', listed[1]) == list(ACTIVATIONS)


@needs_triton
def test_the_op_alone_raises_without_running_statistics_in_evaluation(device: str) -> None:
    arguments = (torch.ones(4, 3, device=device), *[None] * 6, False, 0.1, 1e-5, "identity", 0.01)
    with pytest.raises(RuntimeError, match=r"evaluation, got None .*; pass both, or training=True"):
        torch.ops.bn_lightning.batch_norm(*arguments)


def _python(code: str) -> str:
    """Run `code` in a new process without TRITON_INTERPRET and return what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@needs_triton
def test_triton_on_cpu_tensors_without_the_interpreter_raises() -> None:
    message = _python(
        "import torch\n"
        "from bn_lightning.kernels import batch_norm\n"
        "mean, var = torch.zeros(3), torch.ones(3)\n"
        "x = torch.ones(4, 3)\n"
        "try: batch_norm(x, None, None, mean, var, training=True, backend='triton')\n"
        "except ValueError as error: print(error, mean.sum().item())\n"
    )
    assert "`x`" in message and "got cpu" in message
    assert "TRITON_INTERPRET=1" in message and 'backend="auto"' in message
    assert message.endswith(" 0.0\n")


def test_native_runs_without_triton_installed() -> None:
    printed = _python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from bn_lightning.kernels import batch_norm\n"
        "print(batch_norm(torch.randn(4, 3), training=True).shape)\n"
        "print('bn_lightning.kernels.stats' in sys.modules)\n"
    )
    assert printed == "torch.Size([4, 3])\nFalse\n"
