"""How the programs of a launch go through a tensor: rows, blocks, tiles and splits.

In memory a tensor is rows of positions: a row is one sample, or several of them. A block is a run
of positions, whose programs share the rows; a tile is some rows of some positions of a block; a
split is the run of tiles of one program. Sizes are in elements.

Shapes: N batch, C channels, L flattened space; a channels-last tensor is (N * L, C, 1).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# More than a tile has.
MOST_ELEMENTS = 1 << 14


class Shape(NamedTuple):
    """The shape of a tensor in memory.

    Attributes:
        N: samples; N * L of the tensor if it is channels-last.
        C: channels.
        L: positions in space; 1 if the tensor is channels-last.
        itemsize: bytes of an element.
    """

    N: int
    C: int
    L: int
    itemsize: int

    @property
    def numel(self) -> int:
        """N * C * L."""
        return self.N * self.C * self.L


@dataclass(frozen=True)
class Walk:
    """How the programs of a launch go through a tensor: blocks of a row, times splits of all rows.

    Attributes:
        shape: of the tensor.
        samples: of a row.
        span: positions of a block.
        group: channels of a block, each in no other one; 0 if blocks cross channels.
        block_r: rows of a tile, a power of two.
        block_p: positions of a tile, a power of two.
        num_warps: of a program.
        stages: tiles that a reduction has in flight or at work.
        max_registers: of a thread; None for the compiler's choice.
        splits: programs or items that share a block.
        tiles_per_split: consecutive tiles of a split.
    """

    shape: Shape
    samples: int
    span: int
    group: int
    block_r: int
    block_p: int
    num_warps: int
    stages: int
    max_registers: int | None = None
    splits: int = 1
    tiles_per_split: int = 1

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return cdiv(self.shape.N, self.samples)

    @property
    def row(self) -> int:
        """Positions of a row."""
        return self.samples * self.shape.C * self.shape.L

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return cdiv(self.row, self.span)

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return cdiv(self.rows, self.block_r) * cdiv(self.span, self.block_p)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of a launch."""
        return self.blocks, self.splits

    @property
    def align(self) -> int:
        """The power of two, at most 8, that divides the offset where any run of a tile begins."""
        whole = (self.row, self.span) if self.blocks > 1 else (self.row,)
        ragged = (self.shape.numel,) if self.is_ragged else ()
        return math.gcd(8, self.block_p, *whole, *ragged)

    @property
    def is_ragged(self) -> bool:
        """Whether the last row has fewer samples."""
        return self.shape.N % self.samples != 0

    @property
    def mask_width(self) -> int:
        """The power of two, at most 8, of neighbours in a tile that have one byte of the mask."""
        return math.gcd(8, self.block_p, *((self.span,) if self.blocks > 1 else ()))

    @property
    def can_write_mask(self) -> bool:
        """Whether each byte of the mask belongs to one tile."""
        return self.mask_width == 8 or (self.blocks == 1 and self.row <= self.block_p < 8)

    def split(self, splits: int) -> "Walk":
        """Return the same with at most so many splits, none of which is empty."""
        tiles_per_split = cdiv(self.tiles, max(1, min(splits, self.tiles)))
        splits = cdiv(self.tiles, tiles_per_split)
        return replace(self, splits=splits, tiles_per_split=tiles_per_split)

    @functools.cached_property
    def tiling(self) -> "Tiling":
        """The argument of kernels."""
        numel, (_, C, L, _) = self.shape.numel, self.shape
        several = self.group != 1 and self.block_p > 1
        channels = 1 if not several else next_power_of_2(self.group) or self.block_p
        constants = (
            self.block_r,
            self.block_p,
            self.group,
            channels,
            self.align,
            self.stages,
            self.samples > 1,
            self.is_ragged,
            self.mask_width,
            numel + MOST_ELEMENTS > 1 << 31,
        )
        row, span = self.row // self.align, self.span // self.align
        return Tiling(
            self.rows, row, span, C, L, numel // self.align, *map(as_constexpr, constants)
        )

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options."""
        # Not every backend accepts `maxnreg`.
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return limit | {"num_warps": self.num_warps}


class Tiling(NamedTuple):
    """A tensor as rows of memory, and its tiles; see tile_access.py.

    Attributes:
        R: rows.
        P: positions of a row, in units of ALIGN.
        span: positions of a block, in units of ALIGN.
        C: channels.
        L: positions in space.
        numel: N * C * L, in units of ALIGN; used if RAGGED.
        BLOCK_R: rows of a tile, constexpr like all that follow.
        BLOCK_P: positions of a tile.
        GROUP: channels of a block of a reduction.
        CHANNELS: 1 if a block lies in one channel, else the power of two from GROUP on.
        ALIGN: the power of two, at most 8, that divides the offset where any run of a tile begins.
        STAGES: tiles that a reduction has in flight or at work.
        WRAPS: whether a row has several samples.
        RAGGED: whether the last row has fewer samples.
        MASK_WIDTH: neighbours in a tile that have one byte of the mask.
        WIDE: whether a position in a tile may exceed 2^31, in or beyond the tensor.
    """

    R: Any
    P: Any
    span: Any
    C: Any
    L: Any
    numel: Any
    BLOCK_R: Any
    BLOCK_P: Any
    GROUP: Any
    CHANNELS: Any
    ALIGN: Any
    STAGES: Any
    WRAPS: Any
    RAGGED: Any
    MASK_WIDTH: Any
    WIDE: Any


@functools.lru_cache(maxsize=None, typed=True)
def as_constexpr(value: bool | int | str) -> Any:
    """Mark a value inside a NamedTuple as a constant of the kernel it is passed to."""
    # Imported here, because this module is also used where Triton is not installed.
    from triton.language import constexpr

    return constexpr(value)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; `triton.cdiv` takes over 1 us at every launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the power of two from `n` on; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
