"""What a BatchNorm launches, compiled for a GPU that need not be here.

The launches of forwards and backwards on tensors without memory are recorded, and specialized as
Triton's launcher does. Used by instruction_counts.py and tests/kernels/test_static.py, in processes
without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

from bn_lightning.kernels import dispatch, launch, stats
from bn_lightning.kernels.activations import ACTIVATIONS, Saves
from bn_lightning.kernels.arguments import Backward, BackwardNeeds, Forward, RunningStatistics
from bn_lightning.kernels.layout import as_layout
from bn_lightning.kernels.schedule import Device, Regime, Schedule, forced_regime

H200 = Device(132, cache_bytes=50 << 20, registers=1 << 16)


class Call(NamedTuple):
    """A BatchNorm.

    Attributes:
        shape: (N, C, ...) of x.
        channels_last: whether the channels are neighbours in memory.
        dtype: of x.
        activation: a key of `ACTIVATIONS`.
        has_residual: whether a residual is added.
        affine: whether there are weight, bias and running statistics.
        momentum: of the running statistics.
        training: of the backward; the forward runs in training and in evaluation.
        regime: forced, or None for the one that the schedule chooses.
    """

    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    activation: str
    has_residual: bool
    affine: bool = True
    momentum: float | None = 0.1
    training: bool = True
    regime: Regime | None = None


class Launch(NamedTuple):
    """A launch that was recorded.

    Attributes:
        part: "forward", "evaluation", "backward", or "synchronized": the statistics of one rank.
        kernel: the jit function.
        grid: programs in each dimension.
        arguments: of the kernel, and launch options.
    """

    part: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_launches: list[Launch] = []
_part = ""


def record_on(device: Device) -> None:
    """Replace Triton's launcher by a recorder, and the device by `device`, in this process."""

    def run(kernel: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        _launches.append(Launch(_part, kernel, tuple(grid), arguments))

    JITFunction.run = run
    launch.check_device = lambda x: None
    dispatch._device = lambda _: device


def record(call: Call) -> tuple[list[Launch], dict[str, Schedule]]:
    """Run forwards and a backward with all gradients, and return what they launch.

    Args:
        call: which.

    Returns:
        The launches, and the schedule of each part.
    """
    if call.regime is not None:
        with forced_regime(call.regime):
            return record(call._replace(regime=None))
    x = as_layout(torch.empty(call.shape, dtype=call.dtype, device="meta"), call.channels_last)
    per_channel = torch.empty(x.shape[1], device="meta")
    affine = per_channel if call.affine else None
    saves = ACTIVATIONS[call.activation].saves
    added = x if call.has_residual else None
    writes_mask = call.has_residual and saves is Saves.MASK
    forward = Forward(x, added, affine, affine, call.activation, 0.01, writes_mask=writes_mask)
    tracked = torch.empty((), dtype=torch.int64, device="meta")
    running = RunningStatistics(affine, affine, tracked, call.momentum)
    _start("forward")
    launch.run_forward(forward, running, 1e-5, training=True)
    found = list(_launches)
    running = RunningStatistics(per_channel, per_channel, None, call.momentum)
    _start("evaluation")
    launch.run_forward(forward, running, 1e-5, training=False)
    found += _launches
    backward = Backward(
        dy=x,
        x=x,
        residual=added if saves is Saves.RESIDUAL else None,
        y=added if saves is Saves.OUTPUT else None,
        mask=torch.empty(1, dtype=torch.uint8, device="meta") if writes_mask else None,
        mean=per_channel,
        rstd=per_channel,
        weight=affine,
        bias=affine,
        channels_last=call.channels_last,
        activation=call.activation,
        negative_slope=0.01,
    )
    writes_dresidual = call.has_residual and call.activation != "identity"
    _start("backward")
    launch.run_backward(backward, BackwardNeeds(call.training, True, True, writes_dresidual))
    found += _launches
    cumulative = call.momentum is None
    schedule = dispatch.schedule_of(
        x, call.channels_last, writes_mask=writes_mask, cumulative=cumulative
    )
    schedules = dict.fromkeys(("forward", "evaluation", "synchronized"), schedule)
    schedules["backward"] = dispatch.schedule_of(x, call.channels_last, reads_mask=writes_mask)
    _start("synchronized")
    partials = stats.compute_partials(x, schedule)
    stats.merge_partials(partials, per_channel, per_channel, schedule)
    return found + _launches, schedules


def _start(part: str) -> None:
    global _part
    _part = part
    _launches.clear()


def specialize(backend: Any, recorded: Launch) -> tuple[Any, dict[str, Any], str]:
    """Return what Triton's launcher would compile, its options, and a key of both."""
    kernel = recorded.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**recorded.arguments)
    _, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    key = repr((kernel.__name__, signature, constants, sorted(attributes.items()), options))
    return ASTSource(kernel, signature, constants, attributes), options, key


def run_tool(tool: str, compiled: Any, *options: str) -> str:
    """Run a tool that is part of Triton on the binary of a kernel for CUDA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run(
            [path, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Return registers and bytes of stack of a thread, for CUDA.

    A kernel that calls nothing keeps there what does not fit its registers.
    """
    usage = run_tool("cuobjdump", compiled, "--dump-resource-usage")
    registers = re.findall(r"\bREG:(\d+)", usage)
    stack = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    if not registers or not stack:
        raise RuntimeError(f"expected cuobjdump to list REG, STACK and LOCAL, got {usage!r}")
    return max(map(int, registers)), sum(map(int, stack))
