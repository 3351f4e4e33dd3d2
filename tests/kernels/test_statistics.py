"""Mean, rstd and running statistics: ours, torch at the same dtype, the reference in fp64."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from bn_lightning.kernels import reference, statistics
from bn_lightning.kernels.schedule import Layout, Schedule, Tile, make_schedule

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
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def nan_in_empty_tensors() -> Iterator[None]:
    """Fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _input(shape: tuple[int, ...], device: str, mean: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=g) * 2 + mean).to(device)


def _statistics(
    x: Tensor, schedule: Schedule, running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[Tensor, Tensor]:
    partials = statistics.partial_statistics(x, schedule)
    return statistics.finish_statistics(*partials, running_mean, running_var, 1.0, EPS, schedule)


def _many_tiles(shape: tuple[int, ...], tiles_per_split: int) -> Schedule:
    """Returns a schedule with tiles of 2 x 4, so that a small tensor has many."""
    s = make_schedule(shape, 4)
    tiles = -(-s.N // 2) * (-(-s.L // 4) if s.layout is Layout.NCL else 1)
    return dataclasses.replace(
        s,
        reduction=Tile(rows=2, columns=4, num_warps=1),
        splits=-(-tiles // tiles_per_split),
        tiles_per_split=tiles_per_split,
    )


def _assert_three_way(x: Tensor, schedule: Schedule) -> None:
    """Compares mean, rstd and, with momentum 1, the running statistics, which are the batch's."""
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
    _assert_three_way(x, make_schedule(x.shape, x.element_size()))


@pytest.mark.parametrize("tiles_per_split", [1, 2, 100])
@pytest.mark.parametrize("shape", [(11, 5), (5, 3, 9)], ids=["mc", "ncl"])
def test_statistics_over_many_tiles_and_splits(
    shape: tuple[int, ...], tiles_per_split: int, device: str
) -> None:
    _assert_three_way(_input(shape, device), _many_tiles(shape, tiles_per_split))


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
    count, mean, m2 = statistics.partial_statistics(x, _many_tiles(shape, 1))
    M = x.numel() // x.shape[1]
    torch.testing.assert_close(count.sum(0), torch.full_like(count[0], M))
    # The first tile: two samples, and four positions where there are any.
    first = x[:2, :, :4].double() if x.dim() == 3 else x[:2].double()
    true_mean, true_var = reference.batch_statistics(first)
    torch.testing.assert_close(mean[0].double(), true_mean, rtol=1e-5, atol=1e-5)
    values = first.numel() // first.shape[1]
    torch.testing.assert_close(m2[0].double(), true_var * values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_running_statistics_keep_their_dtype(dtype: torch.dtype, device: str) -> None:
    x = _input((6, 3, 5), device)
    running_mean = torch.full((3,), 0.5, dtype=dtype, device=device)
    running_var = torch.full((3,), 2.0, dtype=dtype, device=device)
    schedule = make_schedule(x.shape, x.element_size())
    partials = statistics.partial_statistics(x, schedule)
    statistics.finish_statistics(*partials, running_mean, running_var, 0.25, EPS, schedule)
    mean, var = reference.batch_statistics(x)
    torch.testing.assert_close(running_mean, (0.375 + 0.25 * mean).to(dtype))
    torch.testing.assert_close(running_var, (1.5 + 0.25 * var * 30 / 29).to(dtype))


@pytest.mark.parametrize("shape", [(11, 5), (5, 3, 9)], ids=["mc", "ncl"])
def test_two_runs_give_the_same_bits(shape: tuple[int, ...], device: str) -> None:
    x = _input(shape, device)
    first, second = (_statistics(x, _many_tiles(shape, 2), None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
