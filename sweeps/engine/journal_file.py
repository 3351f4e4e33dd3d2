"""Optuna's journal file, which a full disk or a killed writer must not spoil for the others."""

import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import (
    BaseJournalBackend,
    JournalFileBackend,
    JournalFileSymlinkLock,
    JournalStorage,
)

from bn_lightning.sweeps.engine.errors import SweepError


class JournalFile(BaseJournalBackend):
    """A journal file that ends in whole records.

    Records are appended as Optuna's own backend does it, and read by it. A record that the disk has
    no room for is taken back, and behind one that a killed writer left half written none is
    appended: that would make both unreadable.

    Args:
        path: the file; made where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = JournalFileSymlinkLock(str(path))
        self._reader = JournalFileBackend(str(path), self._lock)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that every writer holds, on one machine or over NFS."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The records from a number on, counted from 0."""
        yield from self._reader.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records, all of them or none, and wait until they are on the disk.

        Raises:
            SweepError: the last record of the file is cut off; nothing is appended.
            OSError: there is no room for them; nothing is left of them.
        """
        with self.locked(), open(self.path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    raise broken_journal(self.path)
            content = "".join(map(_line, logs)).encode()
            try:
                _write(file.fileno(), content)
                os.fsync(file.fileno())
            except BaseException as error:
                # Ended by a signal, whole records are left: others may have read them already.
                if isinstance(error, OSError) or file.seek(0, os.SEEK_END) < end + len(content):
                    file.truncate(end)
                raise


def open_journal(path: Path) -> JournalStorage:
    """Open a journal file, or start one.

    Raises:
        SweepError: the file holds what is no whole record; it is left as it is.
        OSError: it cannot be read or made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = JournalFile(path)
    # Under the lock: nobody is in the middle of a record. Optuna looks at the last one too late,
    # when another follows it.
    with journal.locked():
        last = _last_line(path)
    if last and whole_record(last) is None:
        raise broken_journal(path)
    try:
        return JournalStorage(journal)
    except (ValueError, KeyError, TypeError) as error:
        raise broken_journal(path) from error


def broken_journal(path: Path) -> SweepError:
    """The error for a journal with a record that cannot be read: what is whole, and what to do."""
    records, whole, finished = 0, 0, 0
    with open(path, "rb") as file:
        for line in file:
            record = whole_record(line)
            if record is None:
                break
            records += 1
            whole += len(line)
            # 6 sets a trial's state, and states from 1 to 3 are those of a finished one.
            finished += record["op_code"] == 6 and record["state"] in (1, 2, 3)
    size = path.stat().st_size
    return SweepError(
        f"{path} expected whole records, got one cut off or damaged after {records:,} whole "
        f"ones ({whole:,} of {size:,} bytes), which hold {finished:,} finished trials. Nothing was "
        "changed. To go on with the whole records, keep a copy, and cut the rest off: "
        f"cp '{path}' '{path}.copy' && truncate -s {whole} '{path}'"
    )


def whole_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of a journal; None if the line is cut off or damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if is_whole and isinstance(record.get("op_code"), int) else None


def _last_line(path: Path) -> bytes:
    with open(path, "rb") as file:
        size, length = file.seek(0, os.SEEK_END), 1 << 14
        while True:
            file.seek(max(0, size - length))
            lines = file.read().splitlines(keepends=True)
            if len(lines) > 1 or length >= size:
                return lines[-1] if lines else b""
            length *= 8


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
