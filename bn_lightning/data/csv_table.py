"""CSV files as arrays, read row by row to use little more memory than the numbers."""

import array
import csv
import io
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from bn_lightning.data.errors import DataError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
"""Lower-case texts of cells without a value."""

_LONGEST_ROW = 1 << 20  # characters; a row is read whole
_MOST_VALUES = 1000  # of a target; more than two, as 1 and 1.0 are the same class

_Path = str | os.PathLike[str]


def parse_csv(
    payload: bytes, features: Sequence[str], target: str, path: _Path
) -> tuple[Float[np.ndarray, "N F"], Int[np.ndarray, "N"], tuple[str, str]]:
    """Read features and classes from the text of a CSV file.

    Args:
        payload: UTF-8, with or without a byte order mark.
        features: columns of numbers, in order.
        target: column with two values.
        path: of the file, for error messages.

    Returns:
        Features, classes 0 and 1, and the values of the target for these classes.

    Raises:
        DataError: the text is not such a table; names the line, counted from 1.
    """
    wanted = [*features, target]
    values: dict[str, int] = {}  # of the target: text -> its code
    numbers, codes = array.array("d"), array.array("H")
    rows = _wanted_cells(payload, wanted, path, "set `data.features` and `data.target`")
    for line, (*cells, value) in rows:
        numbers.extend(_finite(*cell, line, path) for cell in zip(cells, features, strict=True))
        codes.append(values.setdefault(value, len(values)))
        if len(values) > _MOST_VALUES:
            raise _not_two(target, values, f"more than {_MOST_VALUES:,} in {len(codes)} rows", path)
    larger, classes = _larger(values, target, len(codes), path)
    targets = np.array(larger, np.int64)[np.frombuffer(codes, np.uint16)]
    return np.frombuffer(numbers).reshape(-1, len(features)), targets, classes


def parse_features(
    payload: bytes, features: Sequence[str], path: _Path
) -> Float[np.ndarray, "N F"]:
    """Read features as `parse_csv` does, without a target."""
    numbers = array.array("d")
    remedy = "use the columns of the network's training"
    for line, cells in _wanted_cells(payload, features, path, remedy):
        numbers.extend(_finite(*cell, line, path) for cell in zip(cells, features, strict=True))
    return np.frombuffer(numbers).reshape(-1, len(features))


def _wanted_cells(
    payload: bytes, wanted: Sequence[str], path: _Path, remedy: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of these columns for each row; raise if a value is missing."""
    rows = _rows(payload, path)
    _, header = next(rows, (0, None))
    if header is None:
        raise DataError(f"{path}: expected a header line and rows, got an empty file")
    absent = [name for name in wanted if header.count(name) != 1]
    if absent:
        raise DataError(
            f"{path}: expected each of the columns {', '.join(wanted)} once, separated by commas,"
            f" got {', '.join(header)}: {', '.join(absent)} is absent or repeated; {remedy}"
        )
    places = [header.index(name) for name in wanted]
    line, lacking, first_lines = 0, 0, []
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path}: expected {len(header)} cells in each line, as in the header, got"
                f" {len(cells)} in line {line}"
            )
        found = [cells[i] for i in places]
        if any(cell.lower() in MISSING for cell in found):
            lacking += 1
            first_lines += [str(line)] * (lacking <= 5)
        else:
            yield line, found
    if not line:
        raise DataError(f"{path}: expected rows after the header, got none")
    if lacking:
        raise DataError(
            f"{path}: expected a value in each of {', '.join(wanted)}, got {lacking} rows without,"
            f" first in line {', '.join(first_lines)}; add the values, or remove the rows"
        )


def _rows(payload: bytes, path: _Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and stripped cells of each row that is not blank."""
    for number, line in enumerate(io.BytesIO(payload), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: expected UTF-8, got the byte {line[error.start]:#04x} in line {number};"
                " save the file as UTF-8"
            ) from error
    text = io.TextIOWrapper(io.BytesIO(payload), encoding="utf-8-sig", newline="")
    length = first = 0  # of the current row, and its first line; a quoted cell may have several

    def lines() -> Iterator[str]:
        nonlocal length, first
        while line := text.readline(_LONGEST_ROW + 1):
            if not length:
                first = reader.line_num + 1
            length += len(line)
            if length > _LONGEST_ROW:
                raise DataError(
                    f"{path}: expected rows of at most {_LONGEST_ROW:,} characters, got more in"
                    f" the row that begins in line {first}; separate rows by line breaks, and close"
                    " all quotes"
                )
            yield line

    reader = csv.reader(lines(), strict=True)
    try:
        for cells in reader:
            length = 0
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise DataError(
            f"{path}: expected a CSV file, got an error in line {reader.line_num}: {error}"
        ) from error


def _finite(cell: str, column: str, line: int, path: _Path) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{path}: expected a finite number in each cell of {column}, got {cell!r} in line"
            f" {line}"
        )
    return number


def _larger(
    values: Mapping[str, int], target: str, rows: int, path: _Path
) -> tuple[list[bool], tuple[str, str]]:
    """Return whether each value is the larger one of two, and both in ascending order."""
    keys: Sequence[float | str]
    try:
        keys = [float(value) for value in values]  # 1 and 1.0 are the same class
    except ValueError:
        keys = list(values)
    found = dict(zip(keys, values, strict=True))
    if len(found) != 2:
        raise _not_two(target, found.values(), f"{len(found)} in {rows} rows", path)
    smaller, larger = sorted(found)  # all numbers, or all texts
    return [key == larger for key in keys], (found[smaller], found[larger])


def _not_two(target: str, values: Collection[str], count: str, path: _Path) -> DataError:
    shown = ", ".join(list(values)[:5]) + ", ..." * (len(values) > 5)
    return DataError(
        f"{path}: expected two values in {target}, the two classes, got {count}: {shown}"
    )
