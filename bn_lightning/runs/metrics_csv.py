"""Read and write `metrics.csv`: a column for each metric, a row for each call of a logger."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bn_lightning.runs.atomic_write import write_atomically

METRICS_FILE = "metrics.csv"

Row = dict[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv as text, [] if there is no file.

    A last line without a line break was left by a killed run and is ignored.

    Raises:
        ValueError: the file is another table.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values() or not row.get("step", "").isdecimal():
                raise ValueError(f"line {reader.line_num} is no row of {reader.fieldnames}")
            rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"expected `{path}` to hold metrics against `step`, got another table: {error}; remove "
            "what a run did not write"
        ) from error
    return rows


def read_metrics(directory: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each metric in `directory/metrics.csv`, by step.

    Raises:
        ValueError: the file is another table.
    """
    series: dict[str, dict[int, float]] = {}
    for row in read_rows(Path(directory) / METRICS_FILE):
        for name, value in row.items():
            if name != "step" and value != "":
                try:
                    series.setdefault(name, {})[int(row["step"])] = float(value)
                except ValueError as error:
                    raise ValueError(
                        f"expected `{directory}/{METRICS_FILE}` to hold a number for {name} at step"
                        f" {row['step']}, got {value!r}; remove what a run did not write"
                    ) from error
    return {name: sorted(points.items()) for name, points in series.items()}


def truncate_metrics(directory: str | Path, last_step: int) -> None:
    """Remove the rows after `last_step`, which a run resumed from there writes again."""
    path = Path(directory) / METRICS_FILE
    if path.exists():
        rows = [row for row in read_rows(path) if int(row["step"]) <= last_step]
        write_rows(path, read_columns(path), rows)


def read_columns(path: Path) -> list[str]:
    """Return the names in the first line, [] if there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def write_rows(path: Path, columns: list[str], rows: Iterable[Row]) -> None:
    """Replace the file, in one step, by one with these columns and rows."""
    write_atomically(path, format_rows(columns, [dict(zip(columns, columns, strict=True)), *rows]))


def format_rows(columns: list[str], rows: Iterable[Row]) -> str:
    """Return rows as text, without the line of column names."""
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()
