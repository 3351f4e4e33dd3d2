"""The schedule's tiles cover the tensor once, within the hardware's limits."""

import math

import pytest

from bn_lightning.kernels.schedule import (
    FINISH_TILE_ELEMENTS,
    MAX_SPLITS,
    MAX_WARPS,
    REDUCTION_TILE_ELEMENTS,
    Layout,
    Schedule,
    Tile,
    make_schedule,
)

SHAPES = {
    "one_value": (1, 1),
    "mnist_mlp": (60, 100),
    "m_is_2": (2, 3),
    "one_over_a_tile_of_rows": (129, 65),
    "one_over_a_tile_of_positions": (2, 3, 4097),
    "long_rows": (1_000_003, 3),
    "one_sample": (1, 3, 50_001),
    "small_maps": (256, 2048, 7, 7),
    "large_maps": (256, 64, 56, 56),
    "volumes": (2, 65, 9, 10, 11),
    "over_2_to_the_31": (4096, 256, 64, 64),
    "many_channels": (2, 1_000_000),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
itemsizes = pytest.mark.parametrize("itemsize", [2, 4], ids=["16_bits", "32_bits"])


def _is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _reduction_tiles(s: Schedule) -> int:
    tiles = math.ceil(s.N / s.reduction.rows)
    return tiles * math.ceil(s.L / s.reduction.columns) if s.layout is Layout.NCL else tiles


@itemsizes
@shapes
def test_splits_cover_every_tile_and_none_is_empty(shape: tuple[int, ...], itemsize: int) -> None:
    s = make_schedule(shape, itemsize)
    tiles = _reduction_tiles(s)
    assert (s.splits - 1) * s.tiles_per_split < tiles <= s.splits * s.tiles_per_split
    assert 1 <= s.splits <= MAX_SPLITS


@itemsizes
@shapes
def test_tiles_fit_the_hardware(shape: tuple[int, ...], itemsize: int) -> None:
    s = make_schedule(shape, itemsize)
    for tile in (s.reduction, s.elementwise):
        assert _is_power_of_2(tile.rows) and _is_power_of_2(tile.columns)
        assert tile.rows * tile.columns <= REDUCTION_TILE_ELEMENTS
        assert _is_power_of_2(tile.num_warps) and tile.num_warps <= MAX_WARPS
    # The limits of a launch: 2^31 - 1 programs in the first dimension, 65535 in the second.
    assert s.reduction_grid[0] < 2**31 and s.reduction_grid[1] <= 65535
    assert s.elementwise_grid[0] < 2**31


@itemsizes
@shapes
def test_elementwise_grid_covers_the_tensor(shape: tuple[int, ...], itemsize: int) -> None:
    s = make_schedule(shape, itemsize)
    rows, columns = (s.N, s.C) if s.layout is Layout.MC else (s.N * s.C, s.L)
    tile = s.elementwise
    assert s.elementwise_grid == (math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns),)


@itemsizes
@shapes
def test_a_tile_of_rows_is_addressed_in_32_bits(shape: tuple[int, ...], itemsize: int) -> None:
    # The NCL elementwise kernels add 32-bit offsets to a 64-bit start.
    s = make_schedule(shape, itemsize)
    assert s.elementwise.rows * s.L < 2**31


@itemsizes
@shapes
def test_finishing_holds_all_splits_at_once(shape: tuple[int, ...], itemsize: int) -> None:
    s = make_schedule(shape, itemsize)
    block_s, block_c = s.finish_tile
    assert block_s >= s.splits
    assert _is_power_of_2(block_s) and _is_power_of_2(block_c)
    assert block_s * block_c <= FINISH_TILE_ELEMENTS


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 3), Layout.MC),
        ((5, 3, 1), Layout.MC),
        ((5, 3, 1, 1), Layout.MC),
        ((5, 3, 2), Layout.NCL),
        ((5, 3, 1, 2), Layout.NCL),
    ],
    ids=["rows", "l_is_1", "one_pixel", "sequence", "image"],
)
def test_channels_are_contiguous_where_l_is_1(shape: tuple[int, ...], layout: Layout) -> None:
    assert make_schedule(shape, 4).layout is layout


def test_a_tile_across_channels_is_a_cache_line() -> None:
    assert make_schedule((1000, 1000), 4).reduction.columns == 32
    assert make_schedule((1000, 1000), 2).reduction.columns == 64


def test_few_channels_are_split_and_many_are_not() -> None:
    assert make_schedule((256, 3, 224, 224), 4).splits == MAX_SPLITS
    assert make_schedule((256, 2048, 7, 7), 4).splits == 1


def test_space_is_flattened() -> None:
    s = make_schedule((2, 3, 4, 5, 6), 4)
    assert (s.N, s.C, s.L, s.values_per_channel) == (2, 3, 120, 240)


def test_schedule_is_frozen() -> None:
    s = make_schedule((4, 3), 4)
    assert s.reduction == Tile(rows=4, columns=4, num_warps=1)
    with pytest.raises(AttributeError):
        s.splits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "shape", [(), (3,), (0, 3), (2, 3, 0)], ids=["scalar", "1d", "empty_batch", "empty_space"]
)
def test_shapes_without_values_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`shape`"):
        make_schedule(shape, 4)
