"""From a tensor to the kernels: which backend takes it, how it lies in memory, how it is cut.

Triton is looked for when this is imported, and imported only to see whether it interprets.
"""

import importlib.util

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from bn_lightning.kernels.schedule import INTERPRETER, Device, Schedule, make_schedule

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tells a backward pass from a forward one; its hooks are never entered.
_tracker = ModuleTracker()


def uses_triton(x: Tensor, backend: str) -> bool:
    """Says whether `x` goes to the Triton kernels; an empty `x` never does.

    Args:
        x: (N, C, ...).
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Raises:
        ValueError: "triton" for a tensor it cannot take.
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
            f'expected Triton to be installed for `backend`="triton", found none; {advice}, '
            f"or pip install triton"
        )
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f'expected `x` in fp32, fp16 or bf16 for `backend`="triton", got {x.dtype}; {advice}'
        )
    # A compiler cannot look at the kernels; there the ops check by themselves.
    if not torch.compiler.is_compiling():
        check_device(x)


def check_device(x: Tensor) -> None:
    """Checks that the kernels reach `x`: they run on the CPU only when interpreted.

    Raises:
        ValueError: an `x` on another device.
    """
    if x.is_cuda:
        return
    if x.device.type == "cpu":
        from triton.runtime import JITFunction

        from bn_lightning.kernels import stats

        # What TRITON_INTERPRET was when the kernels were made is what counts.
        if not isinstance(stats._bn_forward_finish_statistics_kernel, JITFunction):
            return
    raise ValueError(
        f'expected `x` on a CUDA or ROCm device for `backend`="triton", got one on {x.device}; '
        f'use backend="auto" or backend="native", or, to run the kernels on CPU tensors under '
        f"Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
    )


def is_recomputation() -> bool:
    """Says whether a forward runs inside a backward pass, as one of a checkpoint does."""
    return not torch.compiler.is_compiling() and _tracker.is_bw


def is_channels_last(x: Tensor) -> bool:
    """Says whether the channels lie side by side in memory; a contiguous `x` is not meant."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def as_layout(value: Tensor, channels_last: bool) -> Tensor:
    """Returns `value`, copied once if it does not lie in memory as wanted."""
    if not channels_last:
        return value.contiguous()
    return value.movedim(1, -1).contiguous().movedim(-1, 1)


def contiguous(value: Tensor | None) -> Tensor | None:
    """Returns a per-channel tensor, copied once if it is not contiguous; None for None."""
    return None if value is None else value.contiguous()


def schedule_of(x: Tensor, channels_last: bool, writes_mask: bool, cumulative: bool) -> Schedule:
    """Returns how the kernels cut `x` on its device; the flags are those of `make_schedule`."""
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
            # torch's stubs do not name it.
            0 if torch.version.hip else getattr(found, "regs_per_multiprocessor", 0),
        )
    return _devices[device]
