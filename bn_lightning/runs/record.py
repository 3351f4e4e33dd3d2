"""Write and read `run.json`, the record of a run.

A run's directory holds

    .hydra/                   the configuration as Hydra composed it, and the typed overrides
    .hydra-resumed/           the same of the last time that the run was resumed
    TASK.log                  the log (run_log.py); TASK is `task_name`
    run.json                  the record
    metrics.csv               metrics against steps (metrics_csv.py)
    checkpoints/best.ckpt     highest validation accuracy
    checkpoints/last.ckpt     where a resumed run starts
    profiler/                 reports of `trainer.profiler`, if there is one
    figures/                  accuracy, activation percentiles, BatchNorm's statistics against steps
"""

import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.runs.machine import git_commit, hardware, package_versions, peak_memory_mib
from bn_lightning.runs.run_log import RUN_LOG

SCHEMA_VERSION = 1
STATUSES = (
    "running",
    "completed",
    "diverged",
    "stopped early",
    "pruned",
    "failed",
    "interrupted",
)


class RunRecord:
    """The record of one run, written to `directory/run.json` by `update` and `end`.

    Keys: `schema_version`, `status` (one of `STATUSES`), `command`, `config` (resolved), `seed`,
    `data` (source, SHA-256 of its files, sizes), `versions`, `hardware`, `commit` (None outside a
    git checkout), `started` and `ended` (UTC, ISO 8601), `steps`, `seconds` (of training, of all
    parts of a resumed run; None if those before a checkpoint are unknown), `steps_per_second` (of
    these seconds, else of the last part), `peak_memory_mib`, `metrics`, `resumed_at` (steps), and
    where they apply `diverged_at` (a step), `stopped_at` (a step), `stop_reason` and
    `planned_steps` (of the whole budget, None if unlimited) of a run that a callback stopped
    early, `pruned_at` (a step) and `prune_reason` of a run that was pruned in a stack, `notice` (of
    a trial: whose weights `init` replaced or left) and `error`.

    Args:
        directory: an existing folder.
        config: the resolved configuration, as plain dictionaries and lists.
        write: False keeps the record in memory, as all ranks but the first do.
    """

    def __init__(self, directory: str | Path, config: dict[str, Any], write: bool = True) -> None:
        self.path = Path(directory) / RUN_FILE
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
        """Set the final status and other keys, and write the record.

        Raises:
            ValueError: `status` is not in `STATUSES`.
        """
        if status not in STATUSES:
            raise ValueError(
                f"expected `status` to be one of {', '.join(STATUSES)}, got {status!r}"
            )
        self.update(status=status, ended=_now(), peak_memory_mib=peak_memory_mib(), **content)
        if self.write and status != "failed":  # the command logs the error
            RUN_LOG.info(end_sentence(self.content))


def read_run(directory: str | Path) -> dict[str, Any]:
    """Return the record in `directory/run.json`.

    Raises:
        ValueError: there is no such file, or it is no record of a schema that this version reads.
    """
    path = Path(directory) / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got, listed = f"a {RUN_FILE} that cannot be read: {error}", str(directory)
        if not Path(directory).exists():
            got, listed = "a directory that does not exist", "logs"
        elif not path.exists():
            got = f"none: there is no {RUN_FILE}"
        raise ValueError(
            f"expected `{directory}` to be a run's directory with a {RUN_FILE}, metrics.csv and "
            f"checkpoints, got {got}; bn-report --list {listed} lists the runs below it"
        ) from error
    found = record.get("schema_version") if isinstance(record, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"expected `{path}` to have schema_version {SCHEMA_VERSION}, got {found}; read it with "
            "the version of bn_lightning that wrote it"
        )
    if record.get("status") not in STATUSES or not isinstance(record.get("config"), dict):
        raise ValueError(
            f"expected `{path}` to hold the status and config of a run, got a file without them"
        )
    return record


def run_outcome(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a sweep stores of a run: its metrics and what tells runs apart."""
    return (
        record["metrics"]
        | {
            "diverged": record["status"] == "diverged",
            "diverged_at": record.get("diverged_at"),
            "data": (record["data"] or {}).get("source"),
            "classes": number_of_classes(record),
            "commit": record["commit"],
            "steps": record["steps"],
            "seed": record["seed"],
        }
        | {key: record[key] for key in _IF_PRESENT if key in record}
    )


_IF_PRESENT = ("stopped_at", "stop_reason", "pruned_at", "prune_reason", "notice")


def data_sentence(record: Mapping[str, Any]) -> str:
    """Return source and sizes of a run's data: training / validation / test; "" if unknown."""
    data = record.get("data")
    if not data:
        return ""
    sizes = " / ".join(f"{data[split]:,}" for split in ("train", "validation", "test"))
    return f"{data['source']}, {sizes}"


def end_sentence(record: Mapping[str, Any]) -> str:
    """Return how a run ended, where and with which test metrics."""
    if "stop_reason" in record:
        text = stop_sentence(record)
    else:
        step = record.get("diverged_at") or record.get("steps") or 0
        reason = record.get("prune_reason")
        text = f"{record['status']} at step {step:,}{f': {reason}' if reason else ''}"
    metrics = (record.get("metrics") or {}).items()
    tests = {k: math.nan if v is None else v for k, v in metrics if k.startswith("test/")}
    return ", ".join([text, *(f"{name} {value:.4f}" for name, value in tests.items())])


def stop_sentence(record: Mapping[str, Any]) -> str:
    """Return where and why a callback stopped a run, whose status is `stopped early`."""
    planned = record.get("planned_steps")
    whole = "" if planned is None else f" of {planned:,}"
    return f"stopped early at step {record['stopped_at']:,}{whole}: {record['stop_reason']}"


def training_seconds(record: Mapping[str, Any]) -> float | None:
    """Return the seconds of training of all parts of a run, None if they are unknown.

    Version 0.1.0 recorded the seconds of the last part only.
    """
    version = (record.get("versions") or {}).get("bn-lightning")
    return None if record.get("resumed_at") and version == "0.1.0" else record.get("seconds")


def number_of_classes(record: Mapping[str, Any]) -> int | None:
    """Return the number of classes of a run's data, else of its model; None if unknown."""
    model = (record.get("config") or {}).get("model") or {}
    return (record.get("data") or {}).get("classes") or model.get("num_classes")


def result_names(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics that are a run's result, the most telling first.

    They are the accuracy of the test and of the validation. A run without an accuracy has the
    metric that chose its best checkpoint instead, that of the test first, and all others of the
    test.
    """
    metrics = record.get("metrics") or {}
    accuracies = [name for name in ("test/accuracy", "val/accuracy") if name in metrics]
    if accuracies:
        return accuracies
    callbacks = (record.get("config") or {}).get("callbacks") or {}
    monitor = str((callbacks.get("checkpoints") or {}).get("monitor"))
    tests = sorted(name for name in metrics if name.startswith("test/"))
    chosen = [f"test/{monitor.removeprefix('val/')}", monitor]
    return list(dict.fromkeys(name for name in [*chosen, *tests] if name in metrics))


def logged_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return a Trainer's metrics as plain numbers, without `step`, which is their x axis."""
    return {name: float(value) for name, value in metrics.items() if name != "step"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
