"""Find out on a GPU, in nine minutes, whether the kernels are right and where they are fast.

In nine minutes an H200 with 16 cores times a third of the shapes, those that are used most; all
take about twenty (--seconds 1250).

    python benchmarks/gpu_day.py [--output DIR] [--table CSV] [--seconds 525] [--commit HASH]
                                 [--parts checks warm host compare regimes]

It needs torch, Triton and numpy. Without a GPU it runs small shapes in Triton's interpreter. The
parts, each with its own seconds and what earlier parts left of theirs:

    checks    every regime, layout, dtype and fusion against fp64, 20 repeats to the bit
    sanitizer compute-sanitizer's memcheck and racecheck on small launches, where it is installed
    warm      compile what is timed, in many processes, into the caches of Triton and Inductor
    host      benchmarks/host_overhead.py: the host's time of tiny tensors
    compare   benchmarks/batch_norm.py --quick: eager torch, cuDNN, torch.compile and copy_
    regimes   eager torch and every regime on each shape

Each case runs in a worker (gpu/workers.py), so one that hangs or crashes costs only itself. Every
file is replaced in one step after each case, so a day that is stopped leaves what it has measured:

    checks.csv, sanitizer.csv, host_overhead.csv, batch_norm.csv, times.csv    rows
    failures.csv    cases without rows, and why
    bars.csv        what was to be reached, and what was
    batch_norm.png  where matplotlib is installed

and the table at --table, which `backend="auto"` and the choice of the regime read
(bn_lightning/kernels/measurements.py). Only regimes whose checks all passed get rows there, so
--parts without `checks` needs their rows in --output. A regime that hung or crashed is not timed.
"""

import argparse
import contextlib
import csv
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# The kernels of this checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import batch_norm
import host_overhead
import torch
from gpu import bars, checks, launches, regimes
from gpu.workers import Failure, Limits, print_rows, run_in_workers

from bn_lightning.kernels import measurements
from bn_lightning.kernels.dispatch import machine_of
from bn_lightning.kernels.measurements import read_table
from bn_lightning.runs.atomic_write import write_atomically
from bn_lightning.stack.step_graph import recordable

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_day"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"
# Of host_overhead.py, for each case.
HOST_BURSTS = 30
if SMALL:
    # Triton is imported with the first kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Part(NamedTuple):
    """A part of the day.

    Attributes:
        seconds: for all its cases.
        case_seconds: for one of them.
        workers: at a time, on a GPU.
        file: of its rows, or None.
        cases: lists them.
        run: returns the rows of one; it gets the case, and the regimes that hung or crashed.
    """

    seconds: float
    case_seconds: float
    workers: int
    file: str | None
    cases: Callable[[], Sequence[Any]]
    run: Callable[[Any, Collection[str]], list[dict[str, Any]]]


def compared_cases() -> list[batch_norm.Case]:
    """List the cases of batch_norm.py --quick."""
    if SMALL:
        return [batch_norm.Case((4, 8, 6, 6), "fp32", False, "bn_relu")]
    return batch_norm.cases(quick=True)


def warm_cases() -> list[regimes.Timed]:
    """List what `compare` and `regimes` run."""
    if SMALL:
        return []
    compared = [
        regimes.Timed(case, compiled) for case in compared_cases() for compiled in (False, True)
    ]
    return [*compared, *regimes.timed_cases(SMALL)]


def check(case: checks.Check, without: Collection[str]) -> list[dict[str, Any]]:
    """Run a case of gpu/checks.py."""
    return checks.check(case, DEVICE)


def warm(timed: regimes.Timed, without: Collection[str]) -> list[dict[str, Any]]:
    """Compile what is timed."""
    regimes.warm(timed, without)
    return []


def measure_host(case: host_overhead.Case, without: Collection[str]) -> list[dict[str, Any]]:
    """Run a case of host_overhead.py."""
    return [host_overhead.measure(case, HOST_BURSTS, DEVICE) | regimes.origin()]


def compare(case: batch_norm.Case, without: Collection[str]) -> list[dict[str, Any]]:
    """Run a case of batch_norm.py."""
    if SMALL:
        return batch_norm.time_on_cpu(case, 2)
    return batch_norm.time_on_gpu(case, 20)


def time_case(timed: regimes.Timed, without: Collection[str]) -> list[dict[str, Any]]:
    """Run a case of gpu/regimes.py."""
    with recordable(regimes.first_device(DEVICE)):
        return regimes.time_case(timed, DEVICE, without)


# The seconds are for what is used most, on an H200 with 16 cores: all checks take 78 s, and a
# minute is enough to compile 200 cases, or to time 30 of `host`, 19 of `compare` or 85 of
# `regimes`. The numbers of workers are even, so that each checks one regime, and one that hangs
# stops no other.
PARTS = {
    "checks": Part(115, 40, 12, "checks", lambda: checks.checks(SMALL), check),
    "warm": Part(70, 60, 12, None, warm_cases, warm),
    # Without a GPU host_overhead.py needs a process without the interpreter.
    "host": Part(
        35, 30, 1, "host_overhead", lambda: [] if SMALL else host_overhead.all_cases(), measure_host
    ),
    "compare": Part(100, 60, 1, "batch_norm", compared_cases, compare),
    "regimes": Part(200, 40, 1, "times", lambda: regimes.timed_cases(SMALL), time_case),
}


class RowFiles:
    """The files of rows in a folder, each replaced in one step when rows are added.

    Args:
        folder: made if it does not exist.
        commit: of the rows whose measurement found none.
        kept: files whose rows stay; the others are written anew.
    """

    def __init__(self, folder: Path, commit: str, kept: Collection[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._commit = commit
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for name in kept:
            path = folder / f"{name}.csv"
            if path.exists():
                with open(path, encoding="utf-8", newline="") as file:
                    self._rows[name] = list(csv.DictReader(file))

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file so far."""
        return self._rows.get(name, [])

    def add(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows to a file."""
        self.replace(name, [*self[name], *rows])

    def replace(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Replace the rows of a file."""
        for row in rows:
            if "commit" in row and not row["commit"]:
                row["commit"] = self._commit
        self._rows[name] = rows
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(self._folder / f"{name}.csv", text.getvalue())


class GpuDay:
    """Run the parts, and keep their rows.

    Args:
        files: of the rows.
        table: the path of the table.
        deadline: of `time.monotonic`, for everything.
    """

    def __init__(self, files: RowFiles, table: Path, deadline: float) -> None:
        self._files = files
        self._table = table
        self._deadline = deadline

    def run(self, name: str, deadline: float) -> None:
        """Run the cases of a part until a deadline."""
        part = PARTS[name]
        cases = part.cases()
        begin = time.monotonic()
        failed = 0

        def on_result(result: list[dict[str, Any]] | Failure) -> None:
            nonlocal failed
            if isinstance(result, Failure):
                failed += 1
                self._fail(name, cases[result.number], result.reason)
            elif part.file is not None:
                self._files.add(part.file, result)
                if part.file == "times":
                    self._extend_table(result)

        options = ["--without", *sorted(self._broken()), "--worker", name]
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        limits = Limits(part.case_seconds, min(deadline, self._deadline))
        workers = 1 if SMALL else min(part.workers, os.cpu_count() or 1)
        left_out = run_in_workers(command, range(len(cases)), workers, limits, on_result)
        print(
            f"{name}: {len(cases) - left_out - failed} of {len(cases)} cases, {failed} failed, "
            f"{left_out} left out, {time.monotonic() - begin:.0f} s",
            flush=True,
        )

    def _fail(self, part: str, case: Any, reason: str) -> None:
        self._files.add("failures", [{"part": part, "case": str(case), "reason": reason}])
        if isinstance(case, checks.Check):
            self._files.add("checks", [checks.failed_row(case, reason)])

    def _extend_table(self, rows: list[dict[str, Any]]) -> None:
        statuses: dict[str, set[str]] = {}
        for row in self._files["checks"]:
            statuses.setdefault(row["regime"], set()).add(row["status"])
        right = {regime for regime, found in statuses.items() if found == {"ok"}}
        kept = [row for row in rows if row["who"] in right | {measurements.EAGER}]
        regimes.merge_rows(self._table, kept)

    def _broken(self) -> set[str]:
        """Return the regimes with a check that hung or crashed."""
        rows = self._files["checks"]
        return {row["regime"] for row in rows if row["status"] not in checks.ENDED}

    def write_bars(self) -> list[bars.Bar]:
        """Write the bars, as far as they are measured, and return them."""
        names = ("checks", "host_overhead", "batch_norm", "times")
        checked, host, compared, timed = (self._files[name] for name in names)
        machine = machine_of(regimes.first_device(DEVICE))
        with tempfile.TemporaryDirectory() as folder:
            # The table may have rows of another day.
            table = Path(folder) / measurements.PATH.name
            regimes.merge_rows(table, timed)
            found = bars.bars(bars.Day(machine, checked, host, compared, timed, read_table(table)))
        self._files.replace("bars", [bar.columns() for bar in found])
        return found


class Sanitizer:
    """compute-sanitizer, beside the parts that time nothing.

    Args:
        files: of the rows.
    """

    TOOLS = ("memcheck", "racecheck")

    def __init__(self, files: RowFiles) -> None:
        self._files = files
        self._program = None if SMALL else shutil.which("compute-sanitizer")
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Start a process for each tool."""
        if self._program is None:
            row = {"tool": "compute-sanitizer", "status": "not run: no GPU, or not installed"}
            self._files.add("sanitizer", [row | {"output": ""}])
            return
        for tool in self.TOOLS:
            options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
            worker = [sys.executable, str(Path(__file__).resolve()), "--launches"]
            # Each tensor is an allocation of its own, so that memcheck sees its end.
            env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            self._running[tool] = subprocess.Popen(
                [self._program, *options, *worker],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
            )

    def collect(self, deadline: float) -> None:
        """Wait for the processes until a deadline, and write what they found."""
        while self._running:
            tool, process = self._running.popitem()
            try:
                output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                status = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                status = "time was over"
            tail = " | ".join(output.splitlines()[-8:])
            self._files.add("sanitizer", [{"tool": tool, "status": status, "output": tail}])
            print(f"sanitizer, {tool}: {status}", flush=True)


def run_day(arguments: argparse.Namespace) -> None:
    """Run all parts, and print the bars."""
    begin = time.monotonic()
    # What remains of the last seconds is for the bars, the picture and the end of workers.
    parts = {name: part for name, part in PARTS.items() if name in arguments.parts}
    share = arguments.seconds / (sum(part.seconds for part in parts.values()) + 5)
    kept = {part.file for name, part in PARTS.items() if part.file and name not in parts}
    files = RowFiles(arguments.output, arguments.commit, kept)
    day = GpuDay(files, arguments.table, begin + arguments.seconds)
    sanitizer = Sanitizer(files)
    if "checks" in parts:
        sanitizer.start()
    until = begin
    for name, part in parts.items():
        if name not in ("checks", "warm"):
            sanitizer.collect(until)
        until += part.seconds * share
        day.run(name, until)
        day.write_bars()
    sanitizer.collect(until)
    found = day.write_bars()
    with contextlib.suppress(ImportError):  # matplotlib
        batch_norm.draw(files["batch_norm"], arguments.output / "batch_norm.png")
    for bar in found:
        row = bar.columns()
        print(f"{row['verdict']:12}  {row['bar']}: {row['figure'] or '-'} ({row['limit']})")
    print(f"{time.monotonic() - begin:.0f} s; rows in {arguments.output}, table {arguments.table}")


def work(name: str, numbers: Sequence[int], without: Collection[str]) -> None:
    """Run cases of a part in this process, as a worker."""
    # Processes of its own would not help Inductor: there are as many workers as cores, or caches.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    part = PARTS[name]
    cases = part.cases()
    # Each CUDA graph begins with a collection of garbage, which is spared what was imported.
    gc.freeze()
    for number in numbers:
        print_rows(number, partial(part.run, cases[number], without))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the rows")
    parser.add_argument("--table", type=Path, default=measurements.PATH, help="its rows are kept")
    parser.add_argument("--seconds", type=float, default=525.0, help="for everything")
    parser.add_argument("--commit", default="", help="where git does not tell it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--launches", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launches:
        launches.launch_all(DEVICE)
    elif arguments.worker:
        name, numbers = arguments.worker
        work(name, [int(number) for number in numbers.split(",")], arguments.without)
    else:
        run_day(arguments)


if __name__ == "__main__":
    main()
