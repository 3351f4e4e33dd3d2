"""Choose regime, tiles, splits and warps from shape, dtype, layout and device, by pure functions.

Shapes: N batch, C channels, L flattened space, M = N * L values per channel. A channels-last tensor
is (N * L, C, 1): its channels are neighbours in memory, as those of a plain (N, C) are.

Two regimes:

    single_launch  one launch forward, one backward; a program does all the work for its channels.
                   For tensors whose channels fit the L2 cache while programs work on them.
    two_pass       two passes over the tensor and a small kernel between; the second pass goes
                   backwards, so it starts with what the first left in the cache.

A reduction goes through the tiles of a block of channels, and a split is the run of tiles of one
program. The elementwise pass of `two_pass` has blocks of its own, which may cross channels.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from bn_lightning.kernels.walk import Shape, Walk, cdiv, next_power_of_2

# The sizes below are derived from the hardware; benchmarks/results/gpu_day has what they give.

# Bytes of a tensor in a tile: one load of 16 bytes for each thread in the elementwise pass, and two
# in a reduction, which has more to do for each tile.
ELEMENTWISE_BYTES = 4096
REDUCTION_BYTES = 8192
MAX_THREADS = 256
# One cache line: narrower rows waste bandwidth, wider ones leave fewer programs across C.
ROW_BYTES = 128
# What a thread can have, whatever there is for it.
MOST_REGISTERS = 255
# The most positions of a tile in which channels differ: each position's values are in registers.
MOST_COLUMNS = 1024
# The most elements that sum positions to channels, once for each split.
MOST_SUMMED = 8192
# The share of a row of L that may be padding before a narrower tile is taken.
MAX_PADDING = 1 / 8
# Programs of each multiprocessor that run at once, of kernels that reduce and of those that do not:
# as many as registers and loads in flight allow. At 4.3 TB/s 26 KB for each hide 0.8 us.
PROGRAMS_AT_WORK = 2
ELEMENTWISE_AT_WORK = 4
# Tiles that a reduction has in flight or at work, by asynchronous copies.
LOOP_STAGES = 3
# Splits of a block of channels: each costs the finishing kernel a row of partials.
MAX_SPLITS = 512
# Partials that are loaded at once.
FINISH_ELEMENTS = 2048
# Below this a launch costs more than the traffic: 1 MB takes 0.5 us at an H200's 4.3 TB/s, and a
# launch about 3 us.
SINGLE_LAUNCH_BYTES = 1 << 20


class Regime(Enum):
    """How a BatchNorm is divided into launches; see the module's docstring."""

    SINGLE_LAUNCH = "single_launch"
    TWO_PASS = "two_pass"


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
INTERPRETER = Device(processors=4, cache_bytes=50 << 20)


@dataclass(frozen=True)
class Schedule:
    """How the kernels divide a tensor.

    Attributes:
        regime: which kernels run.
        shape: of the tensor in memory.
        reduction: of kernels that reduce; in `single_launch` of all.
        elementwise: of kernels that do not.
    """

    regime: Regime
    shape: Shape
    reduction: Walk
    elementwise: Walk

    @property
    def C(self) -> int:
        """Channels."""
        return self.shape.C

    @property
    def splits(self) -> int:
        """Partials of a channel."""
        return self.reduction.splits

    @property
    def values_per_channel(self) -> int:
        """M = N * L."""
        return self.shape.N * self.shape.L

    @property
    def finish_tile(self) -> tuple[int, int]:
        """(splits, channels) of a tile of the kernels that combine the splits."""
        block_c = min(32, next_power_of_2(self.C))
        return min(FINISH_ELEMENTS // block_c, next_power_of_2(self.splits)), block_c


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

    Two cases still run in `two_pass`: a mask of whose bytes some belong to two blocks of channels
    however these are chosen, and `single_launch` with a cumulative average.
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
    reads_mask: bool = False,
    cumulative: bool = False,
    measured: Regime | None = None,
) -> Schedule:
    """Choose regime, tiles and splits for a dense tensor that is not empty.

    Args:
        shape: (N, C) or (N, C, ...).
        itemsize: bytes of an element.
        channels_last: whether the channels are neighbours in memory.
        device: on which the kernels run.
        writes_mask: whether the kernels of a forward write the mask of the derivative.
        reads_mask: whether the kernels of a backward read it.
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
        reads_mask=reads_mask,
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
    reads_mask: bool,
    cumulative: bool,
    chosen: Regime | None,
) -> Schedule:
    s = Shape(*flatten(shape, channels_last), itemsize)
    regime = chosen or choose_regime(*s, device)
    if cumulative and regime is Regime.SINGLE_LAUNCH:
        # Its programs would read the number of batches while one of them writes it.
        regime = Regime.TWO_PASS
    reduction = _reduction(s, regime, device, writes_mask=writes_mask)
    if writes_mask and not reduction.can_write_mask:
        # Two programs would write the same byte.
        regime = Regime.TWO_PASS
        reduction = _reduction(s, regime, device)
    elementwise = _elementwise(s, device, has_mask=writes_mask or reads_mask)
    elementwise = elementwise.split(
        _fill(elementwise, ELEMENTWISE_AT_WORK * device.processors, elementwise.tiles)
    )
    if regime is Regime.TWO_PASS:
        at_work = PROGRAMS_AT_WORK * device.processors
        reduction = reduction.split(_fill(reduction, at_work, MAX_SPLITS))
    return Schedule(regime=regime, shape=s, reduction=reduction, elementwise=elementwise)


def _reduction(s: Shape, regime: Regime, device: Device, *, writes_mask: bool = False) -> Walk:
    """Cut a tensor into blocks of whole channels."""
    # Of `two_pass` the elementwise pass writes it.
    writes_mask = writes_mask and regime is not Regime.TWO_PASS
    elements = REDUCTION_BYTES // s.itemsize
    most = s.C
    if regime is Regime.SINGLE_LAUNCH and s.numel * s.itemsize > SINGLE_LAUNCH_BYTES:
        # Where not even one fits, more lose nothing, and two are better aligned.
        most = _most_channels(s, device) or 2
    group, block_p = _group(s, most, writes_mask) if s.L > 1 else (s.C, 1)
    threads = MAX_THREADS
    if group > 1 and (regime is not Regime.TWO_PASS or s.L == 1):
        # The values of each position's channel are in registers, too. Half the threads have twice
        # the registers, and issue half of what is issued once for a tile.
        threads //= 2
    if s.L == 1:
        line = max(1, ROW_BYTES // s.itemsize)
        block_p = min(next_power_of_2(s.C), line)
        if s.C > line > 1 and -s.C % line - (-s.C % (line // 2)) > MAX_PADDING * s.C:
            # Less padding. Half a line is what DRAM moves at once.
            block_p //= 2
        if regime is Regime.SINGLE_LAUNCH and s.N * block_p < elements:
            # Several channels for each program, as many as fit a tile, if enough programs are left.
            room = elements // next_power_of_2(s.N)
            share = 1 << max(0, (s.C // device.processors).bit_length() - 1)
            block_p = max(block_p, min(room, share, next_power_of_2(s.C)))
        group = min(block_p, s.C)
    if s.C == 1:
        # One channel is one row.
        s = s._replace(N=1, L=s.N * s.L)
        block_p = _columns(s.L, elements)
    walk = _walk(s, device, elements, samples=1, span=group * s.L, group=group, block_p=block_p)
    walk = replace(walk, num_warps=max(1, walk.num_warps * threads // MAX_THREADS))
    # Without the limit ptxas saves registers for programs that do not exist, and spills some.
    limit = device.registers // (PROGRAMS_AT_WORK * threads) or None
    return replace(walk, max_registers=limit and min(limit, MOST_REGISTERS))


def _elementwise(s: Shape, device: Device, *, has_mask: bool) -> Walk:
    """Cut a tensor into blocks of one channel, or into any runs of 16 bytes and more."""
    elements = ELEMENTWISE_BYTES // s.itemsize
    if s.C == 1:
        s = s._replace(N=1, L=s.N * s.L)
    if s.C == 1 or (s.L % 8 == 0 and s.L * s.itemsize >= ROW_BYTES):
        block_p = max(8, _columns(s.L, elements))
        return _walk(s, device, elements, samples=1, span=s.L, group=1, block_p=block_p)
    row = s.C * s.L
    block_p = min(MOST_COLUMNS // 4, elements)
    samples = block_p // math.gcd(block_p, row)
    if has_mask and row % 8:
        # Each sample begins with a byte of its own.
        samples = 1
        block_p = min(block_p, max(8, next_power_of_2(row)))
    elif samples * 2 > s.N:
        # Rows without padding would be too few: only as long as a load needs.
        samples = min(8 // math.gcd(8, row), s.N)
        block_p = min(block_p, max(8, next_power_of_2(samples * row)))
    return _walk(s, device, elements, samples=samples, span=block_p, group=0, block_p=block_p)


def _walk(
    s: Shape, device: Device, elements: int, *, samples: int, span: int, group: int, block_p: int
) -> Walk:
    """Return a walk with tiles of so many elements, or as many as there are rows for."""
    rows = cdiv(s.N, samples)
    block_r = min(next_power_of_2(rows), max(1, elements // block_p))
    most_warps = MAX_THREADS // device.warp_size
    walk = Walk(
        shape=s,
        samples=samples,
        span=span,
        group=group,
        block_r=block_r,
        block_p=block_p,
        num_warps=max(1, block_r * block_p * most_warps // elements),
        # AMD's compiler would need more shared memory than there is.
        stages=LOOP_STAGES if device.warp_size == 32 else 1,
    )
    return walk.split(1)


def _fill(walk: Walk, resident: int, most: int) -> int:
    """Choose the number of splits with which full waves of programs take the least time."""
    choices = {1, most} | {wave * resident // walk.blocks for wave in range(1, 9)}

    def time(splits: int) -> int:
        # What a program does once costs about as much as a tile.
        return cdiv(walk.blocks * splits, resident) * (cdiv(walk.tiles, splits) + 1)

    return min((c for c in choices if 1 <= c <= most), key=lambda c: (time(c), c))


def _most_channels(s: Shape, device: Device) -> int:
    """Return of how many channels for each running program dy, x and dx fit L2.

    Then each element is read again before it has been the least recently used, although what is no
    longer needed is not marked for eviction.
    """
    channel = PROGRAMS_AT_WORK * device.processors * s.N * s.L * s.itemsize
    return device.cache_bytes // (3 * channel)


def choose_regime(N: int, C: int, L: int, itemsize: int, device: Device) -> Regime:
    """Choose `single_launch` if one launch is enough, else `two_pass`.

    One launch is enough for tensors below `SINGLE_LAUNCH_BYTES`, and for those with a block of
    channels for nearly each program, whose channels are so short that what the programs read and
    write fits L2, in blocks as wide as without this limit: 256x2048x7x7 in bf16, in blocks of 2
    channels and not of 8, took an H200 3.6 times as long as `two_pass`.
    """
    s = Shape(N, C, L, itemsize)
    if s.numel * s.itemsize <= SINGLE_LAUNCH_BYTES:
        return Regime.SINGLE_LAUNCH
    most = _most_channels(s, device)
    group = max(1, ROW_BYTES // s.itemsize)
    if s.L > 1:
        group, _ = _group(s, s.C, False)
    enough = PROGRAMS_AT_WORK * device.processors * 7 // 8
    if group <= most and cdiv(s.C, group) >= enough:
        return Regime.SINGLE_LAUNCH
    return Regime.TWO_PASS


@functools.lru_cache(maxsize=4096)
def _group(s: Shape, most: int, writes_mask: bool) -> tuple[int, int]:
    """Choose the channels of a block, at most `most`, and the positions of a tile, for L > 1.

    An element costs its arithmetic and its share of a load, in lanes of which some are padding, and
    a row shorter than a cache line costs a whole one. Several channels share a row where this makes
    it longer, better aligned or less padded. With a mask, a block begins with a byte, if any can.
    """

    def cost(choice: tuple[int, int]) -> float:
        group, block_p = choice
        if writes_mask and group < s.C and group * s.L % 8:
            return math.inf
        run = s.C * s.L if group == s.C else group * s.L
        filled = run / (cdiv(run, block_p) * block_p)
        line = 1.0 if group == s.C else min(1.0, run * s.itemsize / ROW_BYTES)
        return (1 + 1 / math.gcd(8, s.C * s.L, run)) / filled / line

    elements = REDUCTION_BYTES // s.itemsize
    choices = [(1, _columns(s.L, elements))]
    block_p = 8
    while block_p <= min(MOST_COLUMNS, elements):
        for group in range(2, min(s.C, most, block_p // s.L) + 1):
            if next_power_of_2(group) * block_p <= MOST_SUMMED:
                choices.append((group, block_p))
        block_p *= 2
    return min(choices, key=lambda choice: (cost(choice), choice))


def _columns(L: int, elements: int) -> int:
    """Choose the positions in a tile of one channel: many without much padding."""
    widest = min(next_power_of_2(L), elements)
    columns = widest
    while columns > 64:
        if cdiv(L, columns) * columns - L <= MAX_PADDING * L:
            return columns
        columns //= 2
    return columns if cdiv(L, columns) * columns - L <= MAX_PADDING * L else min(widest, 256)
