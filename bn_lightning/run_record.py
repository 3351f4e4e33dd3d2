"""What a run leaves on disk: `run.json`, written whole or not at all.

A run's directory holds

    .hydra/                   the configuration as Hydra composed it, and the overrides typed
    run.json                  this module's record
    metrics.csv               metrics against steps (metrics_csv.py)
    checkpoints/best.ckpt     highest validation accuracy
    checkpoints/last.ckpt     where the run goes on when resumed
    figures/                  accuracy and activation percentiles against steps
"""

import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FILE_NAME = "run.json"
STATUSES = ("running", "completed", "diverged", "pruned", "failed", "interrupted")

UNFINISHED = ".part"
"""How the name of a file ends that is not whole yet; it begins with a dot."""

_PACKAGES = ("bn-lightning", "torch", "triton", "lightning", "torchmetrics", "hydra-core", "optuna")


class RunRecord:
    """The record of one run, on disk as `directory/run.json` from its first moment to its last.

    Keys: `schema_version`, `status` (one of `STATUSES`), `command`, `config` (resolved), `seed`,
    `data` (source, SHA-256 of its files, sizes), `versions`, `hardware`, `commit` (None outside a
    git checkout), `started` and `ended` (UTC, ISO 8601), `steps`, `seconds` (of training, since it
    was last resumed), `steps_per_second`, `peak_memory_mib`, `metrics`, `resumed_at` (the steps),
    `diverged_at` (a step) and `error` where they apply.

    Args:
        directory: the run's; it exists.
        config: the resolved configuration, plain dicts and lists.
        write: False on all ranks but the first, which then keep the record in memory.
    """

    def __init__(self, directory: str | Path, config: dict[str, Any], write: bool = True) -> None:
        self.path = Path(directory) / FILE_NAME
        self.write = write
        self.content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "command": sys.argv,
            "config": config,
            "seed": config.get("seed"),
            "data": None,
            "versions": package_versions(),
            "hardware": hardware(),
            "commit": git_commit(),
            "started": _now(),
            "ended": None,
            "resumed_at": [],
        }

    def update(self, **content: Any) -> None:
        """Set keys of the record and write it."""
        self.content.update(content)
        if self.write:
            write_json(self.path, self.content)

    def end(self, status: str, **content: Any) -> None:
        """Write the final status and whatever else became known."""
        if status not in STATUSES:
            raise ValueError(f"`status` expected one of {', '.join(STATUSES)}, got {status!r}")
        self.update(status=status, ended=_now(), peak_memory_mib=peak_memory_mib(), **content)


def read_run(directory: str | Path) -> dict[str, Any]:
    """The record in `directory/run.json`.

    Raises:
        ValueError: there is none, it is not JSON, of a schema this version does not know, or of no
            run.
    """
    path = Path(directory) / FILE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} expected a run's directory with a {FILE_NAME}, got {error}"
        ) from error
    found = record.get("schema_version") if isinstance(record, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{path} expected schema_version {SCHEMA_VERSION}, got {found}; read it with the "
            "version of bn_lightning that wrote it"
        )
    if record.get("status") not in STATUSES or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} expected the status and config of a run, got a file without them")
    return record


def run_outcome(record: dict[str, Any]) -> dict[str, Any]:
    """What a sweep keeps of a run: its metrics, and what tells runs apart, as numbers and text."""
    return record["metrics"] | {
        "diverged": record["status"] == "diverged",
        "diverged_at": record.get("diverged_at"),
        "data": (record["data"] or {}).get("source"),
        "classes": number_of_classes(record),
        "commit": record["commit"],
        "steps": record["steps"],
    }


def number_of_classes(record: Mapping[str, Any]) -> int | None:
    """How many classes a run told apart, by its data, else by its model; None if not known."""
    model = (record.get("config") or {}).get("model") or {}
    return (record.get("data") or {}).get("classes") or model.get("num_classes")


def logged_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A Trainer's metrics as plain numbers, without `step`, which is their x axis."""
    return {name: float(value) for name, value in metrics.items() if name != "step"}


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step; numbers that JSON lacks, NaN and infinities, become null."""
    write_atomically(path, json.dumps(finite(content), indent=2, default=str) + "\n")


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace `path` by a file with this content: a reader sees the old one or the new one, whole.

    Raises:
        OSError: it names `path`, whatever the system refused.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the user's eyes only; a run's are as readable as its directory's.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # gone with its folder
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` was writing in a folder when its process was killed.

    Nobody may be writing there.
    """
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink()


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def finite(content: Any) -> Any:
    """Plain data with None in place of the numbers that JSON lacks, NaN and infinities."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content
