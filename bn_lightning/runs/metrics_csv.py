"""`metrics.csv` of a run: a column for each metric, a row for each time it is logged."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bn_lightning.runs.atomic_write import write_atomically

FILE_NAME = "metrics.csv"

Row = dict[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv as written, [] if there is none.

    A last line without its end is of a run that was killed while writing: it is left out.

    Raises:
        ValueError: it is no such table.
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
            f"{path} expected metrics against `step`, got another table: {error}; take out what a "
            "run did not write"
        ) from error
    return rows


def read_metrics(directory: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> its (step, value) pairs in order of steps, from `directory/metrics.csv`.

    Raises:
        ValueError: it is no such table.
    """
    series: dict[str, dict[int, float]] = {}
    for row in read_rows(Path(directory) / FILE_NAME):
        for name, value in row.items():
            if name != "step" and value != "":
                try:
                    series.setdefault(name, {})[int(row["step"])] = float(value)
                except ValueError as error:
                    raise ValueError(
                        f"{directory}/{FILE_NAME} expected a number for {name} at step"
                        f" {row['step']}, got {value!r}; take out what a run did not write"
                    ) from error
    return {name: sorted(points.items()) for name, points in series.items()}


def truncate_metrics(directory: str | Path, last_step: int) -> None:
    """Take out the rows after `last_step`: a run resumed from there writes them anew."""
    path = Path(directory) / FILE_NAME
    if path.exists():
        rows = [row for row in read_rows(path) if int(row["step"]) <= last_step]
        write_rows(path, read_columns(path), rows)


def read_columns(path: Path) -> list[str]:
    """The names in the first line; [] if there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def write_rows(path: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file by one of these columns and rows, in one step."""
    write_atomically(path, lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))


def lines(columns: list[str], rows: Iterable[dict[str, Any]]) -> str:
    """The text of these rows, without the first line."""
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()
