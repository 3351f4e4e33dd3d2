"""The schedule's tiles cover the tensor once, within the hardware's limits."""

import dataclasses
import math

import pytest

from bn_lightning.kernels.schedule import (
    CACHE_SHARE,
    FINISH_ELEMENTS,
    INTERPRETER,
    MAX_SPLITS,
    MAX_THREADS,
    TILE_ELEMENTS,
    Device,
    Regime,
    Schedule,
    as_constexpr,
    choose_regime,
    forced_regime,
    make_schedule,
)

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
        tiles = math.ceil(s.N / s.block_n) * math.ceil(s.L / s.block_l)
        assert (s.splits - 1) * s.tiles_per_split < tiles <= s.splits * s.tiles_per_split
        assert 1 <= s.splits <= MAX_SPLITS
        assert s.regime is not Regime.SINGLE_LAUNCH or s.splits == 1


@itemsizes
@layouts
@shapes
def test_tiles_fit_the_hardware(shape: tuple[int, ...], channels_last: bool, itemsize: int) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        assert all(_is_power_of_2(b) for b in (s.block_n, s.block_c, s.block_l))
        assert s.block_n * s.block_c * s.block_l <= TILE_ELEMENTS
        for warps in (s.num_warps, s.flat_warps):
            assert _is_power_of_2(warps) and warps * 32 <= MAX_THREADS
        # The limits of a launch: 2^31 - 1 programs in the first dimension, 65535 in the second.
        assert s.channel_blocks < 2**31 and s.splits <= 65535 and s.flat_grid[0] < 2**31
        # Positions in the last tile fit 32 bits unless the schedule says otherwise.
        assert s.wide or s.N + s.block_n <= 2**31 and s.L + s.block_l <= 2**31
        assert s.wide or math.prod(shape) <= 2**31


@itemsizes
@shapes
def test_the_elementwise_grid_covers_the_tensor(shape: tuple[int, ...], itemsize: int) -> None:
    s = make_schedule(shape, itemsize, False, H200)
    assert s.flat_elements % 8 == 0 and _is_power_of_2(s.flat_elements)
    assert s.flat_grid == (math.ceil(math.prod(shape) / s.flat_elements),)


@itemsizes
@layouts
@shapes
def test_finishing_holds_all_splits_at_once(
    shape: tuple[int, ...], channels_last: bool, itemsize: int
) -> None:
    for s in _schedules(shape, itemsize, channels_last):
        block_s, block_c = s.finish_tile
        assert block_s >= s.splits
        assert _is_power_of_2(block_s) and _is_power_of_2(block_c)
        assert block_s * block_c <= FINISH_ELEMENTS
        if s.regime is Regime.PERSISTENT:
            assert s.splits * s.block_c <= FINISH_ELEMENTS


def test_channels_last_is_rows() -> None:
    assert make_schedule((8, 64, 4, 4), 4, True, H200) == make_schedule((128, 64), 4, False, H200)
    s = make_schedule((2, 3, 4, 5, 6), 4, False, H200)
    assert (s.N, s.C, s.L, s.values_per_channel) == (2, 3, 120, 240)


@layouts
def test_a_row_of_a_tile_is_a_cache_line(channels_last: bool) -> None:
    for itemsize in (2, 4):
        s = make_schedule((256, 64, 2, 2), itemsize, channels_last, H200)
        assert s.block_c * s.block_l * itemsize >= 128


def test_padding_is_small_where_it_can_be() -> None:
    # 56 * 56 = 12.25 * 256 and 28 * 28 = 12.25 * 64: a tile of 4096 or 1024 would be a fifth empty.
    assert make_schedule((256, 64, 56, 56), 2, False, H200).block_l == 256
    assert make_schedule((256, 64, 28, 28), 2, False, H200).block_l == 64


# Tiles (N, C, L), warps, splits of so many tiles, lag, programs: each follows from the numbers
# beside it, with 132 processors, 2048 values a tile in one launch and 4096 in two.
CUTS = [
    # A line of 128 bytes is 32 channels; 60 samples need 64.
    ("mnist_mlp", (60, 100), 4, False, Regime.SINGLE_LAUNCH, (64, 32, 1), 8, (1, 1), 5, 4),
    # 49 positions in 64, and 32 or 64 samples, to a tile; a program for each channel.
    (
        "small_maps",
        (256, 2048, 7, 7),
        2,
        False,
        Regime.SINGLE_LAUNCH,
        (32, 1, 64),
        8,
        (1, 8),
        265,
        264,
    ),
    ("small_maps", (256, 2048, 7, 7), 2, False, Regime.TWO_PASS, (64, 1, 64), 8, (1, 4), 265, 264),
    # 13 tiles along L and 16 along N, for each of 64 channels 1056 / 64 = 16.5 programs.
    (
        "large_maps",
        (256, 64, 56, 56),
        2,
        False,
        Regime.TWO_PASS,
        (16, 1, 256),
        8,
        (16, 13),
        18,
        264,
    ),
    # 416 tiles of 4 KB in items of 32 KB; 264 programs follow 52 items to a channel.
    ("large_maps", (256, 64, 56, 56), 2, False, Regime.PERSISTENT, (8, 1, 256), 8, (52, 8), 7, 264),
    # 12,544 rows in tiles of 64, 64 channels to a line.
    ("rows", (256, 2048, 7, 7), 2, True, Regime.TWO_PASS, (64, 64, 1), 8, (33, 6), 9, 264),
    # The finishing item holds 2048 / 64 splits at most.
    ("rows", (256, 2048, 7, 7), 2, True, Regime.PERSISTENT, (32, 64, 1), 8, (31, 13), 10, 264),
    # 4097 channels begin anywhere: half a tile, in two launches as well.
    ("odd_rows", (65536, 4097), 2, False, Regime.TWO_PASS, (32, 64, 1), 8, (17, 121), 17, 264),
    # 9 tiles of 512 hold 4097 with little padding; 1024 values are a quarter of the most.
    ("tail", (2, 3, 4097), 4, False, Regime.TWO_PASS, (2, 1, 512), 2, (9, 1), 4, 27),
    ("one_sample", (1, 3, 50_001), 2, False, Regime.SINGLE_LAUNCH, (1, 1, 2048), 8, (1, 25), 4, 3),
    ("one_sample", (1, 3, 50_001), 2, False, Regime.PERSISTENT, (1, 1, 2048), 8, (3, 9), 4, 9),
    # 3 channels take 4; 256 splits at most of 1954 tiles.
    ("long_rows", (1_000_003, 3), 2, False, Regime.TWO_PASS, (512, 4, 1), 8, (245, 8), 2, 245),
    # 2 samples leave room for 1024 channels a program, and 977 programs.
    ("channels", (2, 1_000_000), 4, False, Regime.SINGLE_LAUNCH, (2, 1024, 1), 8, (1, 1), 265, 264),
    ("channels", (2, 1_000_000), 4, False, Regime.TWO_PASS, (2, 32, 1), 1, (1, 1), 265, 264),
    # A power of two, not above 10,000 / 132, so that as many programs as processors are left.
    ("some_channels", (2, 10_000), 4, False, Regime.SINGLE_LAUNCH, (2, 64, 1), 1, (1, 1), 158, 157),
    ("one_value", (1, 1), 4, False, Regime.SINGLE_LAUNCH, (1, 1, 1), 1, (1, 1), 2, 1),
]


@pytest.mark.parametrize(
    ("shape", "itemsize", "channels_last", "regime", "tile", "warps", "splits", "lag", "programs"),
    [cut[1:] for cut in CUTS],
    ids=[f"{cut[0]}-{cut[4].value}" for cut in CUTS],
)
def test_how_a_tensor_is_cut(
    shape: tuple[int, ...],
    itemsize: int,
    channels_last: bool,
    regime: Regime,
    tile: tuple[int, int, int],
    warps: int,
    splits: tuple[int, int],
    lag: int,
    programs: int,
) -> None:
    with forced_regime(regime):
        s = make_schedule(shape, itemsize, channels_last, H200)
    assert (s.regime, s.max_warps, s.max_registers) == (regime, 8, None)
    assert ((s.block_n, s.block_c, s.block_l), s.num_warps) == (tile, warps)
    assert ((s.splits, s.tiles_per_split), s.lag, s.programs) == (splits, lag, programs)
    assert s.channel_blocks == math.ceil(s.C / s.block_c)
    assert s.values_per_channel == s.N * s.L


# The tile that finishes, the elementwise program's elements, programs and warps, and which channels
# eight neighbours from a multiple of 8 on have.
@pytest.mark.parametrize(
    ("shape", "channels_last", "finish", "flat", "eights"),
    [
        ((256, 64, 56, 56), False, (16, 64), (2048, 25_088, 8), "one"),
        ((256, 64, 56, 56), True, (256, 8), (2048, 25_088, 8), "consecutive"),
        ((256, 60, 7, 7), True, (256, 8), (2048, 368, 8), "any"),
        ((1_000_003, 3), False, (256, 4), (2048, 1465, 8), "any"),
        ((2, 3, 100), False, (1, 4), (1024, 1, 4), "any"),
        ((5, 16), False, (1, 16), (128, 1, 1), "consecutive"),
        ((1, 1), False, (1, 1), (8, 1, 1), "any"),
    ],
    ids=str,
)
def test_finishing_and_elementwise_tiles(shape, channels_last, finish, flat, eights) -> None:
    s = make_schedule(shape, 2, channels_last, H200)
    if math.prod(shape) > 1 << 19:
        assert s.regime is Regime.TWO_PASS
    assert s.finish_tile == finish
    assert (s.flat_elements, *s.flat_grid, s.flat_warps) == flat
    assert s.eights == eights
    assert s.walk_options == {"num_warps": s.num_warps}


def test_kernels_take_constants_in_named_tuples() -> None:
    pytest.importorskip("triton")
    s = make_schedule((2, 3, 100), 4, False, H200)
    values = [getattr(v, "value", v) for v in s.flat]
    assert values == [600, 3, 100, s.flat_elements, s.eights]
    values = [getattr(v, "value", v) for v in s.tiling]
    assert values == [2, 3, 100, s.block_n, s.block_c, s.block_l, False]
    # Triton keeps True and 1 apart, and so does the cache of constants.
    assert as_constexpr(True).value is True and type(as_constexpr(1).value) is int


def test_where_single_launch_ends() -> None:
    # 1 MiB is small whatever the shape, and one row more has too few channels to be.
    assert choose_regime(1 << 18, 1, 1, 4, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime((1 << 18) + 1, 1, 1, 4, H200) is Regime.TWO_PASS
    # Two channels a processor, and all their values in half of 50 MiB: 99,296 bytes each.
    assert choose_regime(1, 264, 49_648, 2, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime(1, 263, 49_648, 2, H200) is Regime.TWO_PASS
    assert choose_regime(1, 264, 49_649, 2, H200) is Regime.TWO_PASS
    # Rows come by lines of 64 channels.
    assert choose_regime(775, 264 * 64, 1, 2, H200) is Regime.SINGLE_LAUNCH
    assert choose_regime(776, 264 * 64, 1, 2, H200) is Regime.TWO_PASS
    assert choose_regime(775, 263 * 64, 1, 2, H200) is Regime.TWO_PASS


def test_wide_begins_one_tile_below_2_to_the_31() -> None:
    assert not make_schedule((1, 1, 2**31 - TILE_ELEMENTS), 2, False, H200).wide
    assert make_schedule((1, 1, 2**31 - TILE_ELEMENTS + 1), 2, False, H200).wide


REGIMES = {
    "mnist_mlp": ((60, 100), False, Regime.SINGLE_LAUNCH),
    "small_maps": ((256, 2048, 7, 7), False, Regime.SINGLE_LAUNCH),
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
        in_flight = 2 * H200.processors * s.values_per_channel * s.block_c * 2
        assert in_flight <= CACHE_SHARE * H200.cache_bytes


def test_what_a_regime_does_not_support_runs_in_two_passes() -> None:
    for regime in Regime:
        with forced_regime(regime):
            assert (
                make_schedule((4, 8, 7), 4, False, H200, writes_mask=True).regime is Regime.TWO_PASS
            )
            assert make_schedule((4, 8, 8), 4, False, H200, writes_mask=True).regime is regime
            # Neighbours are channels where L is 1, positions elsewhere.
            for shape, expected in (
                ((4, 8), regime),
                ((4, 9), Regime.TWO_PASS),
                ((4, 8, 2), Regime.TWO_PASS),
            ):
                assert make_schedule(shape, 4, False, H200, writes_mask=True).regime is expected
            cumulative = make_schedule((4, 8, 8), 4, False, H200, cumulative=True).regime
            assert cumulative is (Regime.TWO_PASS if regime is Regime.SINGLE_LAUNCH else regime)
    assert make_schedule((4, 8, 8), 4, False, H200).regime is Regime.SINGLE_LAUNCH


def test_few_channels_are_split_and_many_are_not() -> None:
    assert make_schedule((256, 3, 224, 224), 4, False, H200).splits > MAX_SPLITS // 2
    with forced_regime(Regime.TWO_PASS):
        assert make_schedule((256, 2048, 7, 7), 4, False, H200).splits == 1


def test_persistent_keeps_its_blocks_in_the_cache() -> None:
    with forced_regime(Regime.PERSISTENT):
        s = make_schedule((256, 64, 56, 56), 2, False, H200)
    assert s.programs == 2 * H200.processors
    # All programs may be at items of one reading while the other's are waited for.
    assert s.lag * s.splits >= s.programs
    # The blocks between first and second reading: what docs/performance.md says of 12.8 MB.
    block = s.block_c * s.values_per_channel * 2
    assert (s.lag + 1) * block == 12_845_056 <= CACHE_SHARE * H200.cache_bytes


def test_persistent_programs_share_the_registers() -> None:
    device = dataclasses.replace(H200, registers=1 << 16)
    with forced_regime(Regime.PERSISTENT):
        s = make_schedule((256, 64, 56, 56), 2, False, device)
        assert "maxnreg" not in make_schedule((256, 64, 56, 56), 2, False, H200).walk_options
    per_processor = s.programs // H200.processors
    assert s.walk_options["maxnreg"] * s.num_warps * 32 * per_processor == device.registers
    # Elsewhere the compiler weighs registers against programs.
    assert "maxnreg" not in make_schedule((256, 64, 56, 56), 2, False, device).walk_options


def test_threads_that_load_single_values_have_half_of_them() -> None:
    rows, odd_rows = (make_schedule((65536, C), 2, False, H200) for C in (4096, 4097))
    assert rows.block_n * rows.block_c == TILE_ELEMENTS
    assert odd_rows.block_n * odd_rows.block_c == TILE_ELEMENTS // 2
    assert odd_rows.num_warps == rows.num_warps


def test_amds_warps_are_wider() -> None:
    s = make_schedule((256, 64, 56, 56), 2, False, dataclasses.replace(H200, warp_size=64))
    assert s.num_warps == s.flat_warps == 4


def test_the_interpreter_runs_few_programs_and_chooses_as_an_h200() -> None:
    assert dataclasses.replace(H200, processors=2) == INTERPRETER
    assert (INTERPRETER.warp_size, INTERPRETER.registers) == (32, 0)


def test_schedule_is_frozen() -> None:
    s = make_schedule((4, 3), 4, False, H200)
    with pytest.raises(AttributeError):
        s.splits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "shape", [(), (3,), (0, 3), (2, 3, 0)], ids=["scalar", "1d", "empty_batch", "empty_space"]
)
def test_shapes_without_values_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`shape`"):
        make_schedule(shape, 4, False, H200)
