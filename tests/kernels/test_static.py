"""Every kernel compiles for the GPUs people have, without one, and spills no register.

Run as a script, in a process without TRITON_INTERPRET, this file compiles the kernels for one
target and prints what it found as JSON; the tests below start it and judge.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Shapes from whose schedules the tiles are taken: channels contiguous, small and large maps.
SHAPES = ((60, 100), (256, 256, 7, 7), (256, 64, 56, 56))
TENSORS = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
OPTIONAL = ("weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr")
FLOATS = ("momentum", "eps", "inverse_count")
KERNELS = {
    "_bn_partial_statistics_ncl_kernel",
    "_bn_partial_statistics_mc_kernel",
    "_bn_finish_statistics_kernel",
    "_bn_forward_normalize_ncl_kernel",
    "_bn_forward_normalize_mc_kernel",
    "_bn_backward_partial_sums_ncl_kernel",
    "_bn_backward_partial_sums_mc_kernel",
    "_bn_backward_finish_sums_kernel",
    "_bn_backward_dx_ncl_kernel",
    "_bn_backward_dx_mc_kernel",
}


@pytest.mark.parametrize(
    ("backend", "arch", "warp_size"),
    [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)],
    ids=["sm_80", "sm_90", "gfx942"],
)
def test_kernels_compile_and_do_not_spill(
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
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["binary_bytes"] > 0, row
        assert row["spills"] == 0, row


def _kernels() -> list[Any]:
    from bn_lightning.kernels import backward, normalize, statistics

    modules: tuple[ModuleType, ...] = (statistics, normalize, backward)
    names = ((m, n) for m in modules for n in vars(m) if re.fullmatch(r"_bn_\w+_kernel", n))
    return [getattr(m, n) for m, n in names]


def _variants(name: str) -> list[tuple[str, dict[str, Any], int]]:
    """Lists (dtype, constants, warps) for a kernel; Triton makes constants of 1 and None too."""
    from bn_lightning.kernels.schedule import Layout, make_schedule

    variants: list[tuple[str, dict[str, Any], int]] = []
    for shape in SHAPES:
        for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
            s = make_schedule(shape, itemsize)
            if "finish" in name:
                block_s, block_c = s.finish_tile
                variants.append((dtype, {"BLOCK_S": block_s, "BLOCK_C": block_c}, 4))
                continue
            if (s.layout is Layout.NCL) != ("_ncl_" in name):
                continue
            reduces = "statistics" in name or "sums" in name
            tile = s.reduction if reduces else s.elementwise
            rows = "BLOCK_M" if "_mc_" in name else "BLOCK_N" if reduces else "BLOCK_ROWS"
            columns = "BLOCK_C" if "_mc_" in name else "BLOCK_L"
            constants = {rows: tile.rows, columns: tile.columns, "TRAINING": True}
            variants.append((dtype, constants, tile.num_warps))
    # One sample, channel or split, no parameters, frozen: the other side of every branch.
    dtype, constants, num_warps = variants[0]
    least = {"N": 1, "C": 1, "S": 1, "TRAINING": False} | dict.fromkeys(OPTIONAL)
    frozen = (
        dict.fromkeys(("x_ptr", "mean_ptr", "dweight_ptr", "dbias_ptr")) if "dx" in name else {}
    )
    variants.append((dtype, constants | least | frozen, num_warps))
    return variants


def _compile(kernel: Any, dtype: str, given: dict[str, Any], num_warps: int, target: Any) -> Any:
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in given:
            signature[name] = "constexpr"
            constants[(i,)] = given[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in TENSORS else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def _resources(compiled: Any) -> dict[str, int]:
    """Returns the size of the binary and the bytes or registers it spills."""
    if "cubin" not in compiled.asm:
        counts = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        return {"binary_bytes": len(compiled.asm["hsaco"]), "spills": sum(map(int, counts))}
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    # STACK and LOCAL are where a kernel that calls nothing keeps what does not fit its registers.
    spilled = re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)
    if not spilled:
        raise RuntimeError(f"expected cuobjdump to list STACK and LOCAL, got {text!r}")
    return {"binary_bytes": len(compiled.asm["cubin"]), "spills": sum(map(int, spilled))}


def _main(backend: str, arch: str, warp_size: str) -> None:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size))
    rows = []
    for kernel in _kernels():
        for dtype, constants, num_warps in _variants(kernel.__name__):
            compiled = _compile(kernel, dtype, constants, num_warps, target)
            row = {"kernel": kernel.__name__, "dtype": dtype, "constants": constants}
            rows.append(row | _resources(compiled))
    print(json.dumps(rows))


if __name__ == "__main__":
    _main(*sys.argv[1:])
