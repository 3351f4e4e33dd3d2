"""Whether the Triton kernels or eager torch compute a BatchNorm in less time: `backend="auto"`.

    device time = bytes / bandwidth + launches * LAUNCH_US
    host time   = Python and C++ before the launches + launches * LAUNCH_US
    cost        = the longer of the two, because the host works ahead of the device; of two whose
                  host times differ by less than `HOST_NOISE`, that of the device

in training of a forward and a backward, in evaluation of a forward. Where a row was measured on the
device (measurements.py), its device time replaces the counted one. Its host time does not: that of
one call on a shared machine varies by a factor of two. If the costs are equal, eager torch is
chosen.

T is one pass over x. Eager torch: 3T forward and 5T backward; an addition is 3T more in the
forward, an activation 2T in the forward and 3T in the backward. The Triton kernels:
`forward_passes` and `backward_passes`. The bandwidth is a share of that of a copy: `TRITON_SHARE`,
and `_eager_share` for torch's BatchNorm. On an H200 the choice by counted costs alone takes at most
3% longer than the better one in 740 of 750 measured cases (benchmarks/results/gpu_day/times.csv).

Source of the counts of eager torch: ATen/native/cuda/Normalization.cu.
"""

import math
from typing import NamedTuple

import torch

from bn_lightning.kernels.activations import ACTIVATIONS, Saves, saves_mask
from bn_lightning.kernels.measurements import Cost, Fusion, Table, Tensors
from bn_lightning.kernels.schedule import Device, Regime, make_schedule

# A launch takes about as long on the host as an empty kernel on the device: on an H200 the six of
# `two_pass` at (60, 100) take 13 us.
LAUNCH_US = 3.0
# Host times that differ by less are equal; then the device decides, as it does in a CUDA graph.
HOST_NOISE = 1.1
# Of the bandwidth of a copy: the median over the shapes that were measured on an H200.
TRITON_SHARE = 0.85
# A copy's share of the bandwidth that clock and width of the memory give: 3.0 of 3.35 TB/s on an
# H100, 4.3 of 4.8 on an H200.
COPY_SHARE = 0.9
# An H200's, where torch does not report the clock of the memory.
DEFAULT_BYTES_PER_US = 4.3e6


class HostTime(NamedTuple):
    """Microseconds on the host, without the launches: in training forward and backward.

    Attributes:
        batch_norm: of a BatchNorm module.
        activation: more, if an activation follows.
        addition: more, if a residual is added.
    """

    batch_norm: float
    activation: float
    addition: float

    def of(self, fusion: Fusion) -> float:
        """Return the time of what `fusion` contains."""
        activation = self.activation * (fusion.activation != "identity")
        return self.batch_norm + activation + self.addition * fusion.has_residual


# For (2, 8), fp32, modules in training and in evaluation, on one thread of a shared x86-64 machine:
# benchmarks/results/host_overhead.csv of 2026-11-26, with torch 2.13.0 and Triton 3.7.1, without a
# GPU. On the slower host of an H200 all take about twice as long; ratios are in
# benchmarks/results/gpu_day/host_overhead.csv.
EAGER_HOST = {True: HostTime(69.2, 13.9, 12.0), False: HostTime(11.6, 1.7, 1.9)}
TRITON_HOST = {True: HostTime(68.3, 0.0, 4.5), False: HostTime(10.8, 0.0, 0.5)}
# In 200 bursts where Triton itself launches each kernel (triton_launcher.py).
ORDINARY_LAUNCH_HOST = {True: HostTime(283.4, 0.0, 43.0), False: HostTime(47.5, 0.0, 0.8)}


class Machine(NamedTuple):
    """A device, as far as costs depend on it.

    Attributes:
        name: as torch reports it; the key of measured rows.
        device: what the schedule depends on.
        bytes_per_us: bandwidth of a copy, bytes read and written per microsecond.
        knows_triton: whether Triton's launcher is called directly (triton_launcher.py).
    """

    name: str
    device: Device
    bytes_per_us: float
    knows_triton: bool


def copy_bandwidth(memory_clock_khz: int, memory_bus_bits: int) -> float:
    """Return the bytes per microsecond of a copy in memory of two transfers per clock.

    Args:
        memory_clock_khz: 0 if it is unknown.
        memory_bus_bits: 0 if it is unknown.
    """
    peak = 2 * memory_clock_khz * 1e-3 * memory_bus_bits / 8
    return COPY_SHARE * peak if peak else DEFAULT_BYTES_PER_US


def triton_is_cheaper(tensors: Tensors, fusion: Fusion, machine: Machine, table: Table) -> bool:
    """Return whether the Triton kernels take less time than eager torch; see the module.

    Args:
        tensors: with two dimensions or more, none of them 0.
        fusion: what is computed.
        machine: where.
        table: what was measured; it needs rows of eager torch and of a regime.
    """
    eager, triton = (count(tensors, fusion, machine) for count in (eager_cost, triton_cost))
    measured = table.find(machine.name, tensors, fusion)
    if measured.eager is not None and measured.triton is not None:
        eager = eager._replace(device_us=measured.eager.device_us)
        triton = triton._replace(device_us=measured.triton.device_us)
    if triton.host_us < HOST_NOISE * eager.host_us and triton.device_us < eager.device_us:
        return True
    return triton.us < eager.us


def triton_cost(tensors: Tensors, fusion: Fusion, machine: Machine) -> Cost:
    """Count the cost of the Triton kernels, in the regimes that the schedule chooses."""
    shape, dtype, channels_last = tensors
    has_mask = fusion.training and saves_mask(fusion.activation, fusion.has_residual)
    forward, backward = (
        make_schedule(
            shape,
            dtype.itemsize,
            channels_last,
            machine.device,
            writes_mask=has_mask and is_forward,
            reads_mask=has_mask and not is_forward,
        )
        for is_forward in (True, False)
    )
    passes = forward_passes(fusion, dtype, forward.regime)
    launches = 1
    if fusion.training:
        passes += backward_passes(fusion, dtype, backward.regime)
        # Statistics, the kernel that finishes them, y; sums, the one that adds splits, dx.
        launches = 3 if forward.regime is Regime.TWO_PASS else 1
        launches += 2 + (backward.splits > 1) if backward.regime is Regime.TWO_PASS else 1
    device_us = passes * _bytes(tensors) / (TRITON_SHARE * machine.bytes_per_us)
    host = TRITON_HOST if machine.knows_triton else ORDINARY_LAUNCH_HOST
    host_us = host[fusion.training].of(fusion)
    return Cost(device_us + launches * LAUNCH_US, host_us + launches * LAUNCH_US)


def forward_passes(fusion: Fusion, dtype: torch.dtype, regime: Regime) -> float:
    """Count the bytes that the forward of the Triton kernels moves, in passes over x.

    In training `two_pass` reads x twice. A bit mask is a fraction of a pass.
    """
    reads = 2 if fusion.training and regime is Regime.TWO_PASS else 1
    has_mask = fusion.training and saves_mask(fusion.activation, fusion.has_residual)
    return reads + fusion.has_residual + 1 + (_mask_passes(dtype) if has_mask else 0)


def backward_passes(fusion: Fusion, dtype: torch.dtype, regime: Regime) -> float:
    """Count the bytes that the backward of the Triton kernels moves in training, in passes over x.

    It reads dy, x and with a residual what activations.py lists, all of it twice in `two_pass`.
    It writes dx and, behind an activation, the gradient of the residual.
    """
    saves = ACTIVATIONS[fusion.activation].saves if fusion.has_residual else Saves.NOTHING
    needed = {Saves.NOTHING: 0.0, Saves.MASK: _mask_passes(dtype)}.get(saves, 1.0)
    times = 2 if regime is Regime.TWO_PASS else 1
    return times * (2 + needed) + 1 + (fusion.has_residual and fusion.activation != "identity")


def _mask_passes(dtype: torch.dtype) -> float:
    """Return the size of a bit mask without the padding of its rows, in tensors of `dtype`."""
    return 1 / (8 * dtype.itemsize)


def eager_cost(tensors: Tensors, fusion: Fusion, machine: Machine) -> Cost:
    """Count the cost of eager torch: `F.batch_norm`, an addition and an activation."""
    acts, adds = fusion.activation != "identity", fusion.has_residual
    share = _eager_share(tensors, fusion.training, machine.device)
    if fusion.training:
        # The forward reduces in one pass; the backward is one kernel.
        passes = (1 + 5) / share + 2 + 3 * adds + (2 + 3) * acts
        # Statistics, their update, y; the gradients, in two kernels if x is channels-last.
        launches = 3 + (2 if tensors.channels_last else 1) + adds + 2 * acts
    else:
        passes, launches = 2 / share + 3 * adds + 2 * acts, 1 + adds + acts
    device_us = passes * _bytes(tensors) / machine.bytes_per_us
    host_us = EAGER_HOST[fusion.training].of(fusion)
    return Cost(device_us + launches * LAUNCH_US, host_us + launches * LAUNCH_US)


def _eager_share(tensors: Tensors, training: bool, device: Device) -> float:
    """Return the share of a copy's bandwidth that torch's BatchNorm has, as on an H200.

    In training of its reductions. Those of a contiguous x have one program per channel, and two fit
    a multiprocessor. cuDNN computes what is not bf16 and not (N, C).
    """
    shape, dtype, channels_last = tensors
    if not training:
        return 0.45 if dtype.itemsize == 2 else 0.7
    if channels_last and dtype is not torch.bfloat16:
        return 0.8
    if channels_last or len(shape) == 2:
        return 0.33
    whole = {torch.bfloat16: 0.25, torch.float16: 0.35, torch.float32: 0.7}[dtype]
    return whole * min(1.0, shape[1] / (2 * device.processors))


def _bytes(tensors: Tensors) -> int:
    """Return T, the bytes of one pass over x."""
    return math.prod(tensors.shape) * tensors.dtype.itemsize
