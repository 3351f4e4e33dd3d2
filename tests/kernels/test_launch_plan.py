"""Recorded launches, repeated on other tensors: the bits of an ordinary call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bn_lightning.kernels.arguments import Forward, RunningStatistics
from bn_lightning.kernels.launch import run_forward
from bn_lightning.kernels.launch_plan import LaunchPlan, Result, make_plan, recorded
from bn_lightning.kernels.schedule import Regime, forced_regime

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

EPS = 1e-5
SHAPE = (5, 8, 3, 4)


def _tensors(device: str, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    C = SHAPE[1]
    return {
        "x": torch.randn(SHAPE, generator=g).to(device) * 2 + 3,
        "residual": torch.randn(SHAPE, generator=g).to(device),
        "weight": torch.randn(C, generator=g).to(device),
        "bias": torch.randn(C, generator=g).to(device),
        "running_mean": torch.randn(C, generator=g).to(device),
        "running_var": (torch.rand(C, generator=g) + 0.5).to(device),
        "tracked": torch.tensor(seed, device=device),
    }


def _run(t: dict[str, Tensor]) -> list[Tensor]:
    """Run a training forward; return y, the mask, mean and rstd."""
    call = Forward(
        t["x"], t["residual"], t["weight"], t["bias"], "relu", negative_slope=0.0, writes_mask=True
    )
    running = RunningStatistics(t["running_mean"], t["running_var"], t["tracked"], 0.1)
    return [v for v in run_forward(call, running, EPS, training=True) if v is not None]


def _record(t: dict[str, Tensor], given: list[Tensor] | None = None) -> LaunchPlan | None:
    with recorded() as recording:
        results = _run(t)
    return make_plan(recording, given or [*t.values()], [*map(Result.like, results)])


@pytest.mark.parametrize("regime", Regime, ids=lambda r: r.value)
def test_a_repetition_has_the_bits_of_an_ordinary_call(regime: Regime, device: str) -> None:
    with forced_regime(regime):
        plan = _record(_tensors(device, 1))
        expected_state, state = _tensors(device, 2), _tensors(device, 2)
        expected = _run(expected_state)
    assert plan is not None
    results = plan.launch([v.data_ptr() for v in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(torch.equal(state[k], expected_state[k]) for k in state)


def test_a_tensor_that_no_kernel_received_makes_no_plan(device: str) -> None:
    t = _tensors(device, 1)
    # The kernels get a copy.
    assert _record(t | {"x": t["x"].mT.contiguous().mT}) is None
    assert _record(t, [*t.values(), torch.ones(3, device=device)]) is None


def test_tensors_that_overlap_make_no_plan(device: str) -> None:
    t = _tensors(device, 1)
    assert _record(t | {"bias": t["weight"]}) is None


def test_a_call_without_launches_makes_no_plan(device: str) -> None:
    with recorded() as recording:
        pass
    assert make_plan(recording, [torch.ones(3, device=device)], []) is None


def test_recordings_nest_and_end(device: str) -> None:
    t = _tensors(device, 1)
    with recorded() as outer, recorded() as inner:
        _run(t)
    _run(t)
    assert inner.launches and not outer.launches


# Run in a process whose CUDA driver does nothing, and keeps the arguments of the last launch.
LAUNCH_TWICE = """
import ctypes, host_overhead, torch
from bn_lightning.kernels import batch_norm, eager

host_overhead.use_noop_driver()
driver = ctypes.CDLL("libcuda.so.1")
words = (ctypes.c_uint64 * 64).in_dll(driver, "arguments")
wanted = ctypes.c_int.in_dll(driver, "arguments_wanted")
x, residual = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
weight, bias, mean, var = torch.randn(4, 4).unbind()
tracked = torch.tensor(0)
given = (x, weight, bias, mean, var)
options = {"training": True, "momentum": 0.25, "activation": "leaky_relu", "residual": residual}
options |= {"num_batches_tracked": tracked, "negative_slope": 0.125, "backend": "triton"}
batch_norm(*given, **options)
((plan,),) = eager._plans.values()
((_, _, after, pick),) = plan.forward.steps
wanted.value = len(after[-1])
found = []
for launch in (eager._launch_forward, lambda plan, fields: [batch_norm(*given, **options)]):
    y, *_ = launch(plan, (x, residual, weight, bias, mean, var, tracked, True, 0.25, 1e-5,
                          "leaky_relu", 0.125))
    found.append([word & 0xFFFFFFFF for word in words[: wanted.value]])
    assert found[-1].count(y.data_ptr() & 0xFFFFFFFF) == 1
    assert all(found[-1].count(v.data_ptr() & 0xFFFFFFFF) == 1 for v in (*given, residual, tracked))
different = sum(a != b for a, b in zip(*found))
print(wanted.value, different)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA driver is there")
@pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")
def test_tritons_launcher_gets_what_it_gets_from_triton(tmp_path: Path) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    library = tmp_path / "libcuda.so.1"
    build = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-o", library]
    subprocess.run([*build, benchmarks / "noop_libcuda.c"], check=True)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(benchmarks), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH_TWICE], env=env, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    arguments, different = map(int, result.stdout.split())
    # y, mean and rstd are allocated for each call; all else is the same.
    assert arguments >= 15 and different <= 3
