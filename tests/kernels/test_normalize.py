"""Normalise, scale and shift: ours, torch at the same dtype, the reference in fp64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from bn_lightning.kernels import normalize, reference
from bn_lightning.kernels.schedule import make_schedule

# Relative to the largest value of y: two units in the last place, for where torch's own rounding
# happens to be exact.
ABSOLUTE = {torch.float32: 2.4e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

SHAPES = {
    "rows": (7, 3),
    "one_sample": (1, 3),
    "l_is_1": (5, 3, 1),
    "one_channel": (6, 1, 5),
    "one_sample_in_space": (1, 3, 5),
    "65_channels": (3, 65, 2),
    "one_over_a_tile_of_rows": (65, 33),
    "one_over_a_tile_of_positions": (1, 2, 2049),
    "images": (3, 3, 5, 7),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def nan_in_empty_tensors() -> Iterator[None]:
    """Fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _assert_three_way(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    g = torch.Generator().manual_seed(3)
    C = x.shape[1]
    mean = (torch.randn(C, generator=g) + 3).to(x.device)
    var = (torch.rand(C, generator=g) + 0.5).to(x.device)
    rstd = torch.rsqrt(var)
    y = normalize.normalize(x, mean, rstd, weight, bias, make_schedule(x.shape, x.element_size()))

    parameters = [None if p is None else p.float() for p in (weight, bias)]
    torchs = F.batch_norm(x, mean, var, *parameters, training=False, eps=0.0)
    true = reference.normalize(x.double(), mean.double(), torch.rsqrt(var.double()), *parameters)
    assert y.dtype == x.dtype
    scale = true.abs().max()
    error, torch_error = ((t.double() - true).abs().max() / scale for t in (y, torchs))
    assert error <= 2 * torch_error + ABSOLUTE[x.dtype]


def _tensors(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = (torch.randn(shape, generator=g) * 2 + 3).to(device, dtype)
    weight, bias = (torch.randn(shape[1], generator=g).to(device) for _ in range(2))
    return x, weight, bias


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_normalize(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    _assert_three_way(*_tensors(shape, dtype, device))


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5)], ids=["mc", "ncl"])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_weight_and_bias_are_optional(
    shape: tuple[int, ...], has_weight: bool, has_bias: bool, device: str
) -> None:
    x, weight, bias = _tensors(shape, torch.float32, device)
    _assert_three_way(x, weight if has_weight else None, bias if has_bias else None)


@dtypes
def test_parameters_keep_their_own_dtype(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = _tensors((4, 3, 5), torch.float32, device)
    _assert_three_way(x, weight.to(dtype), bias.to(dtype))


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5)], ids=["mc", "ncl"])
def test_two_runs_give_the_same_bits(shape: tuple[int, ...], device: str) -> None:
    x, weight, bias = _tensors(shape, torch.float32, device)
    schedule = make_schedule(x.shape, x.element_size())
    first, second = (normalize.normalize(x, bias, weight, weight, bias, schedule) for _ in range(2))
    assert torch.equal(first, second)
