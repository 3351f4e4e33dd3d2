"""The Lightning logger that writes a run's `metrics.csv`."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from bn_lightning.runs.metrics_csv import (
    METRICS_FILE,
    Row,
    format_rows,
    read_columns,
    read_rows,
    write_rows,
)


class MetricsCSVLogger(Logger):
    """Writes `save_dir/metrics.csv`: a column for each metric, a row for each call.

    Lightning's CSVLogger deletes the file of a resumed run. This one appends to it, after
    `truncate_metrics` removed the rows that follow the checkpoint, and does not repeat a row that
    the resumed run logs again. Rows are appended whole, and a new column replaces the file in one
    step, so a killed run leaves only whole rows.

    Args:
        save_dir: an existing folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / METRICS_FILE
        self._pending: list[Row] = []
        self._step = 0
        self._columns: list[str] | None = None
        self._of_last_step: list[dict[str, str]] = []  # rows of the last step in the file

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Ignore them: run.json has the configuration."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._step = self._step if step is None else step
        self._pending.append({"step": self._step, **metrics})

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write the rows logged since the last call. Lightning calls it after logging."""
        rows, self._pending = self._pending, []
        if not rows:
            return
        if self._columns is None:
            # A run that was killed while writing may have left a part of a line.
            self._columns = read_columns(self.path)
            if self._columns:
                found = read_rows(self.path)
                write_rows(self.path, self._columns, found)
                last = [row for row in found if row["step"] == found[-1]["step"]]
                self._of_last_step = [_as_read(row) for row in last]
        rows = [row for row in rows if _as_read(row) not in self._of_last_step]
        new = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        self._columns += new
        if new:
            write_rows(self.path, self._columns, [*read_rows(self.path), *rows])
        elif rows:
            self._append(rows)

    def _append(self, rows: list[Row]) -> None:
        try:
            # Never create the file: it would lack the line of column names.
            with open(self.path, "a", encoding="utf-8", newline="", opener=_existing) as file:
                file.write(format_rows(self._columns or [], rows))
        except OSError as error:
            # On a full disk the system's error does not name the file.
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _as_read(row: Row) -> dict[str, str]:
    return {name: str(value) for name, value in row.items() if str(value)}
