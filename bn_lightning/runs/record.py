"""What a run leaves on disk: `run.json`, written whole or not at all.

A run's directory holds

    .hydra/                   the configuration as Hydra composed it, and the overrides typed
    .hydra-resumed/           the same of the last time that the run was gone on with
    TASK.log                  what was logged, TASK being `task_name`
    run.json                  this module's record
    metrics.csv               metrics against steps (metrics_csv.py)
    checkpoints/best.ckpt     highest validation accuracy
    checkpoints/last.ckpt     where the run goes on when resumed
    figures/                  accuracy, activation percentiles, BatchNorm's statistics against steps
"""

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.machine import git_commit, hardware, package_versions, peak_memory_mib

SCHEMA_VERSION = 1
FILE_NAME = "run.json"
STATUSES = ("running", "completed", "diverged", "pruned", "failed", "interrupted")


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
        """Write the final status and whatever else became known.

        Raises:
            ValueError: `status` is none of `STATUSES`.
        """
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
