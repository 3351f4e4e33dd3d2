"""What the order of tickets of `persistent` reads from memory, on a model of the L2 cache.

The model knows tiles. Programs take items in the order of tickets, and work through the tiles of an
item in time units with jitter. The cache holds whole tiles and evicts the least recently used, but
those first that were read for the last time, and are marked so. One half of the cache is left to
what else there is: residuals, the mask, and tiles that fall into the same sets.
"""

import heapq
import random
from collections import OrderedDict
from typing import NamedTuple

import pytest

from bn_lightning.kernels.schedule import (
    CACHE_SHARE,
    Device,
    Regime,
    Schedule,
    forced_regime,
    make_schedule,
)

H200 = Device(processors=132, cache_bytes=50 << 20)
# Time for the tile of one tensor: read from memory, read from the cache, written.
READ, READ_AGAIN, WRITE = 1.0, 0.6, 1.0
JITTER = 0.2

# Tensor, group, split and number of a tile.
Key = tuple[str, int, int, int]


class Cache:
    """Tiles in the order of their last use.

    Args:
        tiles: that fit.
    """

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        self.kept: OrderedDict[Key, None] = OrderedDict()
        self.first_victims: OrderedDict[Key, None] = OrderedDict()

    def use(self, key: Key, *, last_time: bool) -> bool:
        """Read or write a tile, and return whether it was there."""
        hit = key in self.kept or key in self.first_victims
        self.kept.pop(key, None)
        self.first_victims.pop(key, None)
        (self.first_victims if last_time else self.kept)[key] = None
        if len(self.kept) + len(self.first_victims) > self.tiles:
            (self.first_victims or self.kept).popitem(last=False)
        return hit


class Item(NamedTuple):
    """What a ticket stands for."""

    group: int
    split: int
    is_second: bool


class Result(NamedTuple):
    """What a launch costs.

    Attributes:
        reads: tiles read from memory, of those that must be.
        waits: share of the programs' time that they wait for flags.
    """

    reads: float
    waits: float


def _items(schedule: Schedule, lag: int) -> list[Item]:
    """Return the items in the order of tickets."""
    groups, S = schedule.reduction.blocks, schedule.splits
    items = []
    for step in range(groups + lag):
        if step < groups:
            items += [Item(step, split, False) for split in range(S)]
        if step >= lag:
            items += [Item(step - lag, split, True) for split in range(S)]
    return items


def _run(schedule: Schedule, inputs: tuple[str, ...], lag: int) -> Result:
    """Run the programs of a launch, each a tile at a time."""
    walk, rand = schedule.reduction, random.Random(1)
    tile_bytes = walk.block_r * walk.block_p * walk.shape.itemsize
    cache = Cache(int(CACHE_SHARE * H200.cache_bytes / tile_bytes))
    items = iter(_items(schedule, lag))
    left = [schedule.splits] * walk.blocks
    asleep: dict[int, list[tuple[float, int, Item]]] = {}
    ready = [(program * 1e-3, program) for program in range(schedule.programs)]
    working: dict[int, tuple[Item, int]] = {}
    misses, waited, end = 0, 0.0, 0.0
    while ready:
        now, program = heapq.heappop(ready)
        end = max(end, now)
        if program not in working:
            item = next(items, None)
            if item is None:
                continue
            tiles = min(walk.tiles_per_split, walk.tiles - item.split * walk.tiles_per_split)
            working[program] = item, tiles
            if item.is_second and left[item.group]:
                asleep.setdefault(item.group, []).append((now, program, item))
                continue
        item, tiles = working[program]
        # The second reading is backwards.
        total = min(walk.tiles_per_split, walk.tiles - item.split * walk.tiles_per_split)
        number = tiles - 1 if item.is_second else total - tiles
        spent = WRITE if item.is_second else 0.0
        for tensor in inputs:
            key = tensor, item.group, item.split, number
            hit = cache.use(key, last_time=item.is_second)
            misses += not hit
            spent += READ_AGAIN if hit else READ
        if item.is_second:
            cache.use(("written", item.group, item.split, number), last_time=False)
        now += spent * rand.uniform(1 - JITTER, 1 + JITTER)
        heapq.heappush(ready, (now, program))
        working[program] = item, tiles - 1
        if tiles == 1:
            del working[program]
            left[item.group] -= not item.is_second
            if left[item.group] == 0:
                for since, sleeper, _ in asleep.pop(item.group, ()):
                    waited += max(0.0, now - since)
                    heapq.heappush(ready, (max(now, since), sleeper))
    ideal = len(inputs) * walk.tiles * walk.blocks
    return Result(misses / ideal, waited / (end * schedule.programs))


# Of ResNet-50's widest, with fewer channels, and rows.
SHAPES = {
    "56x56": ((256, 24, 56, 56), False),
    "56x56_of_64": ((64, 48, 56, 56), False),
    "14x14": ((256, 256, 14, 14), False),
    "rows": ((16384, 1024), False),
}


@pytest.mark.parametrize("inputs", [("x",), ("x", "dy")], ids=["forward", "backward"])
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES.values(), ids=SHAPES.keys())
def test_each_element_is_read_from_memory_once(
    shape: tuple[int, ...], channels_last: bool, inputs: tuple[str, ...]
) -> None:
    with forced_regime(Regime.PERSISTENT):
        schedule = make_schedule(shape, 2, channels_last, H200)
    found = _run(schedule, inputs, schedule.lag)
    assert found.reads <= 1.08
    # The last items of a launch wait for each other.
    assert found.waits <= 0.05


def test_a_larger_lag_reads_more_and_a_smaller_one_waits() -> None:
    with forced_regime(Regime.PERSISTENT):
        schedule = make_schedule((256, 24, 56, 56), 2, False, H200)
    right = _run(schedule, ("x", "dy"), schedule.lag)
    assert _run(schedule, ("x", "dy"), 3 * schedule.lag).reads > right.reads + 0.1
    assert _run(schedule, ("x", "dy"), 1).waits > right.waits + 0.05
