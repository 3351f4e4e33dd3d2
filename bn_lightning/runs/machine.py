"""The machine: what a result was made with and on, and how many processes it may be asked for."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MOST_PROCESSES = max(64, os.cpu_count() or 1)
"""More processes or threads help nobody; a few zeros too many would take the machine with them."""

_PACKAGES = ("bn-lightning", "torch", "triton", "lightning", "torchmetrics", "hydra-core", "optuna")


def package_versions() -> dict[str, str | None]:
    """Installed versions of Python and of the packages a result depends on; None if absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of torch, and the accelerators that torch sees."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, "-dirty" if files differ from it."""
    directory = Path(__file__).parent
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def peak_memory_mib() -> float:
    """The largest resident set of this process so far, in MiB."""
    try:
        # getrusage would count what the process that started this one held, too.
        with open("/proc/self/status", encoding="ascii") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # which Windows lacks, as it lacks /proc

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib = peak // 2**10 if sys.platform == "darwin" else peak  # macOS counts in bytes
    return round(kib / 2**10, 1)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
