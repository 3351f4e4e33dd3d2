"""Every kernel compiles for the GPUs people have, spills nothing, and moves 16 bytes at a time if a
tensor is aligned. No GPU is needed.

The kernels are found by name in the modules of `bn_lightning.kernels`: one that is not launched
below fails the test. Run as a script, in a process without TRITON_INTERPRET, this file records the
launches of forwards and backwards on tensors without memory, specializes them as Triton's launcher
does, compiles each for one target and prints what it found as JSON; the tests start it and judge.
`python tests/kernels/test_static.py cuda 90 32 --all` compiles every activation in every layout,
dtype and regime, which takes minutes.
"""

import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Layout(NamedTuple):
    """The shape of x.

    Attributes:
        shape: (N, C, ...).
        channels_last: whether the channels are neighbours in memory.
        aligned: whether rows begin at multiples of 16 bytes in a 16-bit dtype in every regime.
    """

    shape: tuple[int, ...]
    channels_last: bool
    aligned: bool


LAYOUTS = {
    "ncl": Layout((256, 64, 56, 56), False, True),
    "channels_last": Layout((64, 64, 28, 28), True, True),
    "small_maps": Layout((256, 256, 7, 7), False, False),
    "rows": Layout((60, 100), False, False),
    "one_channel": Layout((16, 1, 64), False, True),
    "wide": Layout((4096, 64, 128, 128), False, True),
    "many_channels": Layout((64, 2048, 7, 7), False, False),
}


@pytest.mark.parametrize(
    ("backend", "arch", "warp_size", "which"),
    [
        pytest.param("cuda", 90, 32, "--kernels", id="sm_90-kernels"),
        pytest.param("hip", "gfx942", 64, "--kernels", id="gfx942-kernels", marks=pytest.mark.slow),
        pytest.param("cuda", 90, 32, "--branches", id="sm_90", marks=pytest.mark.slow),
        pytest.param("cuda", 80, 32, "--branches", id="sm_80", marks=pytest.mark.soak),
        pytest.param("hip", "gfx942", 64, "--branches", id="gfx942", marks=pytest.mark.soak),
        pytest.param("cuda", 90, 32, "--activations", id="sm_90-all", marks=pytest.mark.soak),
        pytest.param("cuda", 80, 32, "--activations", id="sm_80-all", marks=pytest.mark.soak),
        pytest.param("hip", "gfx942", 64, "--activations", id="gfx942-all", marks=pytest.mark.soak),
    ],
)
def test_kernels_compile_without_spills_and_with_wide_accesses(
    backend: str, arch: int | str, warp_size: int, which: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path]),
    }
    result = subprocess.run(
        [sys.executable, __file__, backend, str(arch), str(warp_size), which],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    rows = found["variants"]
    assert {row["kernel"] for row in rows} == set(found["kernels"])
    walks = {row["kernel"] for row in rows if row["reads_tensors"]}
    assert walks == {row["kernel"] for row in rows if row["reads_tensors"] and row["aligned"]}
    for row in rows:
        assert row["binary_bytes"] > 0, row
        assert row["spills"] == 0, row
        assert not row.get("races"), row
        # The channels of a sample have an even number of values in every layout.
        assert row["loads_of_2_bytes"] == 0 and row["stores_of_2_bytes"] == 0, row
        if row["aligned"] and row["reads_tensors"]:
            assert row["loads_of_16_bytes"] > 0, row
        if row["aligned"] and row["writes_tensors"]:
            assert row["stores_of_16_bytes"] > 0, row


class _Call(NamedTuple):
    """One BatchNorm of a layout, in the regimes named."""

    layout: str
    dtype: torch.dtype
    activation: str
    has_residual: bool
    training: bool
    regimes: tuple[str, ...] = ("single_launch", "two_pass")


# Each kernel once.
KERNELS = (
    _Call("ncl", torch.bfloat16, "relu", True, True),
    _Call("one_channel", torch.float16, "identity", True, False, ("two_pass",)),
)
# Each branch of the kernels once.
BRANCHES = (
    *KERNELS,
    _Call("channels_last", torch.bfloat16, "silu", True, True),
    _Call("ncl", torch.float32, "identity", False, True, ("two_pass",)),
    _Call("wide", torch.bfloat16, "tanh", True, True, ("single_launch",)),
    _Call("small_maps", torch.bfloat16, "leaky_relu", True, True, ("two_pass",)),
    _Call("rows", torch.float32, "sigmoid", False, True, ("single_launch",)),
    # A cumulative average of channels that have one split each.
    _Call("many_channels", torch.float16, "identity", False, True, ("two_pass",)),
)


def _wanted(which: str) -> Iterator[_Call]:
    """List what is compiled.

    With "--kernels" each kernel once, with "--branches" each branch; with "--activations" also each
    activation, with and without a residual, in alternating layouts; with "--all" each of them in
    every combination.
    """
    from bn_lightning.kernels.activations import ACTIVATIONS

    yield from KERNELS if which == "--kernels" else BRANCHES
    if which in ("--kernels", "--branches"):
        return
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    fusions = list(product(ACTIVATIONS, (True, False)))
    if which == "--activations":
        for i, (activation, has_residual) in enumerate(fusions):
            # The steps have no common factor, so that layout and dtype mix.
            layout, dtype = list(LAYOUTS)[i % 5], dtypes[i % 7 % 2]
            yield _Call(layout, dtype, activation, has_residual, True)
        return
    for layout, dtype, (activation, has_residual) in product(LAYOUTS, dtypes, fusions):
        yield _Call(layout, dtype, activation, has_residual, dtype != torch.float16)


def _calls(which: str) -> Iterator[tuple[str, bool, Any]]:
    """Return for each call and regime the layout, whether it is aligned, and a `compiled.Call`."""
    from compiled import Call

    from bn_lightning.kernels.schedule import Regime

    for wanted in _wanted(which):
        layout = LAYOUTS[wanted.layout]
        for regime in wanted.regimes:
            call = Call(
                shape=layout.shape,
                channels_last=layout.channels_last,
                dtype=wanted.dtype,
                activation=wanted.activation,
                has_residual=wanted.has_residual,
                affine=wanted.layout != "one_channel",
                momentum=None if wanted.dtype is torch.float16 else 0.1,
                training=wanted.training,
                regime=Regime(regime),
            )
            yield wanted.layout, layout.aligned and wanted.dtype is torch.bfloat16, call


def _kernels() -> list[str]:
    """Find the kernels by name in the modules of the package."""
    from bn_lightning import kernels

    names = [
        f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)
    ]
    modules = map(importlib.import_module, names)
    return sorted({n for m in modules for n in vars(m) if re.fullmatch(r"_bn_\w+_kernel", n)})


def _races(ptx: str) -> int:
    """Count the writes of num_batches_tracked without a barrier after, or before, its use.

    One thread writes it, and all warps use it, as the reciprocal of the momentum. Of all that is in
    global memory it alone has 64 bits.
    """
    used, written, barrier = r"cvt\.rn\.f32\.[su]64", r"st\.global\S*\.[bsu]64", r"bar\.sync"
    found = re.findall(rf"\b({used}|{written}|{barrier})\b", ptx)
    order = "".join({"cvt": "u", "st.": "w", "bar": "|"}[text[:3]] for text in found)
    return len(re.findall(r"uw|wu", order))


def _resources(compiled: Any) -> dict[str, int]:
    """Return the size of the binary, what it spills, and its memory accesses."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        return {
            "binary_bytes": len(compiled.asm["hsaco"]),
            "spills": sum(map(int, counts)),
            "loads_of_16_bytes": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
            "loads_of_2_bytes": len(re.findall(r"\b(?:global|buffer)_load_(?:u|s)?short", text)),
            "stores_of_16_bytes": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", text)),
            "stores_of_2_bytes": len(re.findall(r"\b(?:global|buffer)_store_short", text)),
        }
    from compiled import registers_and_stack

    registers, stack = registers_and_stack(compiled)
    ptx = compiled.asm["ptx"]
    return {
        "binary_bytes": len(compiled.asm["cubin"]),
        "spills": stack,
        # Those of a loop are asynchronous copies to shared memory.
        "loads_of_16_bytes": len(re.findall(r"\bld\.global\S*\.v4\.\w32\b|\bcp\.async\.cg", ptx)),
        "loads_of_2_bytes": len(re.findall(r"\bld\.global\S*\.\w16\b", ptx)),
        "stores_of_16_bytes": len(re.findall(r"\bst\.global\S*\.v4\.\w32\b", ptx)),
        "stores_of_2_bytes": len(re.findall(r"\bst\.global\S*\.\w16\b", ptx)),
        "races": _races(ptx),
        "registers": registers,
    }


# What the processes compile: it has functions, which a forked process inherits and no message can
# carry.
_variants: list[tuple[dict[str, Any], Any, dict[str, Any], Any]] = []


def _compile(number: int) -> dict[str, Any]:
    import triton

    row, source, options, target = _variants[number]
    return row | _resources(triton.compile(source, target=target, options=options))


def _main(backend: str, arch: str, warp_size: str, which: str = "--activations") -> None:
    import compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size))
    compiler = make_backend(target)
    registers = compiled.H200.registers if warp_size == "32" else 0
    device = replace(compiled.H200, warp_size=int(warp_size), registers=registers)
    compiled.record_on(device)
    seen = set()
    for wanted, aligned, call in _calls(which):
        for launch in compiled.record(call)[0]:
            source, options, key = compiled.specialize(compiler, launch)
            if key in seen:
                continue
            seen.add(key)
            tensors = launch.arguments.get("tensors")
            # dx and dresidual of the backward, y of the forward.
            fields = ("dx_ptr", "dresidual_ptr") if hasattr(tensors, "dx_ptr") else ("y_ptr",)
            row = {
                "kernel": launch.kernel.__name__,
                "layout": wanted,
                "aligned": aligned,
                "reads_tensors": "tiling" in launch.arguments,
                "writes_tensors": any(getattr(tensors, name, None) is not None for name in fields),
                "specialized": key,
            }
            _variants.append((row, source, options, target))
    # Compiling makes many objects and few cycles: looking for those takes 5 to 9 % of the time.
    gc.disable()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        variants = pool.map(_compile, range(len(_variants)), chunksize=1)
    print(json.dumps({"kernels": _kernels(), "variants": variants}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
