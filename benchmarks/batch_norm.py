"""Time our BatchNorm, eager torch's, torch.compile's and a copy of the same bytes, in one run.

    python benchmarks/batch_norm.py [--quick] [--picture] [--output results/batch_norm.csv]

On a GPU, for each shape, dtype, layout and fusion (BN, +ReLU, +add+ReLU): the device time of the
forward, the backward, both, and inference, measured by events around replays of a CUDA graph, with
the L2 cache overwritten before each; the host time of an eager call; saved and peak memory. On a
CPU: the native backend and `nn.BatchNorm2d` in alternation.

Bytes are those that our kernels move (bn_lightning/kernels/cost.py counts them). The rows of `copy`
are a copy_ of the bytes of two passes. `ours` runs in the regime of its schedule. In fp16 and
channels-last, eager torch runs cuDNN. Requires torch, Triton on a GPU, and matplotlib for
--picture.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rows import append_rows
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from bn_lightning.kernels.cost import backward_passes, forward_passes
from bn_lightning.kernels.dispatch import schedule_of
from bn_lightning.kernels.measurements import DTYPES, Fusion
from bn_lightning.kernels.schedule import Regime
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.runs.machine import git_commit
from bn_lightning.stack.step_graph import recordable

RESULTS = Path(__file__).parent / "results" / "batch_norm.csv"
FUSIONS = ("bn", "bn_relu", "bn_add_relu")
# In the picture: label, marker and color.
CONTENDERS = {
    "ours": ("bn_lightning", "o", "#0072b2"),
    "compile": ("torch.compile", "s", "#e69f00"),
    "eager": ("eager torch", "D", "#d55e00"),
}
# Bytes written between two timings, more than any L2 cache.
FLUSH_BYTES = 256 << 20
CPU_SHAPE = (32, 64, 56, 56)


def resnet50(N: int) -> list[tuple[int, ...]]:
    """Return the input shapes of ResNet-50's BatchNorms, each once."""
    sides = {
        112: (64,),
        56: (64, 256, 128),
        28: (128, 512, 256),
        14: (256, 1024, 512),
        7: (512, 2048),
    }
    return [(N, C, side, side) for side, channels in sides.items() for C in channels]


MOBILENETV2 = [(64, 32, 112, 112), (64, 96, 112, 112), (64, 144, 56, 56), (64, 576, 14, 14),
               (64, 960, 7, 7), (64, 1280, 7, 7)]  # fmt: skip
UNET3D = [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 128, 32, 32, 32), (2, 256, 16, 16, 16)]
ROWS = [(60, 100), (1024, 1024), (8192, 4096), (65536, 4096)]


@dataclass(frozen=True)
class Case:
    """One BatchNorm to time.

    Attributes:
        shape: of x.
        dtype: a key of `DTYPES`.
        channels_last: whether x is channels-last.
        fusion: one of `FUSIONS`.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    fusion: str

    def inputs(self, device: str) -> list[Tensor]:
        """Return x and, if one is added, a residual."""
        count = 2 if self.fusion == "bn_add_relu" else 1
        tensors = []
        for _ in range(count):
            value = torch.randn(self.shape, device=device).to(DTYPES[self.dtype])
            if self.channels_last:
                value = value.movedim(1, -1).contiguous().movedim(-1, 1)
            tensors.append(value.requires_grad_())
        return tensors

    def fused(self, training: bool) -> Fusion:
        """Return what our module computes."""
        activation = "identity" if self.fusion == "bn" else "relu"
        return Fusion(activation, self.fusion == "bn_add_relu", training)

    def bytes(self, direction: str, regime: Regime) -> float:
        """Return the bytes that our kernels move in a regime."""
        dtype = DTYPES[self.dtype]
        training = self.fused(training=True)
        counts = {
            "forward": forward_passes(training, dtype, regime),
            "backward": backward_passes(training, dtype, regime),
            "inference": forward_passes(self.fused(training=False), dtype, regime),
        }
        counts["both"] = counts["forward"] + counts["backward"]
        return counts[direction] * torch.Size(self.shape).numel() * dtype.itemsize

    def columns(self) -> dict[str, str]:
        """Return the columns of a row that tell what was timed."""
        return {
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "layout": "channels_last" if self.channels_last else "contiguous",
            "fusion": self.fusion,
        }


@functools.cache
def origin() -> dict[str, str | None]:
    """Return the columns of a row that tell what it was timed with, and when."""
    triton = ""
    if find_spec("triton"):
        import triton as package

        triton = package.__version__
    return {
        "torch": torch.__version__,
        "triton": triton,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
    }


def make_modules(case: Case, device: str, backend: str) -> dict[str, nn.Module]:
    """Return our module with a backend, eager torch's and, on a GPU, the compiled one."""
    dimensions = max(1, len(case.shape) - 2)
    ours = (BatchNorm1d, BatchNorm2d, BatchNorm3d)[dimensions - 1]
    theirs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    activation = case.fused(training=True).activation
    eager = _Eager(theirs(case.shape[1]), activation).to(device)
    modules: dict[str, nn.Module] = {
        "ours": ours(case.shape[1], activation=activation, backend=backend).to(device),
        "eager": eager,
    }
    if device == "cuda":
        compiled = _Eager(theirs(case.shape[1]), activation).to(device)
        modules["compile"] = torch.compile(compiled, fullgraph=True)
    return modules


class _Eager(nn.Module):
    """A BatchNorm, an addition and a ReLU in torch."""

    def __init__(self, norm: nn.Module, activation: str) -> None:
        super().__init__()
        self.norm = norm
        self.relu = activation == "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        z = z if residual is None else z + residual
        return F.relu(z) if self.relu else z


def steps(module: Any, inputs: list[Tensor], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the functions to time; `backward` uses one retained graph every time.

    Call `module.train(direction != "inference")` before a function.
    """
    wanted = [*inputs, *module.parameters()]
    y = module.train()(*inputs)

    def both() -> Any:
        return torch.autograd.grad(module(*inputs), wanted, dy)

    def inference() -> Tensor:
        with torch.no_grad():
            return module(*inputs)

    return {
        "forward": lambda: module(*inputs),
        "backward": lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True),
        "both": both,
        "inference": inference,
    }


def device_milliseconds(step: Callable[[], Any], repeats: int) -> list[float]:
    """Time replays of a CUDA graph of `step`, with the L2 cache overwritten before each.

    Inside `recordable`, as all that has made or used the tensors.
    """
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in times]


def host_milliseconds(step: Callable[[], Any], repeats: int, warm_ups: int = 3) -> list[float]:
    """Time the calls; on a GPU they return before the device has finished."""
    cuda = torch.cuda.is_available()
    times = []
    for _ in range(repeats + warm_ups):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[warm_ups:]


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def saved_bytes(module: Any, inputs: list[Tensor]) -> int:
    """Return the bytes a forward saves for its backward, each storage once, with parameters."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        module(*inputs)
    return sum(kept.values())


def row(case: Case, direction: str, who: str, times: list[float], **more: Any) -> dict[str, Any]:
    """Return one row of the table."""
    low, median, high = percentiles(times)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        **case.columns(),
        "direction": direction,
        "who": who,
        "ms_20": f"{low:.5f}",
        "ms_50": f"{median:.5f}",
        "ms_80": f"{high:.5f}",
        "bytes": more.get("bytes", ""),
        "gb_per_s": f"{more['bytes'] / median / 1e6:.1f}" if "bytes" in more else "",
        "host_ms": more.get("host_ms", ""),
        "saved_bytes": more.get("saved_bytes", ""),
        "peak_bytes": more.get("peak_bytes", ""),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": origin()["date"],
        "commit": origin()["commit"],
    }


@recordable(torch.device("cuda"))
def time_on_gpu(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Time one case."""
    torch.compiler.reset()
    # Inductor would otherwise free what `backward` needs the next time.
    functorch_config.donated_buffer = False
    inputs = case.inputs("cuda")
    dy = torch.randn_like(inputs[0])
    rows = []
    for who, module in make_modules(case, "cuda", "triton").items():
        rows += _time_steps(case, who, module, inputs, dy, repeats)
    for direction in ("forward", "backward", "both", "inference"):
        # A copy reads half of the bytes and writes half.
        source = torch.randn(int(case.bytes(direction, Regime.TWO_PASS)) // 8, device="cuda")
        target = torch.empty_like(source)
        times = device_milliseconds(lambda s=source, t=target: t.copy_(s), repeats)  # type: ignore[misc]
        rows.append(row(case, direction, "copy", times, bytes=2 * source.nbytes))
    return rows


def _time_steps(
    case: Case, who: str, module: Any, inputs: list[Tensor], dy: Tensor, repeats: int
) -> list[dict[str, Any]]:
    rows = []
    for direction, step in steps(module, inputs, dy).items():
        module.train(direction != "inference")
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
        host = percentiles(host_milliseconds(step, repeats))[1]
        times = device_milliseconds(step, repeats)
        regime = schedule_of(inputs[0], case.channels_last).regime
        counted = case.bytes(direction, regime)
        rows.append(
            row(
                case,
                direction,
                who,
                times,
                bytes=int(counted),
                host_ms=f"{host:.5f}",
                saved_bytes=saved_bytes(module.train(), inputs),
                peak_bytes=peak,
            )
        )
    return rows


def time_on_cpu(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Time ours and eager in alternation, because other load changes both in the same round."""
    inputs = case.inputs("cpu")
    dy = torch.randn_like(inputs[0])
    modules = make_modules(case, "cpu", "native")
    by_who = {who: steps(module, inputs, dy) for who, module in modules.items()}
    rows = []
    for direction in ("forward", "backward", "both", "inference"):
        for module in modules.values():
            module.train(direction != "inference")
        times: dict[str, list[float]] = {who: [] for who in by_who}
        for number in range(rounds + 2):
            # Each is first in half of the rounds.
            for who in sorted(by_who, reverse=number % 2 == 1):
                begin = time.perf_counter()
                by_who[who][direction]()
                times[who].append(1e3 * (time.perf_counter() - begin))
        times = {who: values[2:] for who, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["eager"], strict=True))
        print(f"{case.fusion:12} {direction:10} ours / eager = {ratio:.3f} (median of {rounds})")
        rows += [row(case, direction, who, values) for who, values in times.items()]
    return rows


def cases(quick: bool) -> list[Case]:
    """Return the cases for a GPU; --quick takes a tenth of them, about five minutes."""
    shapes = [*resnet50(64), *resnet50(256), *MOBILENETV2, *UNET3D, *ROWS]
    dtypes = list(DTYPES)
    if quick:
        shapes = [(256, 64, 56, 56), (256, 256, 56, 56), (64, 512, 7, 7), (60, 100), (8192, 4096)]
        dtypes = ["bf16"]
    found = []
    for shape in shapes:
        for dtype in dtypes:
            for channels_last in (False, True) if len(shape) > 2 else (False,):
                found += [Case(shape, dtype, channels_last, fusion) for fusion in FUSIONS]
    if quick:
        images = [shape for shape in shapes if len(shape) > 2]
        found += [Case(shape, "fp16", True, fusion) for shape in images for fusion in FUSIONS]
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the medians of forward + backward, as multiples of a copy's, or of eager torch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times: dict[str, dict[str, float]] = {}
    for r in rows:
        if r["direction"] == "both":
            layout = "" if r["layout"] == "contiguous" else " channels-last"
            name = f"{r['shape']} {r['dtype']}{layout}, {r['fusion'].replace('_', ' + ')}"
            times.setdefault(name, {})[r["who"]] = float(r["ms_50"])
    names = list(times)[::-1]
    base = "copy" if any("copy" in of for of in times.values()) else "eager"
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.19 * len(names)))
    for who, (label, marker, color) in CONTENDERS.items():
        found = [(n, of[who] / of[base]) for n, of in enumerate(map(times.get, names)) if who in of]
        if found and who != base:
            places, ratios = zip(*found, strict=True)
            axes.plot(ratios, places, marker, color=color, label=label)
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-1, len(names))
    what = "a copy of the bytes of two passes" if base == "copy" else "eager torch"
    axes.set_xlabel(f"time of a forward and backward, that of {what} = 1")
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the cases, print the medians and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--picture", action="store_true", help="also draw OUTPUT.png (matplotlib)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=0, help="timings of each; 0 for the default")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for case in cases(arguments.quick):
            new = time_on_gpu(case, arguments.repeats or (20 if arguments.quick else 100))
            append_rows(arguments.output, new)
            rows += new
            for r in new:
                print(*(r[k] for k in ("shape", "dtype", "layout", "fusion", "direction", "who")),
                      r["ms_50"], "ms", r["gb_per_s"], "GB/s", flush=True)  # fmt: skip
    else:
        print("No GPU: the native backend and torch's are timed; the kernels are not.")
        for fusion in FUSIONS:
            rounds = arguments.repeats or (20 if arguments.quick else 60)
            rows += time_on_cpu(Case(CPU_SHAPE, "fp32", False, fusion), rounds)
        append_rows(arguments.output, rows)
    if arguments.picture:
        draw(rows, arguments.output.with_suffix(".png"))
    print(f"{len(rows)} rows appended to {arguments.output}")


if __name__ == "__main__":
    main()
