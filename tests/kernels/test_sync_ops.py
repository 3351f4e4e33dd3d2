"""The stages of a BatchNorm, put together without ranks: parts of a batch stand for them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bn_lightning.kernels import dispatch, reference
from bn_lightning.kernels import sync_ops as stages
from bn_lightning.kernels.activations import ACTIVATIONS, Saves, activate
from bn_lightning.kernels.arguments import Backward
from bn_lightning.kernels.schedule import Regime, forced_regime

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
paths = pytest.mark.parametrize(
    "triton", [False, pytest.param(True, marks=needs_triton)], ids=["native", "triton"]
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
activations = pytest.mark.parametrize("activation", ACTIVATIONS)

# Units in the last place of the largest value: one rounding at the end, a few of the arithmetic.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5
SLOPE = 0.1
C = 3


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    """Fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _tensors(device: str, dtype: torch.dtype, N: int = 7) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    shape = (N, C, 2, 3)
    tensors = {
        "x": torch.randn(shape, generator=g) * 2 + 3,
        "residual": torch.randn(shape, generator=g),
        "dy": torch.randn(shape, generator=g) + 0.5,
    }
    tensors = {k: v.to(device, dtype) for k, v in tensors.items()}
    tensors |= {k: torch.randn(C, generator=g).to(device) for k in ("weight", "bias")}
    return tensors


def _assert_close(found: Tensor, expected: Tensor) -> None:
    atol = TOLERANCE[found.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@paths
@dtypes
def test_statistics_of_parts_are_those_of_the_whole(triton, dtype, device):
    x = _tensors(device, dtype)["x"]
    packed = [stages.local_statistics(part, triton) for part in (x[:4], x[4:5], x[5:])]
    assert {p.dtype for p in packed} == {torch.float32} and packed[0].shape == (2 * C + 2,)
    packed.insert(1, stages.local_statistics(x[:0], triton=False))
    mean, m2, total = stages.combine_statistics(torch.stack(packed))
    var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert total == 42 and total.dtype == torch.float64
    torch.testing.assert_close(mean, true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2 / total, var, rtol=1e-6, atol=0)


@paths
@pytest.mark.parametrize(("mean", "scale"), [(1e3, 1.0), (0.0, 1e-18), (0.0, 1e15)])
def test_statistics_far_from_one(triton, mean, scale, device):
    g = torch.Generator().manual_seed(4)
    x = (torch.randn((40, C, 11), generator=g) * scale + mean).to(device)
    packed = torch.stack([stages.local_statistics(part, triton) for part in (x[:13], x[13:])])
    found = stages.combine_statistics(packed)
    var, true_mean = torch.var_mean(x.double(), (0, 2), correction=0)
    # A mean of 1e3 is an fp32 number to 6e-5, and the parts' means differ by 0.1.
    torch.testing.assert_close(
        found.m2 / found.total, var, rtol=1e-5 if mean == 0 else 1e-4, atol=0
    )
    torch.testing.assert_close(found.mean, true_mean, rtol=1e-6, atol=1e-6 * scale)


@needs_triton
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_statistics_whose_m2_is_no_fp32_number(device):
    x = torch.tensor([[-1e30], [1e30], [3e30], [5e30]], device=device)
    found = stages.combine_statistics(stages.local_statistics(x, triton=True)[None])
    expected = torch.tensor([2e61], dtype=torch.float64, device=device)
    torch.testing.assert_close(found.m2, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [(1 << 24) - 1, (1 << 24) + 1, (1 << 24) + 3])
def test_counts_are_exact_past_the_integers_of_fp32(count):
    x = torch.ones(1, 1).expand(count, 1)
    parts = torch.stack([stages.local_statistics(x, triton=False)] * 2)
    assert parts.dtype == torch.float32
    assert stages.combine_statistics(parts).total == 2 * count


def test_parts_without_values():
    empty = stages.local_statistics(torch.ones(0, C), triton=False)
    found = stages.combine_statistics(torch.stack([empty, empty]))
    assert found.total == 0 and found.m2.eq(0).all() and found.mean.eq(0).all()


def _run(
    t: dict[str, Tensor], activation: str, add: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Puts the stages together to one BatchNorm, forward and backward, as sync.py does."""
    x, residual = stages.as_dense(t["x"]), t["residual"] if add else None
    part = stages.local_statistics(x, triton)
    mean, m2, total = stages.combine_statistics(part[None])
    mean, rstd = mean.to(part.dtype), torch.rsqrt(m2 / total + EPS).to(part.dtype)
    saves = ACTIVATIONS[activation].saves
    writes_mask = add and saves is Saves.MASK
    affine = (t["weight"], t["bias"])
    y, mask = stages.normalize(
        x, residual, mean, rstd, *affine, activation, SLOPE, writes_mask, triton
    )
    call = Backward(
        t["dy"],
        x,
        residual if saves is Saves.RESIDUAL else None,
        y if add and saves is Saves.OUTPUT else None,
        mask if writes_mask else None,
        mean,
        rstd,
        *affine,
        dispatch.is_channels_last(x),
        activation,
        SLOPE,
    )
    sums = stages.local_sums(call, triton)
    means = sums / total.to(sums.dtype)
    dx, dresidual = stages.input_gradients(call, means, True, True, triton)
    return y, dx, dresidual, sums[1], sums[0]


def _true(t: dict[str, Tensor], activation: str, add: bool) -> list[Tensor]:
    """The same by the reference in fp64 and autograd."""
    t = {k: v.double().detach().requires_grad_() for k, v in t.items()}
    y = reference.batch_norm(t["x"], t["weight"], t["bias"], training=True, eps=EPS)
    z = y + (t["residual"] if add else 0 * t["residual"])
    y = activate(z, activation, SLOPE)
    names = ("x", "weight", "bias")
    dx, dweight, dbias, dz = torch.autograd.grad(y, [*(t[k] for k in names), z], t["dy"])
    return [v.detach() for v in (y, dx, dz, dweight, dbias)]


@paths
@layouts
@activations
@pytest.mark.parametrize("add", [False, True], ids=["alone", "add"])
def test_the_stages_are_a_batch_norm(add, activation, layout, triton, device):
    t = _tensors(device, torch.float32 if triton else torch.float64)
    t |= {k: t[k].to(memory_format=layout) for k in ("x", "residual", "dy")}
    if not triton:
        t = {k: v.double() for k, v in t.items()}
    found = _run(t, activation, add, triton)
    for value, expected in zip(found, _true(t, activation, add), strict=True):
        _assert_close(value, expected)
    assert all(v.is_contiguous(memory_format=layout) for v in found[:3])


@needs_triton
@pytest.mark.parametrize("regime", Regime, ids=lambda regime: regime.value)
def test_several_splits_of_a_channel(regime, device):
    t = _tensors(device, torch.float32)
    t |= {k: t[k].repeat(29, 1, 4, 4) for k in ("x", "residual", "dy")}
    with forced_regime(regime):
        schedule = dispatch.schedule_of(t["x"], False, False, False)
        found = _run(t, "relu", True, triton=True)
    assert (schedule.splits > 1) == (regime is not Regime.SINGLE_LAUNCH)
    for value, expected in zip(found, _true(t, "relu", True), strict=True):
        _assert_close(value, expected)


@paths
@dtypes
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_sixteen_bits_are_rounded_once(activation, dtype, triton, device):
    t = _tensors(device, dtype)
    found = _run(t, activation, True, triton)
    assert [v.dtype for v in found] == [dtype] * 3 + [torch.float32] * 2
    for value, expected in zip(found, _true(t, activation, True), strict=True):
        atol = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=atol)


@needs_triton
@layouts
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("N", [4, 7], ids=["whole_bytes", "one_begun"])
def test_both_paths_write_the_same_bits(N, activation, layout, device):
    t = _tensors(device, torch.float32, N)
    t |= {k: t[k].to(memory_format=layout) for k in ("x", "residual")}
    zeros, ones = torch.zeros(C, device=device), torch.ones(C, device=device)
    arguments = (t["x"], t["residual"], zeros, ones, None, None, activation, SLOPE, True)
    native, triton = (stages.normalize(*arguments, way)[1] for way in (False, True))
    assert native.shape == ((t["x"].numel() + 7) // 8,)
    z = t["x"] + t["residual"]
    expected = (z > 0) & (z < 6) if activation == "relu6" else z > 0
    channels_last = layout == torch.channels_last
    for mask in (native, triton):
        assert torch.equal(reference.unpack_mask(mask, z.shape, channels_last), expected)


@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(device):
    t = _tensors(device, torch.float32)
    mean, rstd = t["x"].mean((0, 2, 3)), torch.ones(C, device=device)
    affine = (t["weight"], t["bias"])
    library = torch.ops.bn_lightning
    opcheck(library.local_statistics, (t["x"],))
    forward: tuple[Any, ...] = (t["x"], t["residual"], mean, rstd, *affine, "relu", SLOPE, True)
    opcheck(library.normalize, forward)
    _, mask = library.normalize(*forward)
    back = (t["dy"], t["x"], None, None, mask, mean, rstd, *affine, False, "relu", SLOPE)
    opcheck(library.local_sums, back)
    means = torch.rand(2, C, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(library.input_gradients, (*back, means, *needs))
