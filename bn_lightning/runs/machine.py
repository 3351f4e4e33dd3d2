"""Describe the machine and the versions that a result was made with."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bn_lightning

MAX_PROCESSES = max(64, os.cpu_count() or 1)
"""More processes or threads help nobody, and a few zeros too many would take the machine down."""

_PACKAGES = ("torch", "triton", "lightning", "torchmetrics", "hydra-core", "optuna")


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python, bn_lightning and what results depend on; None if absent."""
    versions = {"python": platform.python_version(), "bn-lightning": bn_lightning.__version__}
    return versions | {name: _version(name) for name in _PACKAGES}


def hardware() -> dict[str, Any]:
    """Return processor, cores, torch's threads, and the names of the GPUs that torch sees."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with "-dirty" if files differ from it.

    None outside a checkout.
    """
    directory = Path(__file__).parent
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def peak_memory_mib() -> float:
    """Return the largest resident set of this process so far, in MiB."""
    try:
        # getrusage also counts the memory of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # Windows has neither this module nor /proc

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib = peak // 2**10 if sys.platform == "darwin" else peak  # macOS counts in bytes
    return round(kib / 2**10, 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
