"""Every regime, forced, in both layouts: ours, torch at the same dtype, the reference in fp64.

The bar: our error is at most torch's own, or two units in the last place of the result's scale,
which for y is its largest value, for dx and the sums that of the terms it is the difference of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from bn_lightning.kernels import batch_norm, eager, reference, schedule, walk
from bn_lightning.kernels.activations import ACTIVATIONS, activate
from bn_lightning.kernels.arguments import Forward, RunningStatistics
from bn_lightning.kernels.launch import run_forward
from bn_lightning.kernels.schedule import Regime, forced_regime

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

EPS = 1e-5
regimes = pytest.mark.parametrize("regime", Regime, ids=lambda r: r.value)

# Name -> shape, channels-last, dtype. Tiles are cut to 64 or 128 elements: most have several.
CASES: dict[str, tuple[tuple[int, ...], bool, torch.dtype]] = {
    "rows": ((19, 10), False, torch.float32),
    "rows_fp16": ((9, 16), False, torch.float16),
    "m_is_2": ((2, 8), False, torch.float32),
    "17_channels": ((3, 17, 2), False, torch.float32),
    "sequence": ((3, 3, 40), False, torch.bfloat16),
    "odd_sequence": ((5, 3, 13), False, torch.float32),
    "images_channels_last": ((3, 8, 3, 3), True, torch.float32),
    "odd_channels_last": ((3, 5, 4, 3), True, torch.bfloat16),
    "volumes_channels_last": ((2, 16, 2, 1, 2), True, torch.float16),
}
cases = pytest.mark.parametrize(
    ("shape", "channels_last", "dtype"), CASES.values(), ids=CASES.keys()
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut tiles to 64 to 256 elements, and forget all plans."""
    sizes = {
        "REDUCTION_BYTES": 256,
        "ELEMENTWISE_BYTES": 256,
        "MOST_COLUMNS": 64,
        "ROW_BYTES": 32,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(schedule, name, value)
    schedule._make_schedule.cache_clear()
    eager._plans.clear()
    yield
    schedule._make_schedule.cache_clear()
    eager._plans.clear()


def _tensors(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(11)
    C = shape[1]
    x, residual, dy = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(3))
    x = x * 2 + 3
    if channels_last:
        x, residual, dy = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, residual, dy))
    return {
        "x": x,
        "residual": residual,
        "dy": dy + 0.5,
        "weight": torch.randn(C, generator=g).to(device),
        "bias": torch.randn(C, generator=g).to(device),
        "running_mean": torch.randn(C, generator=g).to(device),
        "running_var": (torch.rand(C, generator=g) + 0.5).to(device),
    }


def _composite(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `batch_norm` computes, from a plain BatchNorm."""

    def fused(
        x: Tensor, *tensors: Tensor, residual: Tensor | None, activation: str, **kwargs: Any
    ) -> Tensor:
        z = function(x, *tensors, **kwargs)
        return activate(z if residual is None else z + residual, activation, 0.01)

    return fused


def _torch(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **kw: Any) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, **kw)


def _run(
    function: Callable[..., Tensor], t: dict[str, Tensor], has_residual: bool, **kwargs: Any
) -> dict[str, Tensor]:
    c = {k: v.detach().clone() for k, v in t.items()}
    names = ["x", "weight", "bias", *(["residual"] if has_residual else [])]
    inputs = [c[k].requires_grad_() for k in names]
    residual = c["residual"] if has_residual else None
    state = c["running_mean"], c["running_var"]
    y = function(*inputs[:3], *state, residual=residual, eps=EPS, **kwargs)
    gradients = torch.autograd.grad(y, inputs, c["dy"])
    return {
        "y": y.detach(),
        **{f"d{k}": v for k, v in zip(names, gradients, strict=True)},
        "running_mean": state[0],
        "running_var": state[1],
    }


def _assert_three_way(t: dict[str, Tensor], has_residual: bool, **kwargs: Any) -> None:
    ours = _run(batch_norm, t, has_residual, backend="triton", **kwargs)
    torchs = _run(_composite(_torch), t, has_residual, **kwargs)
    t64 = {k: v.double() for k, v in t.items()}
    true = _run(_composite(reference.batch_norm), t64, has_residual, **kwargs)
    state = () if kwargs["training"] else (t64["running_mean"], t64["running_var"])
    x_hat = reference.batch_norm(t64["x"], None, None, *state, training=kwargs["training"])
    dims = [d for d in range(x_hat.dim()) if d != 1]
    rstd = torch.rsqrt(
        t64["x"].var(dims, correction=0) if kwargs["training"] else t64["running_var"]
    )
    channels = (1, -1, *(1 for _ in dims[1:]))
    scales = {
        "dx": t64["dy"] * (t64["weight"] * rstd).reshape(channels),
        "dweight": (t64["dy"] * x_hat).abs().sum(dims),
        "dbias": t64["dy"].abs().sum(dims),
    }
    for name, expected in true.items():
        assert ours[name].dtype == torchs[name].dtype, name
        scale = scales.get(name, expected).abs().max()
        error, torch_error = ((v[name].double() - expected).abs().max() for v in (ours, torchs))
        # Sums of a 16-bit dy have its errors in them, whatever their own dtype.
        dtype = t["x"].dtype if name in ("dweight", "dbias") else ours[name].dtype
        assert error <= max(torch_error, 2 * torch.finfo(dtype).eps * scale), name
    for name in ("y", "dx"):
        assert ours[name].stride() == t["x"].stride(), name


@regimes
@cases
def test_plain(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, regime: Regime, device: str
) -> None:
    t = _tensors(shape, channels_last, dtype, device)
    with forced_regime(regime):
        _assert_three_way(t, False, training=True, activation="identity")
        _assert_three_way(t, False, training=False, activation="relu")


@regimes
@cases
def test_add_relu(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, regime: Regime, device: str
) -> None:
    t = _tensors(shape, channels_last, dtype, device)
    with forced_regime(regime):
        _assert_three_way(t, True, training=True, activation="relu")


@regimes
@pytest.mark.parametrize("name", ["rows", "odd_channels_last"])
def test_the_mask_has_one_layout_in_every_regime(name: str, regime: Regime, device: str) -> None:
    shape, channels_last, dtype = CASES[name]
    t = _tensors(shape, channels_last, dtype, device)
    call = Forward(t["x"], t["residual"], None, None, "relu", 0.0, writes_mask=True)
    with forced_regime(regime):
        y, mask, *_ = run_forward(
            call, RunningStatistics(None, None, None, 0.1), EPS, training=True
        )
    assert mask is not None and torch.equal(mask, reference.pack_mask(y > 0, channels_last))


@pytest.mark.slow
@regimes
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, has_residual: bool, regime: Regime, device: str) -> None:
    t = _tensors((3, 8, 3, 4), activation in ("relu6", "gelu", "elu"), torch.float32, device)
    with forced_regime(regime):
        _assert_three_way(t, has_residual, training=True, activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_evaluation(activation: str, has_residual: bool, device: str) -> None:
    t = _tensors((3, 8, 3, 4), activation in ("relu", "mish", "tanh"), torch.float32, device)
    _assert_three_way(t, has_residual, training=False, activation=activation)


@pytest.mark.slow
@regimes
def test_repeats_give_the_same_bits(regime: Regime, device: str) -> None:
    t = _tensors((6, 2, 4, 4), False, torch.float32, device)
    with forced_regime(regime):
        runs = [
            _run(batch_norm, t, True, training=True, activation="silu", backend="triton")
            for _ in range(20)
        ]
    assert all(torch.equal(run[k], runs[0][k]) for run in runs for k in run)


@regimes
def test_offsets_of_64_bits(regime: Regime, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(walk, "MOST_ELEMENTS", 1 << 32)
    t = _tensors((3, 8, 5, 3), True, torch.float32, device)
    with forced_regime(regime):
        _assert_three_way(t, True, training=True, activation="relu")


@regimes
@pytest.mark.parametrize("momentum", [0.25, None], ids=["moving", "cumulative"])
def test_the_kernels_count_batches(momentum: float | None, regime: Regime, device: str) -> None:
    t = _tensors((3, 3, 24), False, torch.float32, device)
    running = t["running_mean"], t["running_var"]
    expected = [v.clone() for v in running]
    tracked = torch.tensor(0, device=device)
    for step in range(3):
        x = t["x"] * (step + 1)
        weight = 1 / (step + 1) if momentum is None else momentum
        F.batch_norm(x, *expected, training=True, momentum=weight)
        with forced_regime(regime):
            batch_norm(
                x,
                None,
                None,
                *running,
                training=True,
                momentum=momentum,
                num_batches_tracked=tracked,
                backend="triton",
            )
        assert tracked.item() == step + 1
        torch.testing.assert_close(running, tuple(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@regimes
@pytest.mark.parametrize("magnitude", [1e30, 1e-20], ids=["huge", "tiny"])
def test_extreme_values(magnitude: float, regime: Regime, device: str) -> None:
    # torch's own variance is infinite at 1e30, and its y is 0.
    t = _tensors((3, 3, 24), False, torch.float32, device)
    x = (t["x"] - 3) * magnitude
    with forced_regime(regime):
        y = batch_norm(x, training=True, eps=EPS, backend="triton")
    true = reference.batch_norm(x.double(), training=True, eps=EPS)
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-6 * true.abs().max().item())


@regimes
def test_a_mean_1e5_times_the_deviation(regime: Regime, device: str) -> None:
    t = _tensors((3, 3, 24), False, torch.float32, device)
    x = t["x"] / 2 + 1e5
    with forced_regime(regime):
        y = batch_norm(x, training=True, backend="triton")
    true = reference.batch_norm(x.double(), training=True)
    error, torch_error = (
        (v.double() - true).abs().max() for v in (y, F.batch_norm(x, None, None, training=True))
    )
    # One unit in the last place of the mean, 2^-7, is 0.008 deviations.
    assert error <= max(torch_error, 2**-7)


def test_evaluation_launches_no_more_than_it_needs(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    from bn_lightning.kernels import normalize

    launched: list[str] = []
    kernel_class = type(normalize._bn_forward_normalize_kernel)
    run = kernel_class.run

    def counting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        launched.append(kernel.__name__)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(kernel_class, "run", counting)
    t = _tensors((6, 2, 5, 4), False, torch.float32, device)
    x, running = t["x"].requires_grad_(), (t["running_mean"], t["running_var"])
    options: dict[str, Any] = {"training": False, "activation": "relu", "backend": "triton"}
    for regime, finishing in ((Regime.SINGLE_LAUNCH, 0), (Regime.TWO_PASS, 1)):
        for has_affine in (False, True):
            weight, bias = (t[name].requires_grad_(has_affine) for name in ("weight", "bias"))
            launched.clear()
            with forced_regime(regime):
                y = batch_norm(x, weight, bias, *running, **options)
                assert launched == ["_bn_forward_normalize_kernel"]
                launched.clear()
                y.backward(t["dy"])
            if has_affine:
                # dx does not depend on the sums, so one kernel writes it and adds up.
                finish = ["_bn_backward_finish_sums_kernel"] * finishing
                assert launched == ["_bn_backward_partial_sums_kernel", *finish]
            else:
                assert launched == ["_bn_backward_input_kernel"]
