"""Time eager torch and every regime on each shape: the rows from which `backend="auto"` chooses."""

import csv
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

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
from torch import Tensor

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


def timed_cases(small: bool) -> list[Case]:
    """List the cases: tiny ones first, then those of the bars, then the others."""
    if small:
        shapes = (((2, 8), False), ((3, 8, 4, 4), True))
        return [Case(shape, "fp32", channels_last, "bn_relu") for shape, channels_last in shapes]
    shapes = [*resnet50(256), *ROWS[1:], *resnet50(64), *MOBILENETV2, *UNET3D]
    tiny = [
        Case(shape, dtype, False, fusion)
        for dtype in ("fp32", "bf16")
        for shape in TINY
        for fusion in FUSIONS
    ]
    return tiny + [
        Case(shape, dtype, channels_last, fusion)
        for dtype in ("bf16", "fp32", "fp16")
        for shape in shapes
        for channels_last in ((False, True) if len(shape) > 2 else (False,))
        for fusion in FUSIONS
    ]


def time_case(case: Case, device: str, without: Collection[str]) -> list[dict[str, Any]]:
    """Time a case, a row for each contender and mode: the columns of the table.

    The rows of torch.compile and of `backend="auto"` are for the bars only.

    Args:
        case: what to time.
        device: "cuda" or "cpu".
        without: regimes that are left out.
    """
    inputs = case.inputs(device)
    dy = torch.randn_like(inputs[0])
    modules = make_modules(case, device, "triton")
    modules[AUTO] = make_modules(case, device, "auto")["ours"]
    rows = []
    contenders: list[tuple[str, Regime | None]] = [(EAGER, None), (AUTO, None)]
    contenders += [(regime.value, regime) for regime in _timed_regimes(without)]
    if COMPILED in modules and is_compiled(case):
        torch.compiler.reset()
        contenders.append((COMPILED, None))
    for who, regime in contenders:
        module = modules["ours" if regime else who]
        if regime is None:
            rows += _time_contender(case, who, steps(module, inputs, dy), device)
        else:
            with forced_regime(regime):
                rows += _time_contender(case, who, steps(module, inputs, dy), device)
    return rows


def _time_contender(
    case: Case, who: str, functions: dict[str, Callable[[], Any]], device: str
) -> list[dict[str, Any]]:
    modes = {"training": "both"}
    # Evaluation is the same in every regime.
    if who in (EAGER, AUTO, COMPILED, Regime.TWO_PASS.value):
        modes["evaluation"] = "inference"
    rows = []
    for mode, direction in modes.items():
        step = functions[direction]
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
    """List the regimes; on AMD without `persistent`, which has not been shown to be right there."""
    hidden = {*without, *([Regime.PERSISTENT.value] if torch.version.hip else [])}
    return [regime for regime in Regime if regime.value not in hidden]


def is_compiled(case: Case) -> bool:
    """Return whether torch.compile is timed, too: for ResNet-50 at batch 256 in bf16."""
    return case.dtype == "bf16" and case.shape in resnet50(256)


def first_device(device: str) -> torch.device:
    """Return the first device of the type "cuda" or "cpu"."""
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def device_of_rows(device: str) -> str:
    """Return the name under which the rows of "cuda" or "cpu" stand in the table."""
    return device_name(first_device(device))


def warm(case: Case, compiled: bool, without: Collection[str]) -> None:
    """Compile what is timed on a GPU, so that it is found in the caches of Triton and Inductor."""
    inputs = case.inputs("cuda")
    dy = torch.randn_like(inputs[0])
    modules = make_modules(case, "cuda", "triton")
    for regime in _timed_regimes(without):
        with forced_regime(regime):
            _run_once(modules["ours"], inputs, dy)
    if compiled:
        torch.compiler.reset()
        _run_once(modules[COMPILED], inputs, dy)


def _run_once(module: Any, inputs: list[Tensor], dy: Tensor) -> None:
    functions = steps(module, inputs, dy)
    functions["both"]()
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
