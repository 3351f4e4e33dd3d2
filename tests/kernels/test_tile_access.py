"""The elements of a tile; the Triton side of the table of activations against the torch side."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from bn_lightning.kernels import dispatch, element, tile_access
from bn_lightning.kernels.activations import (
    ACTIVATIONS,
    Saves,
    activate,
    derivative,
    lower_derivative,
    upper_branch,
)
from bn_lightning.kernels.schedule import make_schedule
from bn_lightning.kernels.walk import Tiling

SLOPE = 0.1
# Relative, for values far from 0 and near it; absolute, where gelu and mish cancel below zero.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@triton.jit
def _evaluate_kernel(
    z_ptr: tl.tensor,  # (128,)
    value_ptr: tl.tensor,  # (128,)
    derivative_ptr: tl.tensor,  # (128,)
    of_output_ptr: tl.tensor,  # (128,)
    negative_slope: tl.tensor,
    ACTIVATION: tl.constexpr,
    OF_OUTPUT: tl.constexpr,
) -> None:
    offsets = tl.arange(0, 128)
    z = tl.load(z_ptr + offsets)
    y = element.apply_activation(z, negative_slope, ACTIVATION)
    tl.store(value_ptr + offsets, y)
    one = tl.zeros_like(z) + 1.0
    if ACTIVATION != "identity":
        slope = element.multiply_derivative(one, z, negative_slope, ACTIVATION)
        tl.store(derivative_ptr + offsets, slope)
    if OF_OUTPUT:
        slope = element.multiply_derivative_of_output(one, y, ACTIVATION)
        tl.store(of_output_ptr + offsets, slope)


def _points(device: str) -> Tensor:
    """Return 128 points: near 0 and far from it, of both signs, and at the kinks."""
    magnitudes = torch.logspace(-6, 1.5, 60)
    kinks = torch.tensor([0.0, 6.0, 3.0, -3.0, 0.5, -0.5, 15.0, 20.0])
    return torch.cat([magnitudes, -magnitudes, kinks]).to(device)


@activations
def test_triton_and_torch_agree(activation: str, device: str) -> None:
    z = _points(device)
    value, slope, of_output = (torch.full_like(z, float("nan")) for _ in range(3))
    entry = ACTIVATIONS[activation]
    serves = entry.derivative_of_output
    _evaluate_kernel[(1,)](z, value, slope, of_output, SLOPE, activation, serves is not None)
    z64 = z.double()
    torch.testing.assert_close(value.double(), activate(z64, activation, SLOPE), **TOLERANCE)
    true_slope = derivative(z64, activation, SLOPE).detach()
    if activation != "identity":
        torch.testing.assert_close(slope.double(), true_slope, **TOLERANCE)
    if serves is not None:
        torch.testing.assert_close(of_output.double(), true_slope, **TOLERANCE)
        in_torch = serves(activate(z64, activation, SLOPE))
        torch.testing.assert_close(in_torch, true_slope, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@activations
def test_nan_stays_nan(activation: str, device: str) -> None:
    z = torch.full((128,), float("nan"), device=device)
    value, rest = torch.zeros_like(z), torch.zeros_like(z)
    _evaluate_kernel[(1,)](z, value, rest, rest, SLOPE, activation, False)
    assert value.isnan().all()


@pytest.mark.parametrize("activation", [k for k, v in ACTIVATIONS.items() if v.saves is Saves.MASK])
def test_the_mask_is_the_derivative(activation: str, device: str) -> None:
    z = _points(device).double()
    lower = lower_derivative(activation, SLOPE)
    slope = torch.where(upper_branch(z, activation), 1.0, lower).double()
    torch.testing.assert_close(slope, derivative(z, activation, SLOPE).detach())


@triton.jit
def _last_tile_kernel(
    found_ptr: tl.tensor,  # (blocks, 3) int64: least and largest offset, and elements inside
    tiling: Tiling,
) -> None:
    place = tile_access.find_place(tile_access.count_tiles(tiling) - 1, tiling)
    last = tile_access.locate_tile(place, tl.program_id(0), tiling)
    found_ptr += 3 * tl.program_id(0)
    elements = last.elements
    offsets = (elements.start + elements.offsets).to(tl.int64)
    inside = elements.inside.broadcast_to(offsets.shape)
    beyond = tl.full(offsets.shape, 1 << 62, dtype=tl.int64)
    tl.store(found_ptr, tl.min(tl.min(tl.where(inside, offsets, beyond), axis=1), axis=0))
    tl.store(found_ptr + 1, tl.max(tl.max(tl.where(inside, offsets, -1), axis=1), axis=0))
    tl.store(found_ptr + 2, tl.sum(tl.sum(inside.to(tl.int64), axis=1), axis=0))


# The addressing alone: the last tiles of all blocks end at the end of the tensor.
@pytest.mark.parametrize("beyond", [-5000, -5, -1, 3])
@pytest.mark.parametrize(
    ("channels", "channels_last"),
    [(1, False), (1, True), (2, True), (8, True), (24, True)],
    ids=["contiguous", "channels_last", "2_channels", "8_channels", "24_channels"],
)
def test_the_last_tile_near_2_to_the_31(
    channels: int, channels_last: bool, beyond: int, device: str
) -> None:
    values = (1 << 31) // channels + beyond
    found_on = dispatch._device(torch.device(device))
    schedule = make_schedule((1, channels, values), 2, channels_last, found_on)
    for walk in (schedule.reduction, schedule.elementwise):
        found = torch.full((walk.blocks, 3), -1, dtype=torch.int64, device=device)
        _last_tile_kernel[(walk.blocks,)](found, walk.tiling)
        least, largest, inside = found[found[:, 2] > 0].unbind(1)
        assert largest.max() == schedule.shape.numel - 1
        ends = schedule.shape.numel - walk.block_r * walk.row
        assert ends <= least.min() and inside.sum() <= walk.block_r * walk.row
        if walk.blocks == 1:
            assert inside == largest - least + 1
