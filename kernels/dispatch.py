"""Choose the backend of a tensor, and its schedule.

This module looks for Triton when it is imported, and imports it only to see whether it interprets.
"""

import importlib.util

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from bn_lightning.kernels.schedule import INTERPRETER, Device, Schedule, make_schedule

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# It says whether a backward pass is running; it is not used as a context manager.
_tracker = ModuleTracker()


def uses_triton(x: Tensor, backend: str) -> bool:
    """Return whether the Triton kernels compute `x`; they never do if it is empty.

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
    """Return whether a backward pass is running, as when checkpointing re-runs a forward."""
    return not torch.compiler.is_compiling() and _tracker.is_bw


def schedule_of(
    x: Tensor, channels_last: bool, *, writes_mask: bool = False, cumulative: bool = False
) -> Schedule:
    """Return the schedule of `x` on its device; the flags are those of `make_schedule`."""
    return make_schedule(
        x.shape,
        x.element_size(),
        channels_last,
        _device(x.device),
        writes_mask=writes_mask,
        cumulative=cumulative,
    )


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
