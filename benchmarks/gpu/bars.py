"""The bars of a day with a GPU: what was measured, beside what it should reach."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from batch_norm import resnet50
from gpu.regimes import AUTO, COMPILED, FUSIONS

from bn_lightning.kernels.cost import Machine, triton_is_cheaper
from bn_lightning.kernels.measurements import DTYPES, Fusion, Table, Tensors

# The device of rows that were timed without a GPU.
INTERPRETER_NAME = "interpreter"
LARGE_BYTES = 100e6
SHAPE_256 = [tuple(shape) for shape in resnet50(256)]


class Bar(NamedTuple):
    """What should be reached, and what was.

    Attributes:
        name: what is measured.
        limit: the figure to reach.
        is_most: whether the figure may be at most `limit`; else it must be at least that.
        figure: measured, or NaN without all the rows that it needs.
    """

    name: str
    limit: float
    is_most: bool
    figure: float

    @property
    def verdict(self) -> str:
        """Met, missed or not measured."""
        if math.isnan(self.figure):
            return "not measured"
        reached = self.figure <= self.limit if self.is_most else self.figure >= self.limit
        return "met" if reached else "missed"

    def columns(self) -> dict[str, str]:
        """Return the columns of a row."""
        return {
            "bar": self.name,
            "limit": f"{'at most' if self.is_most else 'at least'} {self.limit:g}",
            "figure": "" if math.isnan(self.figure) else f"{self.figure:.3g}",
            "verdict": self.verdict,
        }


class Day(NamedTuple):
    """What a day has measured.

    Attributes:
        machine: that has measured; without a GPU, what was timed counts for no bar.
        checks: rows of checks.py.
        host: rows of host_overhead.py.
        compared: rows of batch_norm.py.
        timed: rows of regimes.py, also those that the table does not take.
        table: of the rows that were timed.
    """

    machine: Machine
    checks: Sequence[dict[str, Any]]
    host: Sequence[dict[str, Any]]
    compared: Sequence[dict[str, Any]]
    timed: Sequence[dict[str, Any]]
    table: Table


def bars(day: Day) -> list[Bar]:
    """Return all bars."""
    wrong = sum(row["status"] != "ok" for row in day.checks) if day.checks else math.nan
    speeds = [
        Bar(
            "share of copy bandwidth, NCHW of 100 MB or more",
            0.85,
            False,
            _share_of_copy(day.compared),
        ),
        *_resnet(day),
        *_auto(day),
        *_host(day),
    ]
    if day.machine.name == INTERPRETER_NAME:
        speeds = [bar._replace(figure=math.nan) for bar in speeds]
    return [Bar("checks that failed", 0, True, wrong), *speeds]


def _share_of_copy(compared: Sequence[dict[str, Any]]) -> float:
    """Return the least share of a copy's bandwidth, over the forwards and backwards."""
    rates: dict[tuple[str, ...], dict[str, float]] = {}
    for row in compared:
        sizes = [int(size) for size in row["shape"].split("x")]
        large = math.prod(sizes) * DTYPES[row["dtype"]].itemsize >= LARGE_BYTES
        if large and row["layout"] == "contiguous" and row["direction"] in ("forward", "backward"):
            key = tuple(row[c] for c in ("shape", "dtype", "fusion", "direction"))
            if row["gb_per_s"]:
                rates.setdefault(key, {})[row["who"]] = float(row["gb_per_s"])
    found = [r for r in rates.values() if {"ours", "copy"} <= r.keys()]
    return min((r["ours"] / r["copy"] for r in found), default=math.nan)


def _fusion(name: str, training: bool = True) -> Fusion:
    return Fusion("identity" if name in ("bn", "bn_add") else "relu", "add" in name, training)


def _resnet(day: Day) -> Iterator[Bar]:
    """Compare the times on the device, summed over the shapes of ResNet-50 at batch 256."""
    compiled = {
        (row["shape"], row["layout"], row["fusion"]): float(row["device_us"])
        for row in day.timed
        if row["who"] == COMPILED and row["mode"] == "training"
    }
    for layout in ("contiguous", "channels_last"):
        for name, at_least in zip(FUSIONS, (1.4, 2.0, 2.0), strict=True):
            ours = theirs = inductors = 0.0
            for shape in SHAPE_256:
                tensors = Tensors(shape, torch.bfloat16, layout == "channels_last")
                eager, triton = day.table.find(day.machine.name, tensors, _fusion(name))
                ours += triton.device_us if triton else math.nan
                theirs += eager.device_us if eager else math.nan
                inductors += compiled.get(("x".join(map(str, shape)), layout, name), math.nan)
            what = f"ResNet-50, batch 256, bf16, {layout}, {name}: speed-up over"
            yield Bar(f"{what} eager", at_least, False, theirs / ours)
            yield Bar(f"{what} torch.compile", 1.3, False, inductors / ours)


def _auto(day: Day) -> Iterator[Bar]:
    """Compare `auto` with eager torch: as it was timed, and as it will choose by this table.

    On the device: the host's time of single calls decides nothing (kernels/cost.py).
    """
    keys = ("shape", "dtype", "layout", "fusion", "mode")
    timed = {
        tuple(row[c] for c in keys): float(row["device_us"])
        for row in day.timed
        if row["who"] == AUTO
    }
    now, then = [], []
    for key, auto_us in timed.items():
        shape, dtype, layout, name, mode = key
        sizes = tuple(map(int, shape.split("x")))
        tensors = Tensors(sizes, DTYPES[dtype], layout == "channels_last")
        fusion = _fusion(name, mode == "training")
        eager, triton = day.table.find(day.machine.name, tensors, fusion)
        if eager and triton:
            chosen = triton if triton_is_cheaper(tensors, fusion, day.machine, day.table) else eager
            now.append(eager.device_us / auto_us)
            then.append(eager.device_us / chosen.device_us)
    for what, ratios in (("as timed", now), ("by the new table", then)):
        what = f"auto, {what}: least speed-up over eager of {len(ratios)} cases"
        yield Bar(what, 1.0, False, min(ratios, default=math.nan))


def _host(day: Day) -> Iterator[Bar]:
    """Compare the host's times of tiny tensors; of fp32 and bf16 the larger share."""
    training = {"60x100": (1.15, 0.90, 0.75), "64x64x8x8": (1.15, 0.90, 0.75), "2x8": (1.4, 1.1)}
    limits = {
        (shape, "training", fusion): limit
        for shape, of_fusions in training.items()
        for fusion, limit in zip(FUSIONS, of_fusions, strict=False)
    }
    limits |= {(shape, "evaluation", "bn_relu"): 1.1 for shape in training}
    for key, limit in limits.items():
        ratios = [
            float(row["ratio"])
            for row in day.host
            if (row["shape"], row["mode"], row["fusion"]) == key
        ]
        name = f"host time, {', '.join(key)}: share of eager"
        yield Bar(name, limit, True, max(ratios, default=math.nan))
