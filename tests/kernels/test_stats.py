"""Mean, rstd and running statistics: ours, torch at the same dtype, the reference in fp64."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from bn_lightning.kernels import reference, stats
from bn_lightning.kernels.arguments import RunningStatistics
from bn_lightning.kernels.schedule import (
    INTERPRETER,
    Regime,
    Schedule,
    forced_regime,
    make_schedule,
)

# Relative to the largest value, whatever the dtype of x: the statistics are fp32. 16 units of
# 2^-24, for where torch's own error happens to be zero.
ABSOLUTE = 1e-6

EPS = 1e-5
SHAPES = {
    "rows": (7, 3),
    "m_is_2": (2, 3),
    "l_is_1": (5, 3, 1),
    "one_channel": (6, 1, 5),
    "65_channels": (3, 65, 2),
    "one_over_a_tile_of_rows": (129, 65),
    "one_over_a_tile_of_positions": (2, 3, 4097),
    "images": (3, 3, 5, 7),
}
pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def _input(shape: tuple[int, ...], device: str, mean: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=g) * 2 + mean).to(device)


def _schedule(shape: tuple[int, ...], itemsize: int = 4) -> Schedule:
    with forced_regime(Regime.TWO_PASS):
        return make_schedule(shape, itemsize, False, INTERPRETER)


def _statistics(
    x: Tensor,
    schedule: Schedule,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None = 1.0,
    tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    running = RunningStatistics(running_mean, running_var, tracked, momentum)
    partials = stats.compute_partials(x, schedule, tracked)
    return stats.finish_statistics(partials, running, EPS, schedule)


def _many_tiles(shape: tuple[int, ...], tiles_per_split: int, group: int = 0) -> Schedule:
    """Return a schedule with small tiles, of which a small tensor has many.

    They have two rows, and two channels, or four positions of one channel, or all of a group.
    """
    s = _schedule(shape)
    L = s.shape.L
    group = group or (2 if L == 1 else 1)
    block_p = 2 if L == 1 else 4 if group == 1 else 1 << (group * L - 1).bit_length()
    walk = dataclasses.replace(
        s.reduction, span=group * L, group=group, block_r=2, block_p=block_p, num_warps=1
    )
    return dataclasses.replace(s, reduction=walk.split(-(-walk.tiles // tiles_per_split)))


def _assert_three_way(x: Tensor, schedule: Schedule) -> None:
    """Compare mean, rstd and, with momentum 1, the running statistics, which are the batch's."""
    C, M = x.shape[1], x.numel() // x.shape[1]
    ours_mean, ours_var, torch_mean, torch_var = (torch.zeros(C, device=x.device) for _ in range(4))
    mean, rstd = _statistics(x, schedule, ours_mean, ours_var)
    F.batch_norm(x, torch_mean, torch_var, training=True, momentum=1.0, eps=EPS)
    torch_rstd = torch.rsqrt(torch_var * ((M - 1) / M) + EPS)
    true_mean, true_var = reference.batch_statistics(x.double())

    _assert_near(mean, torch_mean, true_mean)
    _assert_near(rstd, torch_rstd, torch.rsqrt(true_var + EPS))
    _assert_near(ours_mean, torch_mean, true_mean)
    _assert_near(ours_var, torch_var, true_var * (M / (M - 1)))


def _assert_near(ours: Tensor, torchs: Tensor, true: Tensor) -> None:
    scale = true.abs().max().clamp(min=1.0)
    error, torch_error = ((t.double() - true).abs().max() / scale for t in (ours, torchs))
    assert error <= 2 * torch_error + ABSOLUTE


@dtypes
@shapes
def test_statistics(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = _input(shape, device).to(dtype)
    _assert_three_way(x, _schedule(x.shape, x.element_size()))


@pytest.mark.parametrize("tiles_per_split", [1, 2, 100])
@pytest.mark.parametrize(
    ("shape", "group"), [((11, 5), 2), ((5, 3, 9), 1), ((5, 5, 9), 3)], ids=["mc", "ncl", "groups"]
)
def test_statistics_over_many_tiles_and_splits(
    shape: tuple[int, ...], group: int, tiles_per_split: int, device: str
) -> None:
    _assert_three_way(_input(shape, device), _many_tiles(shape, tiles_per_split, group))


@pytest.mark.parametrize(
    ("shape", "group"),
    [((64, 2), 2), ((16, 2, 8), 1), ((16, 2, 8), 2)],
    ids=["mc", "ncl", "groups"],
)
@pytest.mark.parametrize("jump", [1e4, 1e12])
def test_a_pilot_far_from_the_mean_is_replaced(
    shape: tuple[int, ...], group: int, jump: float, device: str
) -> None:
    # The first tile is far from all others: about its mean, squares are about 1e8 variances.
    x = _input(shape, device, mean=0.0)
    x[:2, 0] = jump
    x[2:, 1] += jump
    walk = _many_tiles(shape, 1000, group)
    _, rstd = _statistics(x, walk, None, None)
    _, var = reference.batch_statistics(x.double())
    # Squares that lose two bits, and their sum.
    torch.testing.assert_close(rstd.double(), torch.rsqrt(var + EPS), rtol=5e-7, atol=0)


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 9)], ids=["mc", "ncl"])
def test_variance_survives_a_large_mean(shape: tuple[int, ...], device: str) -> None:
    # E[x^2] - E[x]^2 in fp32 would be wrong by about 1e10 * 2^-24 = 600.
    x = _input(shape, device, mean=1e5)
    _, rstd = _statistics(x, _many_tiles(shape, 3), None, None)
    _, var = reference.batch_statistics(x.double())
    torch.testing.assert_close(rstd.double(), torch.rsqrt(var + EPS), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(11, 5), (5, 3, 9)], ids=["mc", "ncl"])
def test_partials_are_those_of_their_tiles(shape: tuple[int, ...], device: str) -> None:
    x = _input(shape, device)
    count, mean, root = stats.compute_partials(x, _many_tiles(shape, 1))
    M = x.numel() // x.shape[1]
    torch.testing.assert_close(count.sum(0), torch.full_like(count[0], M))
    # The first tile: two samples, and four positions where there are any.
    first = x[:2, :, :4].double() if x.dim() == 3 else x[:2].double()
    true_mean, true_var = reference.batch_statistics(first)
    torch.testing.assert_close(mean[0].double(), true_mean, rtol=1e-5, atol=1e-5)
    values = first.numel() // first.shape[1]
    m2 = root[0].double() ** 2
    torch.testing.assert_close(m2, true_var * values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_running_statistics_keep_their_dtype(dtype: torch.dtype, device: str) -> None:
    x = _input((6, 3, 5), device)
    running_mean = torch.full((3,), 0.5, dtype=dtype, device=device)
    running_var = torch.full((3,), 2.0, dtype=dtype, device=device)
    schedule = _schedule(x.shape, x.element_size())
    _statistics(x, schedule, running_mean, running_var, momentum=0.25)
    mean, var = reference.batch_statistics(x)
    torch.testing.assert_close(running_mean, (0.375 + 0.25 * mean).to(dtype))
    torch.testing.assert_close(running_var, (1.5 + 0.25 * var * 30 / 29).to(dtype))


@pytest.mark.parametrize("shape", [(11, 5), (5, 3, 9)], ids=["mc", "ncl"])
def test_two_runs_give_the_same_bits(shape: tuple[int, ...], device: str) -> None:
    x = _input(shape, device)
    first, second = (_statistics(x, _many_tiles(shape, 2), None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_cumulative_average_counts_batches(device: str) -> None:
    # Three programs of one channel each finish; only one may count the batch.
    schedule = _many_tiles((6, 5, 5), 2)
    running_mean, running_var = torch.zeros(5, device=device), torch.ones(5, device=device)
    tracked = torch.tensor(0, device=device)
    means = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 5, 5, generator=g).to(device)
        means.append(_statistics(x, schedule, running_mean, running_var, None, tracked)[0])
        assert tracked.item() == seed + 1
        torch.testing.assert_close(running_mean, torch.stack(means).mean(0))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("shape", [(64, 4), (8, 4, 9)], ids=["mc", "ncl"])
def test_huge_values_beside_small_ones(shape: tuple[int, ...], device: str) -> None:
    # M2 of the first channel is about 1e62, no fp32 number; those of the others must not suffer.
    x = _input(shape, device, mean=0.0)
    x[:, 0] *= 1e30
    x[:, 1] *= 1e-3
    _, rstd = _statistics(x, _many_tiles(shape, 2), None, None)
    _, var = reference.batch_statistics(x.double())
    torch.testing.assert_close(rstd.double(), torch.rsqrt(var + EPS), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_and_infinity_stay_in_their_channel(value: float, device: str) -> None:
    x = _input((8, 4, 9), device)
    expected = _statistics(x, _many_tiles(x.shape, 2), None, None)
    x[3, 1, 4] = value
    mean, rstd = _statistics(x, _many_tiles(x.shape, 2), None, None)
    assert rstd[1].isnan() and not mean[1].isfinite()
    others = [0, 2, 3]
    assert torch.equal(mean[others], expected[0][others])
    assert torch.equal(rstd[others], expected[1][others])


def test_a_constant_has_no_variance(device: str) -> None:
    x = torch.full((8, 4, 9), 3.7, device=device)
    mean, rstd = _statistics(x, _many_tiles(x.shape, 2), None, None)
    torch.testing.assert_close(mean, x[0, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))
