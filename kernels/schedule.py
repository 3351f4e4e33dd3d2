"""From a tensor's shape and element size to layout, tiles, splits and warps: pure functions.

Shapes: N batch, C channels, L flattened space, M = N * L values per channel.

Two layouts of memory. NCL: the L values of one sample and channel lie side by side, channels are
L apart. MC: channels lie side by side, as in a plain (N, C).

Two kinds of kernel. A reduction walks the values of a channel: its tile is samples x positions of
one channel (NCL) or values x channels (MC), and a split is the run of tiles one program walks. An
elementwise kernel has one tile a program: (sample, channel) rows x positions (NCL) or values x
channels (MC).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# The sizes below follow from the hardware; none has been tuned by measurement yet.

# A reduction holds 16 values of each tensor a thread: enough loads in flight, and no spill with the
# two tensors and two accumulators of the backward. An elementwise kernel has no loop to feed, and
# half of that leaves registers for twice the warps (72 instead of 149 for dx, bf16, sm_90).
REDUCTION_TILE_ELEMENTS = 4096
ELEMENTWISE_TILE_ELEMENTS = 2048
MAX_WARPS = 8
# One cache line: narrower rows waste bandwidth, wider ones leave fewer programs across C.
ROW_BYTES = 128
# Some eight programs for each of an H200's 132 multiprocessors.
TARGET_PROGRAMS = 1024
# The finishing kernels hold all splits of a channel at once, so that their order is fixed.
MAX_SPLITS = 256
FINISH_TILE_ELEMENTS = 2048


class Layout(Enum):
    """Which dimension of memory is contiguous: space (NCL) or channels (MC)."""

    NCL = "NCL"
    MC = "MC"


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time: rows x columns, both powers of two, and its warps."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Schedule:
    """How the kernels cut a tensor.

    Attributes:
        layout: which dimension is contiguous.
        N: samples.
        C: channels.
        L: positions in space; 1 where `layout` is MC.
        reduction: tile of the kernels that sum over a channel.
        elementwise: tile of the kernels that write a tensor.
        splits: programs that share a channel, in [1, MAX_SPLITS].
        tiles_per_split: consecutive tiles one of them walks.
    """

    layout: Layout
    N: int
    C: int
    L: int
    reduction: Tile
    elementwise: Tile
    splits: int
    tiles_per_split: int

    @property
    def values_per_channel(self) -> int:
        """M = N * L."""
        return self.N * self.L

    @property
    def reduction_grid(self) -> tuple[int, int]:
        """Programs of a reduction: (channels or blocks of them, splits)."""
        if self.layout is Layout.NCL:
            return self.C, self.splits
        return _cdiv(self.C, self.reduction.columns), self.splits

    @property
    def elementwise_grid(self) -> tuple[int]:
        """Programs of an elementwise kernel, in one dimension: the others end at 65535."""
        if self.layout is Layout.NCL:
            rows, columns = self.N * self.C, self.L
        else:
            rows, columns = self.N, self.C
        tile = self.elementwise
        return (_cdiv(rows, tile.rows) * _cdiv(columns, tile.columns),)

    @property
    def finish_tile(self) -> tuple[int, int]:
        """Tile of the kernels that combine the splits: all splits x some channels."""
        block_s = _next_power_of_2(self.splits)
        return block_s, min(FINISH_TILE_ELEMENTS // block_s, _next_power_of_2(self.C))


@functools.lru_cache(maxsize=1024)
def make_schedule(shape: Sequence[int], itemsize: int) -> Schedule:
    """Chooses layout, tiles and splits for a contiguous tensor that is not empty.

    Args:
        shape: (N, C) or (N, C, ...), hashable.
        itemsize: bytes of one element.

    Returns:
        The schedule; L is the product of what follows (N, C), and L = 1 makes the layout MC.

    Raises:
        ValueError: fewer than two dimensions, or a dimension below 1.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"expected `shape` to be (N, C) or (N, C, ...) and not empty, got {tuple(shape)}"
        )
    N, C, L = shape[0], shape[1], math.prod(shape[2:])
    if L == 1:
        columns = min(_next_power_of_2(C), ROW_BYTES // itemsize)
        reduction = _make_tile(N, columns, REDUCTION_TILE_ELEMENTS)
        elementwise = _make_tile(N, columns, ELEMENTWISE_TILE_ELEMENTS)
        tiles = _cdiv(N, reduction.rows)
        programs_across_C = _cdiv(C, columns)
        layout = Layout.MC
    else:
        columns = _next_power_of_2(L)
        reduction = _make_tile(N, columns, REDUCTION_TILE_ELEMENTS)
        elementwise = _make_tile(N * C, columns, ELEMENTWISE_TILE_ELEMENTS)
        tiles = _cdiv(N, reduction.rows) * _cdiv(L, reduction.columns)
        programs_across_C = C
        layout = Layout.NCL
    splits = max(1, min(tiles, MAX_SPLITS, _cdiv(TARGET_PROGRAMS, programs_across_C)))
    tiles_per_split = _cdiv(tiles, splits)
    return Schedule(
        layout=layout,
        N=N,
        C=C,
        L=L,
        reduction=reduction,
        elementwise=elementwise,
        # Counted anew, so that no split is empty.
        splits=_cdiv(tiles, tiles_per_split),
        tiles_per_split=tiles_per_split,
    )


def _make_tile(rows: int, columns: int, elements: int) -> Tile:
    """Makes a tile of at most `elements`, as wide as it may be; warps in proportion to its size."""
    columns = min(columns, elements)
    rows = min(_next_power_of_2(rows), elements // columns)
    num_warps = max(1, rows * columns * MAX_WARPS // elements)
    return Tile(rows=rows, columns=columns, num_warps=num_warps)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
