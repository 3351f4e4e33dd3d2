"""Rows of measurements, kept as CSV: what the scripts here append their results with."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bn_lightning.runs.machine import git_commit, hardware, package_versions


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows of the same columns to a CSV file, which is made, with its header, if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def provenance() -> dict[str, object]:
    """Columns that say where and by what a row was measured."""
    return {
        "processor": hardware()["processor"],
        "torch": package_versions()["torch"],
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
    }
