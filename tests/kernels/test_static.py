"""Every kernel variant compiles for the GPUs people have, without one, spills no tile, and moves 16
bytes at a time where a tensor is aligned.

Run as a script, in a process without TRITON_INTERPRET, this file records the launches that calls
make, on tensors without memory, compiles each for one target and prints what it found as JSON; the
tests below start it and judge. `python tests/kernels/test_static.py cuda 90 32 --all` goes through
every activation in every layout, dtype and regime, which takes minutes.
"""

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = {
    "_bn_partial_statistics_kernel",
    "_bn_finish_statistics_kernel",
    "_bn_finish_partial_kernel",
    "_bn_evaluation_statistics_kernel",
    "_bn_forward_normalize_kernel",
    "_bn_forward_small_kernel",
    "_bn_forward_resident_kernel",
    "_bn_backward_partial_sums_kernel",
    "_bn_backward_finish_sums_kernel",
    "_bn_backward_input_kernel",
    "_bn_backward_small_kernel",
    "_bn_backward_resident_kernel",
}
# Those that walk tensors; the others read and write a few numbers a channel.
WALKS = {k for k in KERNELS if "finish" not in k and "evaluation" not in k}
WRITES = {k for k in WALKS if "partial" not in k}

# Name -> shape, channels-last, whether rows begin at multiples of 16 bytes.
LAYOUTS: dict[str, tuple[tuple[int, ...], bool, bool]] = {
    "ncl": ((256, 64, 56, 56), False, True),
    "channels_last": ((64, 64, 28, 28), True, True),
    "small_maps": ((256, 256, 7, 7), False, False),
    "rows": ((60, 100), False, False),
    "one_channel": ((16, 1, 64), False, True),
    "wide": ((4096, 64, 128, 128), False, True),
}


@pytest.mark.parametrize(
    ("backend", "arch", "warp_size"),
    [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)],
    ids=["sm_80", "sm_90", "gfx942"],
)
def test_kernels_compile_without_spills_and_with_wide_accesses(
    backend: str, arch: int | str, warp_size: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, __file__, backend, str(arch), str(warp_size)],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["binary_bytes"] > 0, row
        assert row["spills"] == 0, row
        if row["aligned"] and row["kernel"] in WALKS:
            assert row["loads_of_16_bytes"] > 0 and row["loads_of_2_bytes"] == 0, row
        if row["aligned"] and row["kernel"] in WRITES:
            assert row["stores_of_16_bytes"] > 0 and row["stores_of_2_bytes"] == 0, row
    aligned = {row["kernel"] for row in rows if row["aligned"]}
    assert aligned >= WALKS


class _Recorder:
    """Stands in a kernel's place and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.launches.append((self.kernel, arguments))


@dataclass(frozen=True)
class _Call:
    """One BatchNorm of a layout, in the regimes named."""

    layout: str
    dtype: torch.dtype
    activation: str
    has_residual: bool
    training: bool
    regimes: tuple[str, ...] = ("single_launch", "two_pass", "persistent")


FEW = (
    _Call("ncl", torch.bfloat16, "relu", True, True),
    _Call("channels_last", torch.bfloat16, "silu", True, True),
    _Call("ncl", torch.float32, "identity", False, True, ("two_pass",)),
    _Call("wide", torch.bfloat16, "tanh", True, True, ("single_launch",)),
    _Call("small_maps", torch.bfloat16, "leaky_relu", True, True, ("two_pass",)),
    _Call("rows", torch.float32, "sigmoid", False, True, ("single_launch",)),
    _Call("one_channel", torch.float16, "identity", True, False, ("two_pass",)),
)


def _calls(everything: bool) -> Iterator[_Call]:
    """Lists what is compiled: each branch once, and each activation with and without a residual in
    `split` and in one other regime, going round the layouts; or each in every combination."""
    from bn_lightning.kernels.activations import ACTIVATIONS

    yield from FEW
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    fusions = list(product(ACTIVATIONS, (True, False)))
    if not everything:
        for i, (activation, has_residual) in enumerate(fusions):
            # The steps have no common factor, so that layout, dtype and regime mix.
            layout, dtype = list(LAYOUTS)[i % 5], dtypes[i % 7 % 2]
            other = ("single_launch", "persistent")[i % 3 % 2]
            yield _Call(layout, dtype, activation, has_residual, True, ("two_pass", other))
        return
    for layout, dtype, (activation, has_residual) in product(LAYOUTS, dtypes, fusions):
        yield _Call(layout, dtype, activation, has_residual, dtype != torch.float16)


def _record(warp_size: int, everything: bool) -> list[tuple[str, bool, Any, dict[str, Any]]]:
    """Makes the calls and returns (layout, aligned, kernel, arguments) of each launch."""
    from bn_lightning.kernels import backward, normalize
    from bn_lightning.kernels import persistent as resident
    from bn_lightning.kernels import single_launch as small
    from bn_lightning.kernels import stats as statistics
    from bn_lightning.kernels.activations import ACTIVATIONS, Saves
    from bn_lightning.kernels.arguments import BackwardCall, ForwardCall
    from bn_lightning.kernels.schedule import Device, Regime, forced_regime, make_schedule

    launches: list[tuple[Any, dict[str, Any]]] = []
    for module in (statistics, normalize, backward, small, resident):
        for name in [n for n in vars(module) if re.fullmatch(r"_bn_\w+_kernel", n)]:
            setattr(module, name, _Recorder(getattr(module, name), launches))
    registers = 1 << 16 if warp_size == 32 else 0
    device = Device(132, cache_bytes=50 << 20, warp_size=warp_size, registers=registers)
    found = []
    for wanted in _calls(everything):
        layout, dtype, activation = wanted.layout, wanted.dtype, wanted.activation
        has_residual, training = wanted.has_residual, wanted.training
        shape, channels_last, aligned = LAYOUTS[layout]
        C = shape[1]
        x = torch.empty(shape, dtype=dtype, device="meta")
        residual = x if has_residual else None
        per_channel = torch.empty(C, device="meta")
        affine = None if layout == "one_channel" else per_channel
        saves = ACTIVATIONS[activation].saves
        mask = has_residual and saves is Saves.MASK
        forward = ForwardCall(
            x, residual, affine, affine, affine, affine,
            torch.empty((), dtype=torch.int64, device="meta"),
            None if dtype is torch.float16 else 0.1, 1e-5, activation, 0.01, mask,
        )  # fmt: skip
        back = BackwardCall(
            x,
            x,
            residual if saves is Saves.RESIDUAL else None,
            x if has_residual and saves is Saves.OUTPUT else None,
            torch.empty(1, dtype=torch.uint8, device="meta") if mask else None,
            per_channel, per_channel, affine, affine, activation, 0.01, training,
            True, True, has_residual and activation != "identity",
        )  # fmt: skip
        begin = len(launches)
        for regime in wanted.regimes:
            with forced_regime(Regime(regime)):
                schedule = make_schedule(
                    shape, x.element_size(), channels_last, device,
                    writes_mask=mask, cumulative=forward.momentum is None,
                )  # fmt: skip
            if schedule.regime is Regime.TWO_PASS:
                partials = statistics.partial_statistics(x, schedule)
                statistics.finish_statistics(partials, forward, schedule)
                statistics.finish_partial(partials, per_channel, per_channel, schedule)
                normalize.normalize(forward, per_channel, per_channel, schedule)
                backward.affine_gradients(back, schedule)
                backward.input_gradients(back, per_channel, per_channel, schedule)
            elif schedule.regime is Regime.SINGLE_LAUNCH:
                small.forward(forward, schedule)
                small.backward(back, schedule)
            elif schedule.regime is Regime.PERSISTENT:
                resident.forward(forward, schedule)
                resident.backward(back, schedule)
            else:
                raise ValueError(
                    f"expected a regime this file knows, got {schedule.regime}; launch its kernels "
                    f"here"
                )
        statistics.evaluation_statistics(per_channel, per_channel, 1e-5)
        found += [(layout, aligned and dtype is torch.bfloat16, *v) for v in launches[begin:]]
    return found


def _source(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, int], str]:
    """Specialises a launch as Triton does: constants, multiples of 16, types."""
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    names |= {torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if value is None or parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{names[value.dtype]}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: arguments[k] for k in ("num_warps", "maxnreg") if k in arguments}
    key = repr((kernel.__name__, signature, constants, sorted(attributes), options))
    return ASTSource(kernel, signature, constants, attributes), options, key


def _resources(compiled: Any) -> dict[str, int]:
    """Returns the size of the binary, the bytes or registers it spills, and its accesses."""
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
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ptx = compiled.asm["ptx"]
    # STACK and LOCAL are where a kernel that calls nothing keeps what does not fit its registers.
    spilled = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    if not spilled:
        raise RuntimeError(f"expected cuobjdump to list STACK and LOCAL, got {usage!r}")
    return {
        "binary_bytes": len(compiled.asm["cubin"]),
        "spills": sum(map(int, spilled)),
        "loads_of_16_bytes": len(re.findall(r"\bld\.global\S*\.v4\.\w32\b", ptx)),
        "loads_of_2_bytes": len(re.findall(r"\bld\.global\S*\.\w16\b", ptx)),
        "stores_of_16_bytes": len(re.findall(r"\bst\.global\S*\.v4\.\w32\b", ptx)),
        "stores_of_2_bytes": len(re.findall(r"\bst\.global\S*\.\w16\b", ptx)),
        "registers": max(map(int, re.findall(r"\bREG:(\d+)", usage))),
    }


# What the processes compile: it holds functions, which a fork has and a message has not.
_variants: list[tuple[dict[str, Any], Any, dict[str, int], Any]] = []


def _compile(number: int) -> dict[str, Any]:
    import triton

    row, source, options, target = _variants[number]
    return row | _resources(triton.compile(source, target=target, options=options))


def _main(backend: str, arch: str, warp_size: str, everything: str = "") -> None:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size))
    seen = set()
    for layout, aligned, kernel, arguments in _record(int(warp_size), everything == "--all"):
        source, options, key = _source(kernel, arguments)
        if key in seen:
            continue
        seen.add(key)
        constants = {k: v for k, v in arguments.items() if isinstance(v, int | str | bool)}
        row = {"kernel": kernel.__name__, "layout": layout, "aligned": aligned}
        _variants.append((row | {"arguments": constants}, source, options, target))
    # Compiling makes many objects and few cycles: looking for those takes 5 to 9 % of the time.
    gc.disable()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        print(json.dumps(pool.map(_compile, range(len(_variants)), chunksize=1)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
