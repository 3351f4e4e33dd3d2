"""Count the instructions of every loop over tiles, and compare their cycles with memory's.

    python benchmarks/instruction_counts.py [--quick] [--output results/instruction_counts.csv]

No GPU is needed. For the shapes of ResNet-50 (batch 64 and 256), MobileNetV2, a 3D U-Net and (N, C)
rows, in both layouts and all regimes, the kernels are compiled for sm_90, and the SASS of the
loops over tiles is counted by kind. For one tile of one program, in cycles of a multiprocessor:

    issue  warp instructions / 4 schedulers
    alu    warp instructions of the integer and comparison pipe / 2, because it has 64 lanes
    l1     128 bytes a cycle of global and shared accesses; a shuffle counts as one cycle
    dram   bytes of the tile / (4.3 TB/s / 132 processors / 1.755 GHz = 18.6 bytes)

The columns are divided by `dram`. Above 1 the loads wait for the instructions. A program with one
tile has no loop. `whole` is the issue of the whole program, with what is outside of the loops, rare
paths included. A tile that `single_launch` reads twice comes from DRAM once.

A row is a compiled variant, at the shape of all that use it where its loops cost most. Prints what
exceeds a bar, has a stack, or has too many registers.

Sources: H200's bandwidth and clock, and lanes a pipe: NVIDIA H100 whitepaper, and "Throughput of
Native Arithmetic Instructions", CUDA C++ Programming Guide, compute capability 9.0.
"""

import argparse
import collections
import gc
import itertools
import multiprocessing
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from batch_norm import MOBILENETV2, ROWS, UNET3D, resnet50
from compiled import (
    H200,
    Call,
    Launch,
    record,
    record_on,
    registers_and_stack,
    run_tool,
    specialize,
)
from rows import append_rows
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from bn_lightning.kernels.schedule import (
    ELEMENTWISE_AT_WORK,
    PROGRAMS_AT_WORK,
    Regime,
    Schedule,
)
from bn_lightning.kernels.walk import Walk
from bn_lightning.runs.machine import git_commit

RESULTS = Path(__file__).parent / "results" / "instruction_counts.csv"
TARGET = GPUTarget("cuda", 90, 32)
BYTES_A_CYCLE = 4.3e12 / 132 / 1.755e9
FUSIONS = {"bn": ("identity", False), "bn_relu": ("relu", False), "bn_add_relu": ("relu", True)}
# The most that a loop may cost, in memory's cycles; at L = 49 some lanes of a tile are empty.
BAR = 0.7
BAR_OF_49 = 0.9

KINDS = {
    "load": r"LDG|LDGSTS",
    "store": r"STG",
    "shared": r"LDS|STS|LDSM|STSM",
    "shuffle": r"SHFL|REDUX",
    "fp32": r"FADD|FMUL|FFMA|FSETP|FSEL|FMNMX|FCHK|MUFU",
    "convert": r"F2FP|F2F|I2F\w*|F2I\w*|PRMT|HADD2|I2FP",
    "integer": r"IADD3?|IMAD|LEA|SHF|LOP3|ISETP|SEL|PLOP3|IABS|IMNMX|VIADD\w*|VIMNMX|P2R|R2P|SGXT"
    r"|MOV|CS2R|BREV|POPC|FLO",
}
# What the pipe of 64 lanes a processor executes.
ALU = re.compile(
    r"(FSETP|FSEL|FMNMX|F2FP|PRMT|I2FP|IADD3?|LEA|SHF|LOP3|ISETP|SEL|PLOP3|IABS|IMNMX|VIADD\w*"
    r"|VIMNMX|P2R|R2P|SGXT)(\.|$)"
)
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    """A line of SASS."""

    address: int
    name: str
    operands: str

    @property
    def bytes(self) -> int:
        """Bytes that a thread moves; 4 if the name has no width."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
        # The width is the last one: `.E.64` of old names is the width of the address.
        found = [widths[part] for part in self.name.split(".")[1:] if part in widths]
        return found[-1] if found else 4

    @property
    def kind(self) -> str:
        """A key of `KINDS`, or "control"."""
        base = self.name.split(".")[0]
        return next((k for k, names in KINDS.items() if re.fullmatch(names, base)), "control")

    @property
    def l1_cycles(self) -> int:
        """Cycles of the first-level cache and the shared memory, for a warp."""
        if self.kind in ("load", "store", "shared"):
            return max(1, self.bytes * 32 // 128)
        return int(self.kind == "shuffle")


class Loop(NamedTuple):
    """An innermost loop that reads global memory."""

    body: list[Instruction]

    @property
    def stores(self) -> bool:
        """Whether it writes global memory."""
        return any(i.kind == "store" for i in self.body)

    @property
    def copies(self) -> bool:
        """Whether it copies to shared memory."""
        return any(i.name.startswith("LDGSTS") for i in self.body)

    @property
    def bytes_loaded(self) -> int:
        """Bytes that a thread loads from global memory in one iteration."""
        return sum(i.bytes for i in self.body if i.kind == "load")


class Code(NamedTuple):
    """What is needed of a compiled kernel."""

    instructions: list[Instruction]
    loops: list[Loop]
    registers: int
    stack: int
    shared: int


def read_sass(text: str) -> list[Instruction]:
    """Return the instructions of a listing by cuobjdump."""
    found = [Instruction(int(a, 16), name, rest) for a, name, rest in LINE.findall(text)]
    return [i for i in found if i.name != "NOP"]


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """Return the innermost loops that load from global memory."""
    spans = []
    for i in instructions:
        target = re.search(r"0x([0-9a-f]+)", i.operands)
        if i.name.startswith("BRA") and target and int(target[1], 16) < i.address:
            spans.append((int(target[1], 16), i.address))
    innermost = [
        (a, b)
        for a, b in spans
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]
    loops = [Loop([i for i in instructions if a <= i.address <= b]) for a, b in innermost]
    return [loop for loop in loops if loop.bytes_loaded]


class Work(NamedTuple):
    """A launch at one shape.

    Attributes:
        name: of the row: shape, layout, regime, fusion, part.
        launch: that was recorded.
        itemsize: of x.
        schedule: of the part.
    """

    name: dict[str, Any]
    launch: Launch
    itemsize: int
    schedule: Schedule

    @property
    def tensors(self) -> tuple[int, int, bool]:
        """Tensors of the size of x that the kernel reads and writes, and if there is a mask."""
        tensors = self.launch.arguments.get("tensors")
        if tensors is None:
            return 1, 0, False
        fields = tensors._asdict()
        written = {"dx_ptr", "dresidual_ptr"} if "dy_ptr" in fields else {"y_ptr"}
        held = {k for k, v in fields.items() if k.endswith("_ptr") and v is not None}
        has_mask = "mask_ptr" in held
        held.discard("mask_ptr")
        return len(held - written), len(held & written), has_mask

    @property
    def is_elementwise(self) -> bool:
        """Whether the kernel does not reduce."""
        return self.launch.kernel.__name__.endswith(("normalize_kernel", "input_kernel"))

    @property
    def walk(self) -> Walk:
        """How the programs go through the tensor."""
        return self.schedule.elementwise if self.is_elementwise else self.schedule.reduction


def calls(quick: bool) -> Iterator[tuple[dict[str, Any], Call]]:
    """List what is compiled."""
    shapes = {
        "ResNet-50 64": resnet50(64),
        "ResNet-50 256": resnet50(256),
        "MobileNetV2": MOBILENETV2,
        "3D U-Net": UNET3D,
        "rows": ROWS,
    }
    regimes = (None,) if quick else Regime
    for network, of_network in shapes.items():
        for shape, channels_last in itertools.product(of_network, (False, True)):
            if channels_last and len(shape) == 2:
                continue
            for fusion, regime in itertools.product(FUSIONS, regimes):
                name = {
                    "network": network,
                    "shape": "x".join(map(str, shape)),
                    "layout": "channels_last" if channels_last else "contiguous",
                    "fusion": fusion,
                }
                call = Call(shape, channels_last, torch.bfloat16, *FUSIONS[fusion], regime=regime)
                yield name, call


def record_all(quick: bool) -> list[Work]:
    """Return every launch that goes through a tensor."""
    record_on(H200)
    found = []
    for name, call in calls(quick):
        launches, schedules = record(call)
        for launch in launches:
            if "tiling" in launch.arguments and launch.part != "synchronized":
                schedule = schedules[launch.part]
                row = name | {"regime": schedule.regime.value, "part": launch.part}
                found.append(Work(row, launch, 2, schedule))
    return found


_sources: list[tuple[Any, dict[str, Any]]] = []


def _compile(number: int) -> Code:
    source, options = _sources[number]
    compiled = triton.compile(source, target=TARGET, options=options)
    instructions = read_sass(run_tool("cuobjdump", compiled, "-sass"))
    registers, stack = registers_and_stack(compiled)
    return Code(instructions, find_loops(instructions), registers, stack, compiled.metadata.shared)


def group_works(works: list[Work]) -> list[list[Work]]:
    """Return the launches of each compiled variant, and add what to compile to `_sources`."""
    backend = make_backend(TARGET)
    groups: dict[str, list[Work]] = {}
    for work in works:
        source, options, key = specialize(backend, work.launch)
        if key not in groups:
            _sources.append((source, options))
        groups.setdefault(key, []).append(work)
    return list(groups.values())


def compile_all() -> list[Code]:
    """Compile each variant, in as many processes as there are cores."""
    gc.disable()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_compile, range(len(_sources)), chunksize=1)


def _bodies(work: Work, code: Code, a_thread: float) -> list[tuple[list[Instruction], float]]:
    """Return the loops over tiles, and how many tiles an iteration of each has."""
    reads, _, _ = work.tensors
    if work.walk.tiles_per_split == 1:
        # The compiler has removed the loop.
        return []
    bodies = []
    for stores in (False, True):
        of_role = [loop for loop in code.loops if loop.stores is stores]
        # A loop that adds partials loads nothing ahead.
        of_role = [loop for loop in of_role if loop.copies] or of_role
        if of_role:
            # The others are what is left of an unrolled loop.
            widest = max(of_role, key=lambda loop: loop.bytes_loaded)
            bodies.append((widest.body, max(1, round(widest.bytes_loaded / (a_thread * reads)))))
    return bodies


def count(work: Work, code: Code) -> dict[str, Any]:
    """Return the row of a launch."""
    walk, warps = work.walk, work.launch.arguments["num_warps"]
    reads, writes, has_mask = work.tensors
    elements, tiles = walk.block_r * walk.block_p, walk.tiles * walk.blocks
    # Bytes of a tile that come from memory, without the padding of the tile.
    share = work.schedule.shape.numel / (elements * tiles)
    mask_bytes = elements / 8 if has_mask else 0
    dram = ((reads + writes) * elements * work.itemsize + mask_bytes) * share / BYTES_A_CYCLE
    bodies = _bodies(work, code, elements * work.itemsize / (warps * 32))
    kinds: collections.Counter[str] = collections.Counter()
    issue = alu = l1 = 0.0
    for body, unrolled in bodies:
        for i in body:
            kinds[i.kind] += 1 / unrolled
            issue += 1 / unrolled
            alu += bool(ALU.match(i.name)) / unrolled
            l1 += i.l1_cycles / unrolled
    outside = len(code.instructions) - sum(len(body) for body, _ in bodies)
    whole = issue + outside / walk.tiles_per_split
    loads = [i for i in code.instructions if i.kind == "load"]
    registers = -(-code.registers // 8) * 8
    in_loop = {
        **{k: round(kinds[k] * warps * 32 / elements, 2) for k in (*KINDS, "control")},
        "issue": round(issue * warps / 4 / dram, 3),
        "alu": round(alu * warps / 2 / dram, 3),
        "l1": round(l1 * warps / dram, 3),
    }
    return work.name | {
        "kernel": work.launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        "tile": f"{walk.block_r}x{walk.block_p}",
        "tiles": walk.tiles_per_split,
        "registers": code.registers,
        "stack": code.stack,
        "shared_bytes": code.shared,
        "resident": min(65536 // (registers * 32 * warps), 64 // warps, 32),
        "counted_on": ELEMENTWISE_AT_WORK if work.is_elementwise else PROGRAMS_AT_WORK,
        "loads_of_2_bytes": sum(i.bytes == 2 for i in loads),
        **(in_loop if bodies else dict.fromkeys(in_loop, "")),
        "whole": round(whole * warps / 4 / dram, 3),
    }


def bar_of(row: dict[str, Any]) -> float:
    """Return the most that the loops of a row may cost."""
    is_49 = row["shape"].endswith("x7x7") and row["layout"] == "contiguous"
    return BAR_OF_49 if is_49 else BAR


def main() -> None:
    """Compile, count, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the regime of the schedule")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    groups = group_works(record_all(arguments.quick))
    for works, code in zip(groups, compile_all(), strict=True):
        counted = [count(work, code) for work in works]
        worst = max(counted, key=lambda row: max(row["issue"] or 0, row["l1"] or 0) / bar_of(row))
        rows.append(worst | {"launches": len(works)})
    common = {
        "target": "sm_90",
        "triton": triton.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(),
    }
    append_rows(arguments.output, [row | common for row in rows])
    above = [r for r in rows if max(r["issue"] or 0, r["l1"] or 0) > bar_of(r)]
    spilled = [r for r in rows if r["stack"] or r["resident"] < r["counted_on"]]
    for row in (*above, *spilled):
        print(*row.values())
    print(f"{len(rows)} variants: {len(above)} above their bar, {len(spilled)} with a stack or too")
    print("many registers for the programs that the schedule counts on")


if __name__ == "__main__":
    main()
