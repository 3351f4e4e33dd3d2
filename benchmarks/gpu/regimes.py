"""Time eager torch and every regime on each shape: the rows from which `backend="auto"` chooses."""

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from batch_norm import (
    MOBILENETV2,
    ROWS,
    UNET3D,
    Case,
    device_milliseconds,
    host_milliseconds,
    make_modules,
    origin,
    percentiles,
    resnet50,
    steps,
)
from torch import Tensor, nn

from bn_lightning.kernels.dispatch import device_name
from bn_lightning.kernels.measurements import EAGER, TABLE_COLUMNS, read_table
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.runs.atomic_write import write_atomically

FUSIONS = ("bn", "bn_relu", "bn_add_relu")
TINY = ((60, 100), (64, 64, 8, 8), (2, 8))
# Contenders that the table does not take, because they are no choice of `backend="auto"`.
COMPILED = "compile"
AUTO = "auto"
REPEATS = 20


class Timed(NamedTuple):
    """A case to time.

    Attributes:
        case: the BatchNorm.
        compiled: whether torch.compile is timed, else eager torch, `auto` and every regime.
    """

    case: Case
    compiled: bool


def timed_cases(small: bool) -> list[Timed]:
    """List the cases: tiny ones, those of ResNet-50 at batch 256 in bf16, then the others."""
    if small:
        shapes = (((2, 8), False), ((3, 8, 4, 4), True))
        cases = [Case(shape, "fp32", last, "bn_relu") for shape, last in shapes]
        return [Timed(case, False) for case in cases]
    tiny = [*_each(TINY, "fp32", layouts=(False,)), *_each(TINY, "bf16", layouts=(False,))]
    first = [*_each(resnet50(256), "bf16")]
    others = [*ROWS[1:], *resnet50(64), *MOBILENETV2, *UNET3D]
    rest = [*_each(others, "bf16")]
    for dtype in ("fp32", "fp16"):
        rest += _each([*resnet50(256), *others], dtype)
    return [
        *(Timed(case, False) for case in (*tiny, *first)),
        *(Timed(case, True) for case in first),
        *(Timed(case, False) for case in rest),
    ]


def _each(
    shapes: Sequence[tuple[int, ...]], dtype: str, layouts: Sequence[bool] = (False, True)
) -> Iterator[Case]:
    for shape in shapes:
        for channels_last in layouts if len(shape) > 2 else (False,):
            yield from (Case(shape, dtype, channels_last, fusion) for fusion in FUSIONS)


def time_case(timed: Timed, device: str, without: Collection[str]) -> list[dict[str, Any]]:
    """Time a case, a row for each contender and mode: the columns of the table.

    The rows of torch.compile and of `backend="auto"` are for the bars only. On a GPU inside
    `recordable`.

    Args:
        timed: what to time.
        device: "cuda" or "cpu".
        without: regimes that are left out.
    """
    case = timed.case
    inputs = case.inputs(device)
    dy = torch.randn_like(inputs[0])
    modules = make_modules(case, device, "triton")
    if timed.compiled:
        torch.compiler.reset()
        return _time_contender(case, COMPILED, modules[COMPILED], inputs, dy, device)
    modules[AUTO] = make_modules(case, device, AUTO)["ours"]
    rows = []
    for who in (EAGER, AUTO):
        rows += _time_contender(case, who, modules[who], inputs, dy, device)
    for regime in _timed_regimes(without):
        with forced_regime(regime):
            rows += _time_contender(case, regime.value, modules["ours"], inputs, dy, device)
    return rows


def _time_contender(
    case: Case, who: str, module: nn.Module, inputs: list[Tensor], dy: Tensor, device: str
) -> list[dict[str, Any]]:
    functions = steps(module, inputs, dy)
    modes = {"training": "both"}
    # Evaluation is the same in every regime.
    if who in (EAGER, AUTO, COMPILED, Regime.TWO_PASS.value):
        modes["evaluation"] = "inference"
    rows = []
    for mode, direction in modes.items():
        step = functions[direction]
        module.train(mode == "training")
        if device == "cuda":
            host = host_milliseconds(step, REPEATS)
            on_device = device_milliseconds(step, REPEATS)
        else:
            # The interpreter's time stands for the device's, too.
            on_device = host = host_milliseconds(step, 2, warm_ups=0)
        rows.append(
            {
                "device": device_of_rows(device),
                "mode": mode,
                "who": who,
                "device_us": f"{1e3 * percentiles(on_device)[1]:.3f}",
                "host_us": f"{1e3 * percentiles(host)[1]:.3f}",
                **case.columns(),
                **origin(),
            }
        )
    return rows


def _timed_regimes(without: Collection[str]) -> list[Regime]:
    return [regime for regime in Regime if regime.value not in without]


def first_device(device: str) -> torch.device:
    """Return the first device of the type "cuda" or "cpu"."""
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def device_of_rows(device: str) -> str:
    """Return the name under which the rows of "cuda" or "cpu" stand in the table."""
    return device_name(first_device(device))


def warm(timed: Timed, without: Collection[str]) -> None:
    """Compile what is timed on a GPU, so that it is found in the caches of Triton and Inductor."""
    inputs = timed.case.inputs("cuda")
    dy = torch.randn_like(inputs[0])
    modules = make_modules(timed.case, "cuda", "triton")
    if timed.compiled:
        torch.compiler.reset()
        _run_once(modules[COMPILED], inputs, dy)
        return
    for regime in _timed_regimes(without):
        with forced_regime(regime):
            _run_once(modules["ours"], inputs, dy)


def _run_once(module: Any, inputs: list[Tensor], dy: Tensor) -> None:
    functions = steps(module, inputs, dy)
    functions["both"]()
    module.eval()
    functions["inference"]()


def merge_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace or add rows in the table at `path`, in one step.

    Raises:
        ValueError: the table at `path` is malformed.
    """
    old: list[dict[str, Any]] = []
    if path.exists():
        read_table(path)
        with open(path, encoding="utf-8", newline="") as file:
            old = list(csv.DictReader(file))
    key = TABLE_COLUMNS[: TABLE_COLUMNS.index("who") + 1]
    merged = {tuple(str(r[name]) for name in key): r for r in (*old, *rows)}
    text = io.StringIO()
    writer = csv.DictWriter(text, TABLE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(r for r in merged.values() if r["who"] not in (COMPILED, AUTO))
    write_atomically(path, text.getvalue())
