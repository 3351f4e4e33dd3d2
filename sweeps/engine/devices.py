"""Which GPUs each worker process of a sweep sees.

A worker sees its own by CUDA_VISIBLE_DEVICES, which PyTorch follows on ROCm, too. Where that
variable or HIP_VISIBLE_DEVICES is set, its devices are shared out, by index, UUID or MIG name. In a
machine whose GPUs are split by MIG, CUDA shows one part unless the variable names several.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bn_lightning.sweeps.engine.sweep_error import SweepError

_CUDA, _HIP, _ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
_COUNT_WITH_TORCH = "import torch; print(torch.cuda.device_count())"


def count_devices() -> int:
    """Return the number of GPUs of this machine. CUDA and HIP are not started in this process."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        nvml = None
    count = ctypes.c_uint(0)
    if nvml is not None and nvml.nvmlInit_v2() == 0:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
        return count.value
    if not Path("/dev/kfd").exists():  # of AMD's driver
        return 0
    command = [sys.executable, "-c", _COUNT_WITH_TORCH]
    counted = subprocess.run(command, capture_output=True, text=True)
    return int(counted.stdout) if counted.returncode == 0 else 0


def worker_devices(
    n_workers: int,
    per_worker: int | None,
    environment: Mapping[str, str],
    count: Callable[[], int] = count_devices,
) -> list[dict[str, str]]:
    """Return the environment variables by which each worker sees its own devices.

    Workers share devices in turn if there are more workers than devices for them.

    Args:
        n_workers: number of workers.
        per_worker: devices of each; 0 leaves all to all, None is 1 if there are devices.
        environment: of this process.
        count: returns the number of GPUs of the machine.

    Raises:
        SweepError: there are fewer devices than `per_worker`.
    """
    if per_worker == 0:
        return [{}] * n_workers
    variable, devices = _visible(environment, count)
    if per_worker is not None and per_worker > len(devices):
        raise SweepError(
            f"expected `hydra.sweeper.devices_per_job` to be at most {len(devices)}, the GPUs that "
            f"this process sees, got {per_worker}; lower it, or make more of them visible"
        )
    if not devices:
        return [{}] * n_workers
    size = per_worker or 1
    groups = [devices[i * size : (i + 1) * size] for i in range(len(devices) // size)]
    return [{variable: ",".join(groups[i % len(groups)])} for i in range(n_workers)]


def sharing_notice(variables: list[dict[str, str]]) -> str | None:
    """Return a sentence for a user if workers share devices; None if each has its own."""
    groups = {tuple(worker.items()) for worker in variables if worker}
    if len(groups) in (0, len(variables)):
        return None
    seen = ", ".join(sorted(value for group in groups for _, value in group))
    return f"{len(variables)} workers share the GPUs {seen}"


def _visible(environment: Mapping[str, str], count: Callable[[], int]) -> tuple[str, list[str]]:
    """Return a variable that selects devices, and the devices that it may name."""
    for variable in (_HIP, _CUDA):
        if variable in environment:
            return variable, _named(environment[variable])
    if _ROCR in environment:  # HIP numbers what that leaves from 0
        return _HIP, [str(i) for i in range(len(_named(environment[_ROCR])))]
    return _CUDA, [str(i) for i in range(count())]


def _named(text: str) -> list[str]:
    """Return the devices that a variable names. As for CUDA, the first invalid name ends them."""
    devices = []
    for name in (part.strip() for part in text.split(",")):
        if not name.isdecimal() and not name.startswith(("GPU-", "MIG-")):
            break
        devices.append(name)
    return devices
