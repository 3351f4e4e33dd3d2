"""The table of measured BatchNorms, from which `backend="auto"` and the regime are chosen.

A CSV file with the columns `TABLE_COLUMNS`, a row for each contender: eager torch, or the Triton
kernels in one regime. `benchmarks/gpu_day.py` writes it. Without the file, or for a BatchNorm that
it lacks, cost.py counts.

    device     name of the GPU, as torch reports it
    shape      of x: "256x64x56x56"
    dtype      of x: "fp32", "fp16" or "bf16"
    layout     of x: "contiguous" or "channels_last"
    fusion     "bn", "bn_relu", "bn_add" or "bn_add_relu"; relu stands for every activation
    mode       "training", forward and backward; or "evaluation", a forward
    who        "eager" or a regime; evaluation has no regimes, so its rows have "two_pass"
    device_us  time on the device, microseconds
    host_us    time until the calls return, microseconds
    torch, triton, date, commit    the origin of the row
"""

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from bn_lightning.kernels.schedule import Regime

PATH = Path(__file__).with_name("measured.csv")
TABLE_COLUMNS = (
    "device",
    "shape",
    "dtype",
    "layout",
    "fusion",
    "mode",
    "who",
    "device_us",
    "host_us",
    "torch",
    "triton",
    "date",
    "commit",
)
EAGER = "eager"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WORDS = {
    "dtype": tuple(DTYPES),
    "layout": ("contiguous", "channels_last"),
    "fusion": ("bn", "bn_relu", "bn_add", "bn_add_relu"),
    "mode": ("training", "evaluation"),
    "who": (EAGER, *(regime.value for regime in Regime)),
}


class Tensors(NamedTuple):
    """The tensors that are normalized.

    Attributes:
        shape: of x, (N, C, ...).
        dtype: of x.
        channels_last: whether x is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool


class Fusion(NamedTuple):
    """What is computed.

    Attributes:
        activation: a key of `ACTIVATIONS`.
        has_residual: whether a residual is added before it.
        training: a forward and a backward in training, else a forward in evaluation.
    """

    activation: str
    has_residual: bool
    training: bool

    @property
    def name(self) -> str:
        """The name in the column `fusion`."""
        added = "_add" if self.has_residual else ""
        return f"bn{added}" if self.activation == "identity" else f"bn{added}_relu"


class Cost(NamedTuple):
    """What a BatchNorm takes, in microseconds.

    Attributes:
        device_us: time on the device.
        host_us: time on the host.
    """

    device_us: float
    host_us: float

    @property
    def us(self) -> float:
        """The longer of the two, because host and device work at the same time."""
        return max(self)


class Measured(NamedTuple):
    """The rows of one BatchNorm.

    Attributes:
        eager: the cost of eager torch, or None without a row.
        triton: the cost of the Triton kernels in the regime that runs, or None without a row.
    """

    eager: Cost | None
    triton: Cost | None


_Key = tuple[str, Tensors]


class Table:
    """The rows of a file.

    Args:
        costs: device and tensors -> fusion's name and training -> who -> cost.
    """

    def __init__(self, costs: dict[_Key, dict[tuple[str, bool], dict[str, Cost]]]) -> None:
        self._costs = costs
        self._regimes = {key: _best_regime(by_fusion) for key, by_fusion in costs.items()}

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(len(by_who) for of in self._costs.values() for by_who in of.values())

    def find(self, device: str, tensors: Tensors, fusion: Fusion) -> Measured:
        """Return what was measured of a BatchNorm."""
        by_fusion = self._costs.get((device, tensors), {})
        by_who = by_fusion.get((fusion.name, fusion.training), {})
        regimes = {who: cost for who, cost in by_who.items() if who != EAGER}
        runs = self.regime(device, tensors)
        triton = regimes.get(runs.value) if runs else None
        if triton is None and regimes:
            triton = min(regimes.values())
        return Measured(by_who.get(EAGER), triton)

    def regime(self, device: str, tensors: Tensors) -> Regime | None:
        """Return the regime with the least time on the device, or None if none was measured.

        The time is the sum over the fusions for which all regimes of these tensors have a row.
        """
        return self._regimes.get((device, tensors))


def _best_regime(by_fusion: dict[tuple[str, bool], dict[str, Cost]]) -> Regime | None:
    training = [
        {who: cost for who, cost in by_who.items() if who != EAGER}
        for (_, is_training), by_who in by_fusion.items()
        if is_training
    ]
    found = set().union(*training)
    complete = [by_who for by_who in training if by_who.keys() == found]
    if not found or not complete:
        return None
    return Regime(min(sorted(found), key=lambda who: sum(by[who].device_us for by in complete)))


@functools.cache
def load_table() -> Table:
    """Read the table of this package, once in a process; raise as `read_table`."""
    return read_table(PATH)


def read_table(path: Path) -> Table:
    """Read a table. A file that does not exist is an empty table.

    Raises:
        ValueError: a file that is not such a table; the error names the file, the line and the
            column.
    """
    costs: dict[_Key, dict[tuple[str, bool], dict[str, Cost]]] = {}
    if not path.exists():
        return Table(costs)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != TABLE_COLUMNS:
            raise _malformed(path, 1, "columns", ", ".join(TABLE_COLUMNS), reader.fieldnames)
        for row in reader:
            device, tensors, fusion, mode, who, cost = _parse(path, reader.line_num, row)
            of_tensors = costs.setdefault((device, tensors), {})
            by_who = of_tensors.setdefault((fusion, mode == "training"), {})
            if who in by_who:
                raise _malformed(path, reader.line_num, "who", "measured once", who)
            by_who[who] = cost
    return Table(costs)


def _parse(path: Path, line: int, row: dict[str, str]) -> tuple[str, Tensors, str, str, str, Cost]:
    """Return device, tensors, fusion, mode, who and cost of a row."""
    if None in row or None in row.values():
        raise _malformed(path, line, "row", f"{len(TABLE_COLUMNS)} values", "another number")
    for column, words in _WORDS.items():
        if row[column] not in words:
            raise _malformed(path, line, column, f"one of {words}", row[column])
    sizes = row["shape"].split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise _malformed(path, line, "shape", "sizes above 0, as in 256x64x56x56", row["shape"])
    times = []
    for column in ("device_us", "host_us"):
        try:
            time = float(row[column])
        except ValueError:
            time = math.nan
        if not 0 < time < math.inf:
            raise _malformed(path, line, column, "microseconds above 0", row[column])
        times.append(time)
    tensors = Tensors(
        tuple(map(int, sizes)), DTYPES[row["dtype"]], row["layout"] == "channels_last"
    )
    return row["device"], tensors, row["fusion"], row["mode"], row["who"], Cost(*times)


def _malformed(path: Path, line: int, column: str, expected: str, found: object) -> ValueError:
    return ValueError(
        f"expected `{column}` in line {line} of {path} to be {expected}, got {found!r}; write the "
        f"file again with benchmarks/gpu_day.py, or remove it"
    )
