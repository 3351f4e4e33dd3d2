"""Choose the backend of a tensor, and its schedule.

This module looks for Triton when it is imported, and imports it only to see whether it interprets
and, on a GPU, what its launches cost.
"""

import functools
import importlib.util

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from bn_lightning.kernels.cost import Machine, copy_bandwidth, triton_is_cheaper
from bn_lightning.kernels.layout import strides_are_channels_last
from bn_lightning.kernels.measurements import Fusion, Tensors, load_table
from bn_lightning.kernels.schedule import INTERPRETER, Device, Schedule, make_schedule

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# It says whether a backward pass is running; it is not used as a context manager.
_tracker = ModuleTracker()


def chooses_triton(x: Tensor, backend: str, fusion: Fusion) -> bool:
    """Return whether the Triton kernels compute the BatchNorm of `x`.

    "auto" takes them where they cost less than eager torch. A compiler and a subclass of Tensor, as
    a fake one, may have symbolic shapes and other costs: there "auto" takes them where it can.

    Args:
        x: (N, C, ...).
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.
        fusion: what is computed.

    Raises:
        ValueError: "triton" for a tensor that the kernels do not support.
    """
    if not uses_triton(x, backend):
        return False
    if backend == "triton" or torch.compiler.is_compiling() or type(x) not in _PLAIN_TYPES:
        return True
    return _is_cheaper(x.device, x.shape, x.stride(), x.dtype, fusion)


@functools.lru_cache(maxsize=4096)
def _is_cheaper(
    device: torch.device,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    fusion: Fusion,
) -> bool:
    if len(shape) < 2:
        # The checks of the arguments raise.
        return True
    tensors = Tensors(tuple(shape), dtype, strides_are_channels_last(shape, stride))
    return triton_is_cheaper(tensors, fusion, machine_of(device), load_table())


def uses_triton(x: Tensor, backend: str) -> bool:
    """Return whether the Triton kernels can compute `x` and `backend` lets them, whatever it costs.

    They never compute an empty tensor.

    Args:
        x: (N, C, ...).
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Raises:
        ValueError: "triton" for a tensor that the kernels do not support.
    """
    if backend == "triton":
        _check_triton_takes(x)
        return x.numel() > 0
    takes = backend == "auto" and x.is_cuda and TRITON_INSTALLED and x.dtype in _TRITON_DTYPES
    return takes and x.numel() > 0


def _check_triton_takes(x: Tensor) -> None:
    advice = 'use backend="auto" or backend="native"'
    if not TRITON_INSTALLED:
        raise ValueError(
            f'expected Triton to be installed for `backend`="triton", got no triton package; '
            f"{advice}, or pip install triton"
        )
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f'expected `x` to be fp32, fp16 or bf16 for `backend`="triton", got {x.dtype}; {advice}'
        )
    # A compiler cannot trace the check; in compiled code the ops check.
    if not torch.compiler.is_compiling():
        check_device(x)


def check_device(x: Tensor) -> None:
    """Check that the kernels can read `x`; they run on the CPU only in the interpreter.

    Raises:
        ValueError: an `x` on a device that they cannot read.
    """
    if x.is_cuda:
        return
    if x.device.type == "cpu":
        from triton.runtime import JITFunction

        from bn_lightning.kernels import stats

        # TRITON_INTERPRET takes effect when the kernels are defined, so they are asked.
        if not isinstance(stats._bn_forward_finish_statistics_kernel, JITFunction):
            return
    raise ValueError(
        f'expected `x` to be on a CUDA or ROCm device for `backend`="triton", got {x.device}; '
        f'use backend="auto" or backend="native", or, to run the kernels on CPU tensors under '
        f"Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
    )


def is_recomputation() -> bool:
    """Return whether a backward pass is running, as when checkpointing re-runs a forward.

    Never after `update_in_recomputation(True)`.
    """
    return not (torch.compiler.is_compiling() or _updates_in_recomputation) and _tracker.is_bw


_updates_in_recomputation = False


def update_in_recomputation(enabled: bool) -> None:
    """Choose how often activation checkpointing, which runs a forward twice, updates statistics.

    Args:
        enabled: True for twice, as torch's BatchNorms do; False, the default, for once. For all
            BatchNorms of this package.
    """
    global _updates_in_recomputation
    _updates_in_recomputation = enabled


def updates_in_recomputation() -> bool:
    """Return what `update_in_recomputation` chose."""
    return _updates_in_recomputation


def schedule_of(
    x: Tensor,
    channels_last: bool,
    *,
    writes_mask: bool = False,
    reads_mask: bool = False,
    cumulative: bool = False,
) -> Schedule:
    """Return the schedule of `x` on its device; the flags are those of `make_schedule`."""
    tensors = Tensors(tuple(x.shape), x.dtype, channels_last)
    return make_schedule(
        tensors.shape,
        x.element_size(),
        channels_last,
        _device(x.device),
        writes_mask=writes_mask,
        reads_mask=reads_mask,
        cumulative=cumulative,
        measured=load_table().regime(device_name(x.device), tensors),
    )


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name under which a device is measured: torch's, or "interpreter" without a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


_devices: dict[torch.device, Device] = {}


def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    if device not in _devices:
        found = torch.cuda.get_device_properties(device)
        _devices[device] = Device(
            found.multi_processor_count,
            found.L2_cache_size,
            found.warp_size,
            # Missing in torch's stubs.
            0 if torch.version.hip else getattr(found, "regs_per_multiprocessor", 0),
        )
    return _devices[device]


def machine_of(device: torch.device) -> Machine:
    """Return what costs depend on; without a GPU, the interpreter's."""
    clock = width = 0
    is_known = False
    if device.type == "cuda":
        from bn_lightning.kernels.triton_launcher import knows_triton

        is_known = knows_triton()
        found = torch.cuda.get_device_properties(device)
        clock, width = found.memory_clock_rate, found.memory_bus_width
    return Machine(device_name(device), _device(device), copy_bandwidth(clock, width), is_known)
