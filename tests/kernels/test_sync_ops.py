"""The stages of a BatchNorm in one process: parts of a batch take the place of the ranks."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bn_lightning.kernels import dispatch, planned_stage, reference
from bn_lightning.kernels.activations import ACTIVATIONS, Saves, activate
from bn_lightning.kernels.arguments import Backward, BackwardNeeds, Forward
from bn_lightning.kernels.launch_plan import LaunchPlan
from bn_lightning.kernels.layout import is_channels_last
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.kernels.sync_ops import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_gather_stats_with_counts,
    batch_norm_stats,
)

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
paths = pytest.mark.parametrize(
    "triton", [False, pytest.param(True, marks=needs_triton)], ids=["native", "triton"]
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)

# Relative to the largest value: one rounding at the end and a few in the arithmetic.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5
SLOPE = 0.1
C = 3


def _tensors(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    shape = (7, C, 2, 3)
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
    packed = [batch_norm_stats(part, triton) for part in (x[:4], x[4:5], x[5:])]
    assert {p.dtype for p in packed} == {torch.float32} and packed[0].shape == (2 * C + 2,)
    packed.insert(1, batch_norm_stats(x[:0], triton=False))
    mean, m2, count = batch_norm_gather_stats_with_counts(torch.stack(packed))
    var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert count == 42 and count.dtype == torch.float64
    torch.testing.assert_close(mean, true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2 / count, var, rtol=1e-6, atol=0)


@paths
@pytest.mark.parametrize(("mean", "scale"), [(1e3, 1.0), (0.0, 1e-18), (0.0, 1e15)])
def test_statistics_far_from_one(triton, mean, scale, device):
    g = torch.Generator().manual_seed(4)
    x = (torch.randn((40, C, 11), generator=g) * scale + mean).to(device)
    packed = torch.stack([batch_norm_stats(part, triton) for part in (x[:13], x[13:])])
    found = batch_norm_gather_stats_with_counts(packed)
    var, true_mean = torch.var_mean(x.double(), (0, 2), correction=0)
    # fp32 rounds a mean of 1e3 by 6e-5, and the means of the parts differ by 0.1.
    torch.testing.assert_close(
        found.m2 / found.total_count, var, rtol=1e-5 if mean == 0 else 1e-4, atol=0
    )
    torch.testing.assert_close(found.mean, true_mean, rtol=1e-6, atol=1e-6 * scale)


@needs_triton
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_statistics_whose_m2_overflows_fp32(device):
    x = torch.tensor([[-1e30], [1e30], [3e30], [5e30]], device=device)
    found = batch_norm_gather_stats_with_counts(batch_norm_stats(x, triton=True)[None])
    expected = torch.tensor([2e61], dtype=torch.float64, device=device)
    torch.testing.assert_close(found.m2, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [(1 << 24) - 1, (1 << 24) + 1, (1 << 24) + 3])
def test_counts_above_the_exact_integers_of_fp32(count):
    x = torch.ones(1, 1).expand(count, 1)
    parts = torch.stack([batch_norm_stats(x, triton=False)] * 2)
    assert parts.dtype == torch.float32
    assert batch_norm_gather_stats_with_counts(parts).total_count == 2 * count


def test_parts_without_values():
    empty = batch_norm_stats(torch.ones(0, C), triton=False)
    found = batch_norm_gather_stats_with_counts(torch.stack([empty, empty]))
    assert found.total_count == 0 and found.m2.eq(0).all() and found.mean.eq(0).all()


def _run(
    t: dict[str, Tensor], activation: str, add: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all stages of a BatchNorm, forward and backward, as sync_autograd.py does."""
    x, residual = t["x"], t["residual"] if add else None
    part = batch_norm_stats(x, triton)
    mean, m2, count = batch_norm_gather_stats_with_counts(part[None])
    mean, rstd = mean.to(part.dtype), torch.rsqrt(m2 / count + EPS).to(part.dtype)
    saves = ACTIVATIONS[activation].saves
    writes_mask = add and saves is Saves.MASK
    forward = Forward(
        x,
        residual,
        t["weight"],
        t["bias"],
        activation,
        negative_slope=SLOPE,
        writes_mask=writes_mask,
    )
    y, mask = batch_norm_elemt(forward, mean, rstd, triton)
    backward = Backward(
        dy=t["dy"],
        x=x,
        residual=residual if saves is Saves.RESIDUAL else None,
        y=y if add and saves is Saves.OUTPUT else None,
        mask=mask if writes_mask else None,
        mean=mean,
        rstd=rstd,
        weight=t["weight"],
        bias=t["bias"],
        channels_last=is_channels_last(x),
        activation=activation,
        negative_slope=SLOPE,
    )
    sums = batch_norm_backward_reduce(backward, triton)
    needs = BackwardNeeds(training=True, dx=True, affine=True, dresidual=True)
    dx, dresidual = batch_norm_backward_elemt(backward, needs, sums / count.to(sums.dtype), triton)
    dbias, dweight = sums
    return y, dx, dresidual, dweight, dbias


def _true(t: dict[str, Tensor], activation: str, add: bool) -> list[Tensor]:
    """Return the same results from the reference in fp64, with gradients from autograd."""
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
        schedule = dispatch.schedule_of(t["x"], channels_last=False)
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
def test_both_paths_write_the_same_mask(activation, layout, device):
    t = _tensors(device, torch.float32)
    t |= {k: t[k].to(memory_format=layout) for k in ("x", "residual")}
    zeros, ones = torch.zeros(C, device=device), torch.ones(C, device=device)
    call = Forward(t["x"], t["residual"], None, None, activation, SLOPE, writes_mask=True)
    native, triton = (batch_norm_elemt(call, zeros, ones, path)[1] for path in (False, True))
    assert torch.equal(native, triton)
    z = t["x"] + t["residual"]
    expected = (z > 0) & (z < 6) if activation == "relu6" else z > 0
    channels_last = layout == torch.channels_last
    assert torch.equal(reference.unpack_mask(native, z.shape, channels_last), expected)


@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(device):
    t = _tensors(device, torch.float32)
    mean, rstd = t["x"].mean((0, 2, 3)), torch.ones(C, device=device)
    library = torch.ops.bn_lightning
    opcheck(library.batch_norm_stats, (t["x"],))
    affine = (t["weight"], t["bias"])
    forward = Forward(t["x"], t["residual"], *affine, "relu", SLOPE, writes_mask=True)
    opcheck(library.batch_norm_elemt, (mean, rstd, *forward))
    _, mask = library.batch_norm_elemt(mean, rstd, *forward)
    backward = (t["dy"], t["x"], None, None, mask, mean, rstd, *affine, False, "relu", SLOPE)
    opcheck(library.batch_norm_backward_reduce, backward)
    means = torch.rand(2, C, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(library.batch_norm_backward_elemt, (means, *needs, *backward))


@needs_triton
@layouts
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "tanh"])
def test_stages_that_repeat_launches_have_the_same_bits(activation, layout, device, monkeypatch):
    t = _tensors(device, torch.float32)
    other = {k: v.flip(0) for k, v in t.items()}
    t, other = (
        d | {k: d[k].to(memory_format=layout) for k in ("x", "residual", "dy")} for d in (t, other)
    )
    planned_stage._stages.clear()
    expected = _run(other, activation, True, triton=True)
    planned_stage._stages.clear()
    _run(t, activation, True, triton=True)
    assert len(planned_stage._stages) == 4
    repeated = []
    launch = LaunchPlan.launch
    monkeypatch.setattr(
        LaunchPlan, "launch", lambda plan, values: repeated.append(plan) or launch(plan, values)
    )
    found = _run(other, activation, True, triton=True)
    assert len(repeated) == 4
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted) and value.stride() == wanted.stride()
