"""Time what a BatchNorm costs the host, beside eager torch, without a GPU or on one.

    python benchmarks/host_overhead.py [--bursts 400] [--output results/host_overhead.csv]
    python benchmarks/host_overhead.py --pairs  # prints what a deferred BatchNorm costs

Without a GPU the tensors are on the CPU, and a CUDA driver that does nothing (noop_libcuda.c, built
with the C compiler) takes the launches of the compiled kernels: all host code of this project and
of Triton runs, no kernel does. Eager torch's time then includes its arithmetic on the CPU, so only
small tensors are compared. On a GPU the time is that until the calls are queued.

Each case runs in turns with eager torch in bursts of a few calls, on one thread. Its time is the
least of all bursts, and the ratios are those of times of one run. `ops` is the path through the
dispatcher, which compilers, modes and functorch take.
"""

import argparse
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import append_rows, provenance
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning import convert_batchnorm
from bn_lightning.kernels import batch_norm, dispatch, launch
from bn_lightning.kernels.arguments import BatchNormArguments
from bn_lightning.kernels.schedule import Device
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d

RESULTS = Path(__file__).parent / "results" / "host_overhead.csv"
SHAPES = [(2, 8), (60, 100), (64, 64, 8, 8)]
FUSIONS = ("bn", "bn_relu", "bn_add_relu")
# Of a burst, not timed and timed: after another case, caches of the processor are cold.
WARM_UP = 5
CALLS = 10
PAIRS = 10
# What the schedule asks of a device: an H100's.
H100 = Device(132, cache_bytes=50 << 20, registers=1 << 16)


class Case(NamedTuple):
    """One BatchNorm to time.

    Attributes:
        shape: of x.
        dtype: "fp32", or "bf16" under autocast.
        training: forward and backward in training, else a forward in evaluation, without gradients.
        fusion: one of `FUSIONS`.
    """

    shape: tuple[int, ...]
    dtype: str
    training: bool
    fusion: str


def calls_of(case: Case, device: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed: eager torch and this project, each as a function and as a module."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    x, residual, dy = (torch.randn(case.shape, device=device).to(dtype) for _ in range(3))
    C, training = case.shape[1], case.training
    relu, adds = case.fusion != "bn", case.fusion == "bn_add_relu"
    torchs = (nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(C, device=device)
    ours = (BatchNorm1d if x.dim() == 2 else BatchNorm2d)(
        C, activation="relu" if relu else "identity", backend="triton", device=device
    )
    torchs.train(training)
    ours.train(training)
    state = (ours.running_mean, ours.running_var)
    options: dict[str, Any] = {"training": training, "activation": ours.activation}

    def eager(function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(x)
        y = y + residual if adds else y
        return F.relu(y) if relu else y

    def op() -> Tensor:
        tracked = ours.num_batches_tracked if training else None
        fields = (x, residual if adds else None, ours.weight, ours.bias, *state, tracked, training)
        rest = (0.1, ours.eps, ours.activation, 0.01)
        return torch.ops.bn_lightning.batch_norm(*BatchNormArguments._make((*fields, *rest)))

    affine = [torchs.weight, torchs.bias], [ours.weight, ours.bias]
    function = {
        "eager": (lambda: eager(torchs), affine[0]),
        "eager_function": (
            lambda: eager(
                lambda x: F.batch_norm(
                    x, torchs.running_mean, torchs.running_var, *affine[0], training=training
                )
            ),
            affine[0],
        ),
        "ours": (lambda: ours(x, residual) if adds else ours(x), affine[1]),
        "ours_function": (
            lambda: batch_norm(
                x,
                *affine[1],
                *state,
                residual=residual if adds else None,
                num_batches_tracked=ours.num_batches_tracked,
                backend="triton",
                **options,
            ),
            affine[1],
        ),
        "ops": (op, affine[1]),
    }
    if not training:
        return {name: forward for name, (forward, _) in function.items()}
    inputs = [x.requires_grad_(), *([residual.requires_grad_()] if adds else [])]

    def step(forward: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), [*inputs, *parameters], dy)

    return {name: step(*found) for name, found in function.items()}


def time_in_turns(
    calls: dict[str, Callable[[], Any]], bursts: int, warm_up: int = WARM_UP, count: int = CALLS
) -> dict[str, float]:
    """Return the least microseconds of a call over bursts that take turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(bursts):
        for name, call in calls.items():
            for _ in range(warm_up):
                call()
            started = time.perf_counter()
            for _ in range(count):
                call()
            least[name] = min(least[name], (time.perf_counter() - started) / count * 1e6)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return least


def all_cases() -> list[Case]:
    """List the cases."""
    choices = itertools.product(SHAPES, ("fp32", "bf16"), (True, False), FUSIONS)
    return list(itertools.starmap(Case, choices))


def measure(case: Case, bursts: int, device: str) -> dict[str, Any]:
    """Return the row of a case."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if case.dtype == "bf16":
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        if not case.training:
            stack.enter_context(torch.no_grad())
        calls = calls_of(case, device)
        time_in_turns(calls, 3)
        times = time_in_turns(calls, bursts)
    return {
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "mode": "training" if case.training else "evaluation",
        "fusion": case.fusion,
        **{f"{name}_us": round(value, 2) for name, value in times.items()},
        "ratio": round(times["ours"] / times["eager"], 3),
    }


class _Pairs(nn.Module):
    """BatchNorms in a row, each with what follows it."""

    def __init__(
        self, norm: Callable[[], nn.Module], follow: Callable[[Tensor], Tensor], device: str
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm() for _ in range(PAIRS)]).to(device)
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = self.follow(norm(x))
        return x


class _Bare(Tensor):
    """Stands for a BatchNorm; the first operation gets what was computed together with it."""

    result: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].result


class _BareBatchNorm(BatchNorm1d):
    """Returns a `_Bare`, without a check: any tensor subclass that defers a call costs as much."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super().forward(input, *args, **kwargs)
        of: Any = self._buffers["running_mean"]
        bare: Any = Tensor._make_subclass(_Bare, of, result.requires_grad)
        bare.result = result
        return bare


def measure_pairs(device: str, bursts: int) -> None:
    """Print the microseconds of a BatchNorm and what follows, as two calls and deferred.

    The two calls are torch's, and this project's without fusion. With ReLU, the least that a tensor
    subclass takes is printed, too.
    """
    N, C = SHAPES[0]
    r = torch.randn(N, C, device=device).requires_grad_()
    follows: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu in place": lambda y: F.relu(y, inplace=True),
        "add, relu": lambda y: F.relu(y + r),
        "softplus (not fused)": F.softplus,
    }
    ours = functools.partial(BatchNorm1d, C, backend="triton")
    for name, follow in follows.items():
        models = {
            "torch": _Pairs(functools.partial(nn.BatchNorm1d, C), follow, device),
            "unfused": _Pairs(ours, follow, device),
            "deferred": _Pairs(ours, follow, device),
        }
        convert_batchnorm(models["deferred"], fuse=True, backend="triton")
        if name == "relu":
            bare = functools.partial(_BareBatchNorm, C, backend="triton", activation="relu")
            models["bare"] = _Pairs(bare, follow, device)
        for kind in ("training step", "training forward", "evaluation"):
            x = torch.randn(N, C, device=device).requires_grad_(kind != "evaluation")
            dy = torch.randn_like(x)
            calls = {}
            for label, model in models.items():
                model.train(kind != "evaluation")
                wanted = [x, *model.parameters()]

                def call(model=model, x=x, dy=dy, wanted=wanted, kind=kind) -> None:
                    y = model(x)
                    if kind == "training step":
                        torch.autograd.grad(y, wanted, dy)

                calls[label] = call
            with torch.set_grad_enabled(kind != "evaluation"):
                times = time_in_turns(calls, bursts, warm_up=2, count=1)
            torchs, unfused, deferred, *bares = (value / PAIRS for value in times.values())
            least = "".join(f" (at least {bare / unfused:.2f})" for bare in bares)
            print(
                f"{name:22}{kind:18}{torchs:7.1f} {unfused:7.1f} {deferred:7.1f} us, "
                f"{deferred / torchs:.2f} of torch's, {deferred / unfused:.2f} of unfused{least}",
                flush=True,
            )


def use_noop_driver() -> None:
    """Let Triton launch through the driver that does nothing, on CPU tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    dispatch.check_device = launch.check_device = lambda x: None
    dispatch._device = lambda device: H100


def run_with_noop_driver(source: list[str]) -> int:
    """Run this script again, in a process that finds the driver; return its exit code."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory, "libcuda.so.1")
        code = Path(__file__).with_name("noop_libcuda.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-w", "-o", library, code], check=True)
        path = os.pathsep.join(filter(None, [directory, os.environ.get("LD_LIBRARY_PATH")]))
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"LD_LIBRARY_PATH": path, "TRITON_LIBCUDA_PATH": directory}
        return subprocess.run([sys.executable, *source], env=env).returncode


def main() -> None:
    """Measure, print a table, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bursts", type=int, default=400)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--pairs", action="store_true", help="time deferred BatchNorms, write none")
    parser.add_argument("--noop-driver", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.noop_driver:
        sys.exit(run_with_noop_driver([*sys.argv, "--noop-driver"]))
    if not on_gpu:
        use_noop_driver()
    if arguments.pairs:
        torch.set_num_threads(1)
        measure_pairs("cuda" if on_gpu else "cpu", arguments.bursts)
        return
    about = {
        "driver": torch.cuda.get_device_name() if on_gpu else "none",
        **provenance(),
    }
    rows = []
    for case in all_cases():
        row = measure(case, arguments.bursts, "cuda" if on_gpu else "cpu")
        print(row, flush=True)
        rows.append(row | about)
    append_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
