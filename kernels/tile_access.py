"""One tile: where its elements are in memory, and the arithmetic of each element.

    z = (x - mean) * scale + shift + residual,  y = act(z),  g = dy * act'(z)

with scale = rstd * weight and shift = bias. All arithmetic is in fp32 and is rounded at the store.

Shapes: N batch, C channels, L flattened space; a channels-last tensor is (N * L, C, 1). In memory a
tensor is R rows of P positions: a row is a sample or several, and a position a place in it. A block
is a run of positions, and a tile is BLOCK_R rows of BLOCK_P positions of one block. A block lies in
one channel (CHANNELS is 1, and per-channel values are (1,)), or each of its positions has a channel
of its own, found once for all rows (per-channel values are (BLOCK_P,)). So no element needs a
division, and rows are read in vectors that may cross channels.

`mask_ptr` is the mask of the derivative, which a forward saves for its backward. The masks of loads
and stores are called `inside` for a tile and `mask_c` for channels.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, lines 3 and 4; the activations are
those of activations.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from bn_lightning.kernels.arguments import BackwardTensors, ChannelTensors, ForwardTensors
from bn_lightning.kernels.element import (
    apply_activation,
    choose_branch,
    multiply_derivative,
    multiply_derivative_of_output,
    on_upper_branch,
)
from bn_lightning.kernels.walk import Tiling


class Place(NamedTuple):
    """A tile of a block.

    Attributes:
        row: of tiles.
        column: of tiles; 0 where a block is one tile wide.
    """

    row: tl.tensor
    column: tl.tensor


class Units(NamedTuple):
    """Runs of neighbours in a tile, (BLOCK_R, BLOCK_P / width), all inside the tensor or none.

    Attributes:
        start: of the tile from the start of the tensor, in runs.
        offsets: of the runs from there.
        inside: whether each is part of the tensor.
    """

    start: tl.tensor
    offsets: tl.tensor
    inside: tl.tensor


class Tile(NamedTuple):
    """The elements of a tile, (BLOCK_R, BLOCK_P).

    Attributes:
        elements: each alone.
        pairs: two neighbours each, or one if ALIGN is 1.
        bytes: the offsets in the mask of the bytes with the bits of MASK_WIDTH neighbours each,
            (BLOCK_R, BLOCK_P / MASK_WIDTH).
        bits: of each byte the bit of the first of them, (1, BLOCK_P / MASK_WIDTH).
        bytes_inside: whether each first neighbour is part of the tensor.
    """

    elements: Units
    pairs: Units
    bytes: tl.tensor
    bits: tl.tensor
    bytes_inside: tl.tensor


class ChannelValues(NamedTuple):
    """The per-channel values that an element needs, fp32, (1,) or (BLOCK_P,).

    Attributes:
        mean: of the batch, or the running one.
        rstd: 1 / sqrt(var + eps).
        scale: rstd * weight.
        shift: bias.
    """

    mean: tl.tensor
    rstd: tl.tensor
    scale: tl.tensor
    shift: tl.tensor


@triton.jit
def _count_blocks(size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return size / BLOCK, rounded up; unlike in tl.cdiv, no intermediate exceeds `size`, >= 1."""
    return (size - 1) // BLOCK + 1


@triton.jit
def _lengths(tiling: Tiling, WIDTH: tl.constexpr = 1) -> tuple[tl.tensor, tl.tensor]:
    """Return the positions of a row and of a block, as multiples of ALIGN for the compiler.

    They are in units of WIDTH, which divides ALIGN.
    """
    P, span = tiling.P, tiling.span
    if tiling.WIDE:
        # Before the multiplication.
        P = tl.cast(P, tl.int64)
        span = tl.cast(span, tl.int64)
    return P * (tiling.ALIGN // WIDTH), span * (tiling.ALIGN // WIDTH)


@triton.jit
def _tiles_of_row(tiling: Tiling) -> tl.tensor:
    """Return how many tiles wide a block is; one in which channels differ is one tile wide."""
    if tiling.CHANNELS == 1:
        _, span = _lengths(tiling)
        return _count_blocks(span, tiling.BLOCK_P)
    else:
        return 1


@triton.jit
def count_tiles(tiling: Tiling) -> tl.tensor:
    """Return the number of tiles of a block."""
    return _count_blocks(tiling.R, tiling.BLOCK_R) * _tiles_of_row(tiling)


@triton.jit
def tiles_of_split(
    split: tl.tensor, tiles_per_split: tl.tensor, tiling: Tiling
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first tile of a split, and the tile after its last one."""
    first = split * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, count_tiles(tiling))


@triton.jit
def count_blocks(tiling: Tiling) -> tl.tensor:
    """Return the number of blocks of a row."""
    return (tiling.P - 1) // tiling.span + 1


@triton.jit
def find_place(number: tl.tensor, tiling: Tiling) -> Place:
    """Return the place of a tile, counted row by row."""
    tiles = _tiles_of_row(tiling)
    if tiling.WIDE:
        # The last tile may reach beyond 2^31.
        number = tl.cast(number, tl.int64)
    return Place(number // tiles, number % tiles)


@triton.jit
def next_place(place: Place, tiling: Tiling) -> Place:
    """Return the place after another one, without a division."""
    if tiling.CHANNELS == 1:
        column = place.column + 1
        ends = column == _tiles_of_row(tiling)
        return Place(place.row + tl.where(ends, 1, 0), tl.where(ends, 0, column))
    else:
        return Place(place.row + 1, place.column)


@triton.jit
def previous_place(place: Place, tiling: Tiling) -> Place:
    """Return the place before another one, without a division."""
    if tiling.CHANNELS == 1:
        begins = place.column == 0
        column = tl.where(begins, _tiles_of_row(tiling), place.column) - 1
        return Place(place.row - tl.where(begins, 1, 0), column)
    else:
        return Place(place.row - 1, place.column)


@triton.jit
def _count_before(number: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Return how many values a channel has in the tiles before one."""
    place = find_place(number, tiling)
    rows = tl.minimum(place.row * tiling.BLOCK_R, tiling.R)
    if tiling.CHANNELS == 1:
        _, span = _lengths(tiling)
        column = tl.minimum(place.column * tiling.BLOCK_P, span)
        return rows * span + tl.minimum(tiling.R - rows, tiling.BLOCK_R) * column
    else:
        return rows * tiling.L


@triton.jit
def count_values(first: tl.tensor, end: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Return how many values a channel has in the tiles from `first` to `end`."""
    return (_count_before(end, tiling) - _count_before(first, tiling)).to(tl.float32)


@triton.jit
def _locate_units(place: Place, block: tl.tensor, tiling: Tiling, WIDTH: tl.constexpr) -> Units:
    """Return the runs of WIDTH neighbours of a tile; WIDTH divides ALIGN and BLOCK_P."""
    P, span = _lengths(tiling, WIDTH)
    row = place.row * tiling.BLOCK_R
    column = place.column * (tiling.BLOCK_P // WIDTH)
    first = block * span
    offs_r = tl.arange(0, tiling.BLOCK_R)[:, None]
    offs_p = tl.arange(0, tiling.BLOCK_P // WIDTH)[None, :]
    start = row * P + (first + column)
    offsets = offs_r * P + offs_p
    # Two comparisons, from which the compiler sees that neighbours are inside together.
    inside = (row + offs_r < tiling.R) & (column + offs_p < span) & (first + column + offs_p < P)
    if tiling.RAGGED:
        # Some samples of the last row are beyond the end.
        numel = tl.cast(tiling.numel, tl.int64) if tiling.WIDE else tiling.numel
        inside = inside & (start + offsets < numel * (tiling.ALIGN // WIDTH))
    return Units(start, offsets, inside)


@triton.jit
def locate_tile(place: Place, block: tl.tensor, tiling: Tiling) -> Tile:
    """Return the elements of a tile."""
    elements = _locate_units(place, block, tiling, 1)
    pairs = elements
    if tiling.ALIGN > 1:
        pairs = _locate_units(place, block, tiling, 2)
    P, span = _lengths(tiling)
    row = place.row * tiling.BLOCK_R
    column = place.column * tiling.BLOCK_P
    first = block * span
    offs_r = tl.arange(0, tiling.BLOCK_R)[:, None]
    offs_g = tl.arange(0, tiling.BLOCK_P // tiling.MASK_WIDTH)[None, :] * tiling.MASK_WIDTH
    inside = (row + offs_r < tiling.R) & (column + offs_g < span) & (first + column + offs_g < P)
    if tiling.RAGGED:
        numel = tl.cast(tiling.numel, tl.int64) if tiling.WIDE else tiling.numel
        inside = inside & (elements.start + offs_r * P + offs_g < numel * tiling.ALIGN)
    # A row of the mask begins with a byte of its own.
    mask_P = (P + 7) >> 3
    if tiling.MASK_WIDTH == 8:
        bytes = row * mask_P + ((first + column) >> 3) + (offs_r * mask_P + (offs_g >> 3))
    else:
        bytes = (row + offs_r) * mask_P + ((first + column + offs_g) >> 3)
    bits = ((first + column + offs_g) & 7).to(tl.int32)
    return Tile(elements, pairs, bytes, bits, inside)


@triton.jit
def locate_columns(block: tl.tensor, tiling: Tiling) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the channel of each position of a block, and whether it is inside and a first one.

    A first one is the first element of its channel in the tensor. All are (1,) or (BLOCK_P,).
    """
    if tiling.CHANNELS == 1:
        channel = block + tl.arange(0, 1)
        inside = channel < tiling.C
        return channel, inside, inside
    else:
        P, span = _lengths(tiling)
        offs_p = tl.arange(0, tiling.BLOCK_P)
        position = block * span + offs_p
        inside = (offs_p < span) & (position < P)
        channel = position // tiling.L
        is_first = inside & (channel < tiling.C) & (position == channel * tiling.L)
        if tiling.WRAPS:
            channel = channel % tiling.C
        return channel, inside, is_first


@triton.jit
def locate_channels(block: tl.tensor, tiling: Tiling) -> tuple[tl.tensor, tl.tensor]:
    """Return the channels of a block of GROUP channels, and whether each is inside, (CHANNELS,)."""
    number = tl.arange(0, tiling.CHANNELS)
    offs_c = block * tiling.GROUP + number
    return offs_c, (number < tiling.GROUP) & (offs_c < tiling.C)


@triton.jit
def sum_channels(values: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Sum a tile to (CHANNELS,)."""
    if tiling.CHANNELS == 1:
        return tl.sum(values.reshape((1, tiling.BLOCK_R * tiling.BLOCK_P)), axis=1)
    else:
        return sum_positions(tl.sum(values, axis=0), tiling)


@triton.jit
def sum_positions(sums_P: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Sum (BLOCK_P,) to (CHANNELS,), of which there are several."""
    if tiling.CHANNELS == tiling.BLOCK_P:
        return sums_P
    else:
        # Adds nothing but zeros to the values of a channel, and no other channel's NaN.
        owner = tl.arange(0, tiling.BLOCK_P) // tiling.L
        is_own = tl.arange(0, tiling.CHANNELS)[:, None] == owner[None, :]
        return tl.sum(tl.where(is_own, sums_P[None, :], 0.0), axis=1)


@triton.jit
def pick_channels(value_P: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Return the value at the first position of each channel, (CHANNELS,), of (BLOCK_P,)."""
    if tiling.CHANNELS == tiling.BLOCK_P:
        return value_P
    else:
        first = tl.arange(0, tiling.CHANNELS) * tiling.L
        return tl.gather(value_P, tl.minimum(first, tiling.BLOCK_P - 1), 0)


@triton.jit
def spread_channels(value_C: tl.tensor, tiling: Tiling) -> tl.tensor:
    """Return the value of each position's channel, (1,) or (BLOCK_P,), from (CHANNELS,)."""
    if tiling.CHANNELS == 1 or tiling.CHANNELS == tiling.BLOCK_P:
        return value_C
    else:
        owner = tl.arange(0, tiling.BLOCK_P) // tiling.L
        return tl.gather(value_C, tl.minimum(owner, tiling.CHANNELS - 1), 0)


@triton.jit
def load_channels(tensors: ChannelTensors, offs_c: tl.tensor, mask_c: tl.tensor) -> ChannelValues:
    """Load the values of some channels."""
    mean = tl.load(tensors.mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(tensors.rstd_ptr + offs_c, mask=mask_c, other=0.0)
    return make_channels(mean, rstd, tensors, offs_c, mask_c)


@triton.jit
def make_channels(
    mean: tl.tensor,
    rstd: tl.tensor,
    tensors: ChannelTensors,
    offs_c: tl.tensor,
    mask_c: tl.tensor,
) -> ChannelValues:
    """Load weight and bias, and put them together with the mean and rstd at hand."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if tensors.weight_ptr is not None:
        weight = tl.load(tensors.weight_ptr + offs_c, mask=mask_c, other=0.0)
        scale = rstd * weight.to(tl.float32)
    if tensors.bias_ptr is not None:
        shift = tl.load(tensors.bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return ChannelValues(mean, rstd, scale, shift)


@triton.jit
def load_tile(ptr: tl.tensor, tile: Tile, EVICTION: tl.constexpr) -> tl.tensor:
    """Load the elements of a tile in fp32, with 0 outside the tensor."""
    HAS_PAIRS: tl.constexpr = tile.pairs.offsets.shape != tile.elements.offsets.shape
    if ptr.dtype.element_ty == tl.bfloat16 and HAS_PAIRS:
        # Two instructions make a pair fp32; of single elements three.
        pair_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tile.pairs.start
        pairs = tl.load(
            pair_ptr + tile.pairs.offsets,
            mask=tile.pairs.inside,
            other=0,
            eviction_policy=EVICTION,
        )
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(tile.elements.offsets.shape)
    else:
        return tl.load(
            ptr + tile.elements.start + tile.elements.offsets,
            mask=tile.elements.inside,
            other=0.0,
            eviction_policy=EVICTION,
        ).to(tl.float32)


@triton.jit
def clear_outside(values: tl.tensor, ptr: tl.tensor, tile: Tile) -> tl.tensor:
    """Return values of a tile that was loaded from `ptr`, with 0 outside the tensor."""
    HAS_PAIRS: tl.constexpr = tile.pairs.offsets.shape != tile.elements.offsets.shape
    if ptr.dtype.element_ty == tl.bfloat16 and HAS_PAIRS:
        # The comparisons of the load.
        inside = tl.join(tile.pairs.inside, tile.pairs.inside).reshape(values.shape)
        return tl.where(inside, values, 0.0)
    else:
        return tl.where(tile.elements.inside, values, 0.0)


@triton.jit
def store_tile(ptr: tl.tensor, tile: Tile, values: tl.tensor) -> None:
    """Store the elements of a tile that are inside the tensor."""
    elements = tile.elements
    tl.store(ptr + elements.start + elements.offsets, values, mask=elements.inside)


@triton.jit
def write_output(
    x: tl.tensor, channels: ChannelValues, tensors: ForwardTensors, tile: Tile
) -> None:
    """Store y and, if there is a `mask_ptr`, the mask of the derivative.

    Bit i of byte b of a row of the mask belongs to position 8 b + i of that row of the tensor. A
    tile that writes it has all bits of each byte.
    """
    shift = channels.shift[None, :]
    if tensors.residual_ptr is not None:
        shift += load_tile(tensors.residual_ptr, tile, "evict_first")
    z = tl.fma(x - channels.mean[None, :], channels.scale[None, :], shift)
    store_tile(tensors.y_ptr, tile, apply_activation(z, tensors.negative_slope, tensors.ACTIVATION))
    if tensors.mask_ptr is not None:
        upper = on_upper_branch(z, tensors.ACTIVATION) & tile.elements.inside
        WIDTH: tl.constexpr = tile.elements.offsets.shape[1] // tile.bytes.shape[1]
        each = upper.to(tl.int32).reshape((z.shape[0], z.shape[1] // WIDTH, WIDTH))
        packed = tl.sum(each << tl.arange(0, WIDTH)[None, None, :], axis=2).to(tl.uint8)
        tl.store(tensors.mask_ptr + tile.bytes, packed, mask=tile.bytes_inside)


@triton.jit
def _load_mask(mask_ptr: tl.tensor, tile: Tile) -> tl.tensor:
    """Load the bits of the mask that belong to a tile, as int32."""
    byte = tl.load(mask_ptr + tile.bytes, mask=tile.bytes_inside, other=0).to(tl.int32)
    WIDTH: tl.constexpr = tile.elements.offsets.shape[1] // tile.bytes.shape[1]
    if WIDTH < 8:
        byte = byte >> tile.bits
    bits = byte[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]
    return bits.reshape(tile.elements.offsets.shape) & 1


@triton.jit
def load_gradient(
    deviation: tl.tensor,  # fp32, x - mean in the unit of `channels.scale`; not used without z
    channels: ChannelValues,
    tensors: BackwardTensors,
    tile: Tile,
    EVICTION: tl.constexpr,
) -> tl.tensor:
    """Load dy and return g = dy * act'(z), from the mask, else from y, else from z."""
    dy = load_tile(tensors.dy_ptr, tile, EVICTION)
    if tensors.ACTIVATION == "identity":
        return dy
    elif tensors.mask_ptr is not None:
        upper = _load_mask(tensors.mask_ptr, tile) != 0
        return choose_branch(dy, upper, tensors.negative_slope, tensors.ACTIVATION)
    elif tensors.y_ptr is not None:
        y = load_tile(tensors.y_ptr, tile, EVICTION)
        return multiply_derivative_of_output(dy, y, tensors.ACTIVATION)
    else:
        shift = channels.shift[None, :]
        if tensors.residual_ptr is not None:
            shift += load_tile(tensors.residual_ptr, tile, EVICTION)
        z = tl.fma(deviation, channels.scale[None, :], shift)
        return multiply_derivative(dy, z, tensors.negative_slope, tensors.ACTIVATION)
