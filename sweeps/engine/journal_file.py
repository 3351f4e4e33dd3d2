"""Optuna's journal file, protected against records that a full disk or a killed writer cut off."""

import json
import os
from collections import deque
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

from bn_lightning.sweeps.engine.sweep_error import SweepError


class JournalFile(BaseJournalBackend):
    """A journal file that contains whole records only, in the format of Optuna's own backend.

    If the disk has no room for a record, the written part is removed. Nothing is appended to a
    record that a killed writer left incomplete, because both would become unreadable.

    Args:
        path: the file; created if it does not exist.
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
        """Yield the records from a number on, counted from 0."""
        yield from self._reader.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append all records or none of them, and wait until they are on the disk.

        Raises:
            SweepError: the last record of the file is incomplete; nothing is appended.
            OSError: the disk has no room; nothing is left of the records.
        """
        with self.locked(), open(self.path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    raise damaged_journal(self.path)
            lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in logs)
            content = "".join(lines).encode()
            try:
                left = content
                while left:
                    left = left[os.write(file.fileno(), left) :]
                os.fsync(file.fileno())
            except BaseException as error:
                # After a signal, whole records stay: other processes may have read them already.
                if isinstance(error, OSError) or file.seek(0, os.SEEK_END) < end + len(content):
                    file.truncate(end)
                raise


def open_journal(path: Path) -> JournalStorage:
    """Open a journal file; create it if it does not exist.

    Raises:
        SweepError: the file contains something other than whole records; it is not changed.
        OSError: the file cannot be read or created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = JournalFile(path)
    # With the lock held, no other process is writing a record. Optuna reports a damaged last
    # record only when another one follows it.
    with journal.locked(), open(path, "rb") as file:
        last = deque(file, maxlen=1)
    if last and parse_record(last[0]) is None:
        raise damaged_journal(path)
    try:
        return JournalStorage(journal)
    except (ValueError, KeyError, TypeError) as error:
        raise damaged_journal(path) from error


def damaged_journal(path: Path) -> SweepError:
    """Return the error for a journal that contains an unreadable record."""
    records, whole, finished = 0, 0, 0
    with open(path, "rb") as file:
        for line in file:
            record = parse_record(line)
            if record is None:
                break
            records += 1
            whole += len(line)
            # Operation 6 sets the state of a trial; states 1 to 3 are those of finished trials.
            finished += record["op_code"] == 6 and record["state"] in (1, 2, 3)
    size = path.stat().st_size
    return SweepError(
        f"expected {path} to contain whole records, got one cut off or damaged after {records:,} "
        f"whole ones ({whole:,} of {size:,} bytes) with {finished:,} finished trials; the file was "
        "not changed. To resume with the whole records, copy the file and cut off the rest: "
        f"cp '{path}' '{path}.copy' && truncate -s {whole} '{path}'"
    )


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of a journal; None if the line is cut off or damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if is_whole and isinstance(record.get("op_code"), int) else None
