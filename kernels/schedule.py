"""Choose regime, tiles, splits and warps from shape, dtype, layout and device, by pure functions.

Shapes: N batch, C channels, L flattened space, M = N * L values per channel. A channels-last tensor
is (N * L, C, 1): its channels are neighbours in memory, as those of a plain (N, C) are.

Three regimes:

    single_launch  one launch forward, one backward; a program does all the work for its channels.
                   For tensors whose channels fit the L2 cache while programs work on them.
    two_pass       two passes over the tensor and a small kernel between; the second pass goes
                   backwards, so it starts with what the first left in the cache.
    persistent     one launch of programs that take work items one after another; each element is
                   read from memory once (persistent.py).

A reduction goes through tiles of N x C x L, and a split is the run of tiles of one program. The
elementwise pass of `two_pass` goes through memory in order.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

# The sizes below are derived from the hardware. None has been measured on a GPU.

# 16 values of each tensor for each thread: enough loads in flight, and no spill with the two
# tensors and two accumulators of the backward.
TILE_ELEMENTS = 4096
# The elementwise pass has no loop, so half of that leaves registers for twice the warps.
FLAT_ELEMENTS = 2048
MAX_THREADS = 256
# One cache line: narrower rows waste bandwidth, wider ones leave fewer programs across C.
ROW_BYTES = 128
# The share of a row of L that may be padding before a narrower tile is taken.
MAX_PADDING = 1 / 8
# Programs for each multiprocessor: of a reduction, and those that run at once in `persistent` and
# `single_launch`.
PROGRAMS_PER_PROCESSOR = 8
PROGRAMS_AT_WORK = 2
# The finishing kernels load all splits of some channels at once, so their order is fixed.
MAX_SPLITS = 256
FINISH_ELEMENTS = 2048
# Below this a launch costs more than the traffic: 1 MB takes 0.5 us at an H200's 4.3 TB/s, and a
# launch about 3 us.
SINGLE_LAUNCH_BYTES = 1 << 20
# The share of L2 for data that will be read again; the rest is for data read or written once.
CACHE_SHARE = 0.5
# Bytes that one item of `persistent` reads: many for the cost of a ticket, few for the L2 cache.
PERSISTENT_ITEM_BYTES = 1 << 15


class Regime(Enum):
    """How a BatchNorm is divided into launches; see the module's docstring."""

    SINGLE_LAUNCH = "single_launch"
    TWO_PASS = "two_pass"
    PERSISTENT = "persistent"


@dataclass(frozen=True)
class Device:
    """The properties of a device that the schedule depends on.

    Attributes:
        processors: number of multiprocessors or compute units.
        cache_bytes: size of the L2 cache.
        warp_size: threads in a warp: 32, or 64 in AMD's wavefronts.
        registers: 32-bit registers of a processor; 0 if no limit can be set (AMD).
    """

    processors: int
    cache_bytes: int
    warp_size: int = 32
    registers: int = 0


# For the interpreter: few programs, because it is slow, and an H200's cache.
INTERPRETER = Device(processors=2, cache_bytes=50 << 20)


@dataclass(frozen=True)
class Schedule:
    """How the kernels divide a tensor.

    Attributes:
        regime: which kernels run.
        N: samples; N * L of the tensor if it is channels-last.
        C: channels.
        L: positions in space; 1 if the tensor is channels-last.
        block_n: samples in a tile, a power of two like the other two.
        block_c: channels in a tile.
        block_l: positions in a tile.
        num_warps: of a program that goes through tiles.
        splits: programs or items that share a block of channels, in [1, MAX_SPLITS].
        tiles_per_split: consecutive tiles of a split.
        lag: of `persistent`: blocks of channels between the two readings of a block.
        programs: of `persistent`.
        wide: whether a position in a tile may exceed 2^31, in or beyond the tensor.
        max_warps: of any program; a thread then has at least 16 bytes of a 16-bit dtype.
        max_registers: of a thread that goes through tiles; None for the compiler's choice.
    """

    regime: Regime
    N: int
    C: int
    L: int
    block_n: int
    block_c: int
    block_l: int
    num_warps: int
    splits: int
    tiles_per_split: int
    lag: int
    programs: int
    wide: bool
    max_warps: int
    max_registers: int | None

    @property
    def values_per_channel(self) -> int:
        """M = N * L."""
        return self.N * self.L

    @property
    def eights(self) -> str:
        """Channels of eight neighbours from a multiple of 8 on: "one", "consecutive" or "any"."""
        if (self.C if self.L == 1 else self.L) % 8:
            return "any"
        return "consecutive" if self.L == 1 else "one"

    @property
    def channel_blocks(self) -> int:
        """Number of blocks of `block_c` channels."""
        return cdiv(self.C, self.block_c)

    @property
    def finish_tile(self) -> tuple[int, int]:
        """(splits, channels) of a tile of the kernels that combine the splits; all splits fit."""
        block_s = _next_power_of_2(self.splits)
        return block_s, min(FINISH_ELEMENTS // block_s, _next_power_of_2(self.C))

    @property
    def flat_elements(self) -> int:
        """Elements of a program of the elementwise pass."""
        return min(FLAT_ELEMENTS, max(8, _next_power_of_2(self.N * self.C * self.L)))

    @property
    def flat_grid(self) -> tuple[int]:
        """Programs of the elementwise pass."""
        return (cdiv(self.N * self.C * self.L, self.flat_elements),)

    @property
    def flat_warps(self) -> int:
        """Warps of a program of the elementwise pass."""
        return max(1, self.flat_elements * self.max_warps // FLAT_ELEMENTS)

    @functools.cached_property
    def tiling(self) -> "Tiling":
        """The argument of kernels that go through tiles."""
        blocks = (self.block_n, self.block_c, self.block_l, self.wide)
        return Tiling(self.N, self.C, self.L, *map(as_constexpr, blocks))

    @functools.cached_property
    def flat(self) -> "Flat":
        """The argument of kernels of the elementwise pass."""
        constants = map(as_constexpr, (self.flat_elements, self.eights))
        return Flat(self.N * self.C * self.L, self.C, self.L, *constants)

    @functools.cached_property
    def walk_options(self) -> dict[str, int]:
        """Launch options of kernels that go through tiles."""
        # Not every backend accepts `maxnreg`.
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return limit | {"num_warps": self.num_warps}


class Tiling(NamedTuple):
    """The shape of a tensor and of its tiles.

    Attributes:
        N: samples.
        C: channels.
        L: positions in space.
        BLOCK_N: samples in a tile, constexpr like all that follow.
        BLOCK_C: channels in a tile.
        BLOCK_L: positions in a tile.
        WIDE: whether a position in a tile may exceed 2^31, in or beyond the tensor.
    """

    N: Any
    C: Any
    L: Any
    BLOCK_N: Any
    BLOCK_C: Any
    BLOCK_L: Any
    WIDE: Any


class Flat(NamedTuple):
    """The shape of a tensor whose elements are taken in the order of memory.

    Attributes:
        numel: N * C * L.
        C: channels.
        L: positions in space.
        BLOCK: elements of a program, constexpr like the next.
        EIGHTS: channels of eight neighbours, see `Schedule.eights`.
    """

    numel: Any
    C: Any
    L: Any
    BLOCK: Any
    EIGHTS: Any


@functools.lru_cache(maxsize=None, typed=True)
def as_constexpr(value: bool | int | str) -> Any:
    """Mark a value inside a NamedTuple as a constant of the kernel it is passed to."""
    # Imported here, because this module is also used where Triton is not installed.
    from triton.language import constexpr

    return constexpr(value)


def flatten(shape: Sequence[int], channels_last: bool) -> tuple[int, int, int]:
    """Return (N, C, L) in memory; a channels-last tensor is (N * L, C, 1).

    Raises:
        ValueError: fewer than two dimensions, or a dimension below 1.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"expected `shape` to be (N, C) or (N, C, ...) without a 0, got {tuple(shape)}; leave "
            f"empty tensors to ATen"
        )
    N, C, L = shape[0], shape[1], math.prod(shape[2:])
    return (N * L, C, 1) if channels_last else (N, C, L)


_forced: Regime | None = None


@contextlib.contextmanager
def forced_regime(regime: Regime) -> Iterator[None]:
    """Run every BatchNorm inside in `regime`, in all threads; for tests and benchmarks.

    Two cases still run in `two_pass`: a mask whose groups of eight neighbours in memory may belong
    to different rows, and `single_launch` with a cumulative average.
    """
    global _forced
    before, _forced = _forced, regime
    try:
        yield
    finally:
        _forced = before


def forced() -> Regime | None:
    """Return the regime of the innermost `forced_regime`, or None outside."""
    return _forced


def make_schedule(
    shape: Sequence[int],
    itemsize: int,
    channels_last: bool,
    device: Device,
    *,
    writes_mask: bool = False,
    cumulative: bool = False,
    measured: Regime | None = None,
) -> Schedule:
    """Choose regime, tiles and splits for a dense tensor that is not empty.

    `persistent` is used only where it was measured to be best, and inside `forced_regime`.

    Args:
        shape: (N, C) or (N, C, ...).
        itemsize: bytes of an element.
        channels_last: whether the channels are neighbours in memory.
        device: on which the kernels run.
        writes_mask: whether the forward writes the mask of the derivative.
        cumulative: whether `momentum` is None in training.
        measured: the best regime by measurement, which `forced_regime` overrides; None if none is.

    Returns:
        The schedule.

    Raises:
        ValueError: fewer than two dimensions, or a dimension below 1.
    """
    return _make_schedule(
        tuple(shape),
        itemsize,
        channels_last,
        device,
        writes_mask=writes_mask,
        cumulative=cumulative,
        chosen=_forced or measured,
    )


@functools.lru_cache(maxsize=4096)
def _make_schedule(
    shape: tuple[int, ...],
    itemsize: int,
    channels_last: bool,
    device: Device,
    *,
    writes_mask: bool,
    cumulative: bool,
    chosen: Regime | None,
) -> Schedule:
    N, C, L = flatten(shape, channels_last)
    regime = chosen or choose_regime(N, C, L, itemsize, device)
    if writes_mask and (C if L == 1 else L) % 8:
        # Eight neighbours must belong to one row, or two programs would write the same byte.
        regime = Regime.TWO_PASS
    if cumulative and regime is Regime.SINGLE_LAUNCH:
        # Its programs would read the number of batches while one of them writes it.
        regime = Regime.TWO_PASS

    # One launch needs the registers of both passes. If rows of channels start at any address, a
    # thread loads single values and keeps their addresses. Half the values leave room for either.
    halved = regime is not Regime.TWO_PASS or (L == 1 and C % 16 != 0)
    tile_elements = TILE_ELEMENTS // 2 if halved else TILE_ELEMENTS
    block_l = min(_columns(L), tile_elements)
    row = max(1, ROW_BYTES // itemsize // block_l)
    block_c = min(_next_power_of_2(C), row)
    if regime is Regime.SINGLE_LAUNCH and N * L * block_c < tile_elements:
        # Several channels for each program, as many as fit a tile, if enough programs are left.
        room = tile_elements // (_next_power_of_2(N) * block_l)
        share = 1 << max(0, (C // device.processors).bit_length() - 1)
        block_c = max(block_c, min(room, share, _next_power_of_2(C)))
    block_n = min(_next_power_of_2(N), max(1, tile_elements // (block_c * block_l)))
    elements = block_n * block_c * block_l
    max_warps = MAX_THREADS // device.warp_size
    tiles = cdiv(N, block_n) * cdiv(L, block_l)

    blocks = cdiv(C, block_c)
    if regime is Regime.SINGLE_LAUNCH:
        splits = 1
    elif regime is Regime.PERSISTENT:
        # One item of a group combines all splits of its channels.
        splits = min(
            tiles * elements * itemsize // PERSISTENT_ITEM_BYTES, FINISH_ELEMENTS // block_c
        )
    else:
        splits = cdiv(PROGRAMS_PER_PROCESSOR * device.processors, blocks)
    tiles_per_split = cdiv(tiles, max(1, min(splits, tiles, MAX_SPLITS)))
    # Counted again, so that no split is empty.
    splits = cdiv(tiles, tiles_per_split)
    programs = min(PROGRAMS_AT_WORK * device.processors, blocks * splits)
    max_registers = None
    if regime is Regime.PERSISTENT and device.registers:
        # Without the limit ptxas saves registers for programs that do not exist, and spills some.
        max_registers = device.registers // (PROGRAMS_AT_WORK * MAX_THREADS)
    return Schedule(
        regime=regime,
        N=N,
        C=C,
        L=L,
        block_n=block_n,
        block_c=block_c,
        block_l=block_l,
        num_warps=max(1, elements * max_warps // tile_elements),
        splits=splits,
        tiles_per_split=tiles_per_split,
        # Large enough that an item of the second reading finds the items it waits for finished.
        lag=cdiv(programs, splits) + 1,
        programs=programs,
        wide=N * C * L + TILE_ELEMENTS > 1 << 31,
        max_warps=max_warps,
        max_registers=max_registers,
    )


def choose_regime(N: int, C: int, L: int, itemsize: int, device: Device) -> Regime:
    """Choose `single_launch` if one launch is enough, else `two_pass`.

    One launch is enough for tensors below `SINGLE_LAUNCH_BYTES`, and for those with a channel for
    each program and channels so short that what the programs read twice fits `CACHE_SHARE` of L2.
    """
    if N * C * L * itemsize <= SINGLE_LAUNCH_BYTES:
        return Regime.SINGLE_LAUNCH
    channels = max(1, ROW_BYTES // itemsize) if L == 1 else 1
    at_work = PROGRAMS_AT_WORK * device.processors
    in_flight = at_work * channels * N * L * itemsize
    if cdiv(C, channels) >= at_work and in_flight <= CACHE_SHARE * device.cache_bytes:
        return Regime.SINGLE_LAUNCH
    return Regime.TWO_PASS


def _columns(L: int) -> int:
    """Choose the positions in a tile: as many as possible without much padding."""
    widest = min(_next_power_of_2(L), TILE_ELEMENTS)
    columns = widest
    while columns > 64:
        if cdiv(L, columns) * columns - L <= MAX_PADDING * L:
            return columns
        columns //= 2
    return columns if cdiv(L, columns) * columns - L <= MAX_PADDING * L else min(widest, 256)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; `triton.cdiv` takes over 1 us at every launch."""
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
