"""The schedule's tiles cover the tensor once, within the hardware's limits."""

import dataclasses
import math

import pytest

from bn_lightning.kernels.schedule import (
    FINISH_ELEMENTS,
    INTERPRETER,
    MAX_SPLITS,
    MAX_THREADS,
    PROGRAMS_AT_WORK,
    REDUCTION_BYTES,
    Device,
    Regime,
    Schedule,
    choose_regime,
    forced_regime,
    make_schedule,
)
from bn_lightning.kernels.walk import MOST_ELEMENTS, Tiling, as_constexpr

H200 = Device(processors=132, cache_bytes=50 << 20)
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
    "short_rows": (64, 512, 2, 2),
    "volumes": (2, 65, 9, 10, 11),
    "over_2_to_the_31": (4096, 256, 64, 64),
    "many_channels": (2, 1_000_000),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
itemsizes = pytest.mark.parametrize("itemsize", [2, 4], ids=["16_bits", "32_bits"])
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["ncl", "channels_last"])


def _schedules(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> list[Schedule]:
    """Return the schedule of each regime."""
    schedules = []
    for regime in Regime:
        with forced_regime(regime):
            schedules.append(make_schedule(shape, itemsize, channels_last, H200))
    return schedules


def _is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@itemsizes
@layouts
@shapes
def test_splits_cover_every_tile_and_none_is_empty(
    shape: tuple[int, ...], channels_last: bool, itemsize: int
) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        for walk in (s.reduction, s.elementwise):
            assert (walk.splits - 1) * walk.tiles_per_split < walk.tiles
            assert walk.tiles <= walk.splits * walk.tiles_per_split
        assert 1 <= s.splits <= MAX_SPLITS
        assert s.regime is not Regime.SINGLE_LAUNCH or s.splits == 1


@itemsizes
@layouts
@shapes
def test_blocks_cover_every_row(shape: tuple[int, ...], channels_last: bool, itemsize: int) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        for walk in (s.reduction, s.elementwise):
            assert (walk.rows - 1) * walk.row < math.prod(shape) <= walk.rows * walk.row
            assert (walk.blocks - 1) * walk.span < walk.row <= walk.blocks * walk.span
            assert walk.rows * walk.samples >= walk.shape.N
        # A block of channels has all values of each, and a tile of several has whole rows.
        walk = s.reduction
        assert walk.span == walk.group * walk.shape.L
        assert walk.group == 1 or walk.span <= walk.block_p
        assert s.values_per_channel * s.C == math.prod(shape)


@itemsizes
@layouts
@shapes
def test_runs_of_a_tile_begin_where_the_schedule_says(
    shape: tuple[int, ...], channels_last: bool, itemsize: int
) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        for walk in (s.reduction, s.elementwise):
            blocks = range(0, walk.row, walk.span)
            starts = {r * walk.row + b for r in (0, 1, walk.rows - 1) for b in (0, *blocks[-2:])}
            assert all(start % walk.align == 0 for start in starts if start < math.prod(shape))
            # Only where the channels of a sample have an odd number of values loads are single.
            odd = walk.shape.C * walk.shape.L % 2 or walk.shape.L % 2 and walk.group == 1
            assert odd or walk.align > 1


@itemsizes
@pytest.mark.parametrize(
    "shape",
    [(60, 100), (129, 65), (2, 3), (7, 4), (4, 12, 7), (4, 3, 13), (3, 9, 49), (5, 1, 13)],
    ids=str,
)
def test_each_byte_of_the_mask_belongs_to_one_tile(shape: tuple[int, ...], itemsize: int) -> None:
    for regime in Regime:
        with forced_regime(regime):
            s = make_schedule(shape, itemsize, False, H200, writes_mask=True)
        walk = s.elementwise if regime is Regime.TWO_PASS else s.reduction
        assert s.regime is regime
        owners: dict[int, tuple[int, int]] = {}
        for position in range(walk.row):
            block, inside = divmod(position, walk.span)
            tile = (block, inside // walk.block_p)
            assert owners.setdefault(position // 8, tile) == tile
        # Rows of several samples are those of the mask, one after the other.
        assert walk.samples == 1 or walk.row % (8 * walk.samples) == 0


@itemsizes
@layouts
@shapes
def test_tiles_fit_the_hardware(shape: tuple[int, ...], channels_last: bool, itemsize: int) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        for walk in (s.reduction, s.elementwise):
            assert _is_power_of_2(walk.block_r) and _is_power_of_2(walk.block_p)
            assert walk.block_r * walk.block_p * itemsize <= REDUCTION_BYTES
            assert _is_power_of_2(walk.num_warps) and walk.num_warps * 32 <= MAX_THREADS
            # The limits of a launch: 2^31 - 1 programs in the first dimension, 65535 in the second.
            assert walk.blocks < 2**31 and walk.splits <= 65535


@itemsizes
@layouts
@shapes
def test_finishing_holds_some_splits_at_once(
    shape: tuple[int, ...], channels_last: bool, itemsize: int
) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        block_s, block_c = s.finish_tile
        assert _is_power_of_2(block_s) and _is_power_of_2(block_c)
        assert block_s * block_c <= FINISH_ELEMENTS


def test_channels_last_is_rows() -> None:
    assert make_schedule((8, 64, 4, 4), 4, True, H200) == make_schedule((128, 64), 4, False, H200)
    s = make_schedule((2, 3, 4, 5, 6), 4, False, H200)
    assert (*s.shape, s.values_per_channel) == (2, 3, 120, 4, 240)


@pytest.mark.parametrize("shape", [(256, 64, 2, 2), (256, 64, 3, 3), (256, 64, 7, 7), (256, 64)])
def test_a_row_of_a_tile_is_a_cache_line(shape: tuple[int, ...]) -> None:
    for itemsize in (2, 4):
        s = make_schedule(shape, itemsize, False, H200)
        assert s.reduction.span * itemsize >= 128


# Rows, positions and channels of a tile of a reduction, what its runs are aligned to, blocks, and
# splits of so many tiles: each follows from the numbers beside it, with 132 processors of two
# programs, and tiles of 8 KB.
CUTS = [
    # A line of 128 bytes is 32 channels, of which 4 lines would be a quarter padding: half lines.
    ("mnist_mlp", (60, 100), 4, False, Regime.SINGLE_LAUNCH, (64, 16, 16), 4, 7, (1, 1)),
    # 8 * 49 positions in 512, 16 bytes from a multiple of 8 on; 256 programs of 264.
    ("small_maps", (64, 2048, 7, 7), 2, False, Regime.SINGLE_LAUNCH, (8, 512, 8), 8, 256, (1, 8)),
    # More channels of 256 samples in each program would not stay in L2.
    (
        "many_maps",
        (256, 2048, 7, 7),
        2,
        False,
        Regime.SINGLE_LAUNCH,
        (32, 128, 2),
        2,
        1024,
        (1, 8),
    ),
    ("small_maps", (256, 2048, 7, 7), 2, False, Regime.TWO_PASS, (8, 512, 8), 8, 256, (1, 32)),
    # 5 * 196 of 1024 positions are less padding than 196 of 256.
    ("maps", (256, 1024, 14, 14), 2, False, Regime.TWO_PASS, (4, 1024, 5), 4, 205, (5, 13)),
    # 13 tiles along L and 16 along N; four programs for each of 64 channels.
    ("large_maps", (256, 64, 56, 56), 2, False, Regime.TWO_PASS, (16, 256, 1), 8, 64, (4, 52)),
    # 12,544 rows in tiles of 64, 64 channels to a line; eight programs for each of 32 blocks.
    ("rows", (256, 2048, 7, 7), 2, True, Regime.TWO_PASS, (64, 64, 64), 8, 32, (8, 25)),
    # 4097 channels begin anywhere.
    ("odd_rows", (65536, 4097), 2, False, Regime.TWO_PASS, (64, 64, 64), 1, 65, (4, 256)),
    # 9 tiles of 512 hold 4097 with little padding.
    ("tail", (2, 3, 4097), 4, False, Regime.TWO_PASS, (2, 512, 1), 1, 3, (9, 1)),
    # One channel is one row, whatever the layout.
    ("one_channel", (64, 1, 100), 4, True, Regime.SINGLE_LAUNCH, (1, 1024, 1), 8, 1, (1, 7)),
    # 3 channels take 4; 245 programs of 4 tiles.
    ("three", (1_000_003, 3), 2, False, Regime.TWO_PASS, (1024, 4, 3), 1, 1, (245, 4)),
    # 2 samples leave room for 1024 channels a program, and 977 programs.
    ("channels", (2, 1_000_000), 4, False, Regime.SINGLE_LAUNCH, (2, 1024, 1024), 8, 977, (1, 1)),
    # A power of two, not above 10,000 / 132, so that as many programs as processors are left.
    ("some_channels", (2, 10_000), 4, False, Regime.SINGLE_LAUNCH, (2, 64, 64), 8, 157, (1, 1)),
    ("one_value", (1, 1), 4, False, Regime.SINGLE_LAUNCH, (1, 1, 1), 1, 1, (1, 1)),
]


@pytest.mark.parametrize(
    ("shape", "itemsize", "channels_last", "regime", "tile", "align", "blocks", "splits"),
    [cut[1:] for cut in CUTS],
    ids=[f"{cut[0]}-{cut[4].value}" for cut in CUTS],
)
def test_how_a_reduction_is_cut(
    shape: tuple[int, ...],
    itemsize: int,
    channels_last: bool,
    regime: Regime,
    tile: tuple[int, int, int],
    align: int,
    blocks: int,
    splits: tuple[int, int],
) -> None:
    with forced_regime(regime):
        s = make_schedule(shape, itemsize, channels_last, H200)
    walk = s.reduction
    assert s.regime is regime
    assert (walk.block_r, walk.block_p, walk.group) == tile
    assert (walk.align, walk.blocks) == (align, blocks)
    assert (walk.splits, walk.tiles_per_split) == splits
    assert walk.grid == (blocks, splits[0])


# Samples of a row, rows and positions of a tile, alignment, blocks and splits of tiles.
@pytest.mark.parametrize(
    ("shape", "channels_last", "samples", "tile", "align", "blocks", "splits"),
    [
        # One channel to a block, with eight programs each, of 528.
        ((256, 64, 56, 56), False, 1, (8, 256), 8, 64, (8, 52)),
        # Four samples of 64 channels are a row without padding.
        ((256, 64, 56, 56), True, 4, (8, 256), 8, 1, (523, 48)),
        ((256, 2048, 7, 7), False, 1, (8, 256), 8, 392, (4, 8)),
        # 25 * 256 = 64 * 100.
        ((65536, 100), False, 64, (8, 256), 8, 25, (19, 7)),
        # Two samples of 100 begin at a multiple of 8.
        ((60, 100), False, 2, (8, 256), 8, 1, (4, 1)),
        # Fewer samples than that are one row.
        ((2, 3, 13), False, 2, (1, 128), 2, 1, (1, 1)),
        ((1, 1), False, 1, (1, 8), 1, 1, (1, 1)),
    ],
    ids=str,
)
def test_how_the_elementwise_pass_is_cut(
    shape, channels_last, samples, tile, align, blocks, splits
) -> None:
    walk = make_schedule(shape, 2, channels_last, H200).elementwise
    assert (walk.samples, (walk.block_r, walk.block_p), walk.align) == (samples, tile, align)
    assert (walk.blocks, (walk.splits, walk.tiles_per_split)) == (blocks, splits)


def test_kernels_take_constants_in_a_named_tuple() -> None:
    pytest.importorskip("triton")
    s = make_schedule((5, 3, 12), 4, False, H200)
    found = {k: getattr(v, "value", v) for k, v in s.reduction.tiling._asdict().items()}
    assert found == {
        **{"R": 5, "P": 9, "span": 6, "C": 3, "L": 12, "numel": 45},
        **{"BLOCK_R": 8, "BLOCK_P": 32, "GROUP": 2, "CHANNELS": 2, "ALIGN": 4, "STAGES": 3},
        **{"WRAPS": False, "RAGGED": False, "MASK_WIDTH": 8, "WIDE": False},
    }
    found = s.elementwise.tiling
    assert isinstance(found, Tiling)
    # Two samples are a row of 72, of which the last has one.
    assert (found.R, found.P * found.ALIGN.value) == (3, 72)
    assert found.WRAPS.value and found.RAGGED.value and found.MASK_WIDTH.value == 8
    # Triton keeps True and 1 apart, and so does the cache of constants.
    assert as_constexpr(True).value is True and type(as_constexpr(1).value) is int


def test_where_single_launch_ends() -> None:
    # 1 MiB is small whatever the shape, and one row more has too few channels to be.
    assert choose_regime(1 << 18, 1, 1, 4, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime((1 << 18) + 1, 1, 1, 4, H200) is Regime.TWO_PASS
    # A channel for seven of eight programs, and dy, x and dx of all of them in 50 MiB: 66,196 bytes
    # of each for each of 264.
    assert choose_regime(1, 231, 33_098, 2, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime(1, 230, 33_098, 2, H200) is Regime.TWO_PASS
    assert choose_regime(1, 264, 33_099, 2, H200) is Regime.TWO_PASS
    # Rows come by lines of 64 channels.
    assert choose_regime(517, 231 * 64, 1, 2, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime(518, 231 * 64, 1, 2, H200) is Regime.TWO_PASS
    assert choose_regime(517, 230 * 64, 1, 2, H200) is Regime.TWO_PASS


def test_wide_begins_below_2_to_the_31() -> None:
    pytest.importorskip("triton")
    for L, wide in ((2**31 - MOST_ELEMENTS, False), (2**31 - MOST_ELEMENTS + 1, True)):
        assert make_schedule((1, 1, L), 2, False, H200).reduction.tiling.WIDE.value is wide


REGIMES = {
    "mnist_mlp": ((60, 100), False, Regime.SINGLE_LAUNCH),
    "small_maps": ((64, 2048, 7, 7), False, Regime.SINGLE_LAUNCH),
    "small_maps_of_many": ((256, 2048, 7, 7), False, Regime.TWO_PASS),
    "large_maps": ((256, 64, 56, 56), False, Regime.TWO_PASS),
    "long_channels": ((256, 512, 56, 56), False, Regime.TWO_PASS),
    "channels_last": ((256, 2048, 7, 7), True, Regime.TWO_PASS),
    "rows": ((65536, 4096), False, Regime.TWO_PASS),
}


@pytest.mark.parametrize(("shape", "channels_last", "regime"), REGIMES.values(), ids=REGIMES.keys())
def test_regime(shape: tuple[int, ...], channels_last: bool, regime: Regime) -> None:
    s = make_schedule(shape, 2, channels_last, H200)
    assert s.regime is regime
    if regime is Regime.SINGLE_LAUNCH and math.prod(shape) > 1 << 19:
        in_flight = 2 * H200.processors * s.values_per_channel * s.reduction.group * 2
        # Of dy, x and dx.
        assert 3 * in_flight <= H200.cache_bytes


def test_what_a_regime_does_not_support_runs_in_two_passes() -> None:
    for regime in Regime:
        with forced_regime(regime):
            # A byte of the mask belongs to two blocks, if a block is shorter than 8 channels of an
            # odd length, and there is more than one.
            for shape, expected in (
                ((4, 8), regime),
                ((4, 9), regime),
                ((4, 3), regime),
                ((4, 12, 7), regime),
                ((4, 3, 8), regime),
                ((4, 3, 13), regime),
                ((4, 9, 13 * 13), Regime.TWO_PASS),
                ((4, 3, 4097), Regime.TWO_PASS),
            ):
                assert make_schedule(shape, 4, False, H200, writes_mask=True).regime is expected
            cumulative = make_schedule((4, 8, 8), 4, False, H200, cumulative=True).regime
            assert cumulative is (Regime.TWO_PASS if regime is Regime.SINGLE_LAUNCH else regime)
    assert make_schedule((4, 8, 8), 4, False, H200).regime is Regime.SINGLE_LAUNCH


def test_few_channels_are_split_and_many_are_not() -> None:
    assert make_schedule((256, 3, 224, 224), 4, False, H200).splits == 2 * 132 // 3
    with forced_regime(Regime.TWO_PASS):
        assert make_schedule((256, 2048, 7, 7), 4, False, H200).splits == 1


MAPS = ((64, 112), (256, 56), (512, 28), (1024, 14))


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        *(((256, C, side, side), False) for C, side in MAPS),
        *(((256, C, side, side), True) for C, side in MAPS),
        ((65536, 4096), False),
        ((2, 32, 128, 128, 128), False),
    ],
    ids=str,
)
def test_programs_fill_their_waves(shape: tuple[int, ...], channels_last: bool) -> None:
    s = make_schedule(shape, 2, channels_last, H200)
    for walk, at_work in ((s.reduction, 2), (s.elementwise, 4)):
        programs = walk.blocks * walk.splits
        waves = math.ceil(programs / (at_work * H200.processors))
        assert programs >= 0.75 * waves * at_work * H200.processors


def test_programs_share_the_registers() -> None:
    device = dataclasses.replace(H200, registers=1 << 16)
    for regime in Regime:
        with forced_regime(regime):
            walk = make_schedule((256, 64, 56, 56), 2, False, device).reduction
            assert (
                "maxnreg" not in make_schedule((256, 64, 56, 56), 2, False, H200).reduction.options
            )
        threads = walk.options["num_warps"] * 32
        assert walk.options["maxnreg"] * threads * PROGRAMS_AT_WORK == device.registers


def test_amds_warps_are_wider_and_load_nothing_ahead() -> None:
    s = make_schedule((256, 64, 56, 56), 2, False, dataclasses.replace(H200, warp_size=64))
    assert s.reduction.num_warps == s.elementwise.num_warps == 4
    assert s.reduction.stages == 1


def test_the_interpreter_runs_few_programs_and_chooses_as_an_h200() -> None:
    assert dataclasses.replace(H200, processors=4) == INTERPRETER
    assert (INTERPRETER.warp_size, INTERPRETER.registers) == (32, 0)


def test_schedule_is_frozen() -> None:
    s = make_schedule((4, 3), 4, False, H200)
    with pytest.raises(AttributeError):
        s.shape = s.shape  # type: ignore[misc]


@pytest.mark.parametrize(
    "shape", [(), (3,), (0, 3), (2, 3, 0)], ids=["scalar", "1d", "empty_batch", "empty_space"]
)
def test_shapes_without_values_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`shape`"):
        make_schedule(shape, 4, False, H200)
