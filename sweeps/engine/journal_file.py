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
        self._collected: list[dict[str, Any]] | None = None  # inside `together`
        self._n_written: int | None = None  # records of the file, once they are all read there

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that every writer holds, on one machine or over NFS."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Append the records of the block at its end, in one write; hold the lock until then.

        This process reads them at once. Only the thread that entered the block may use the journal.

        Raises:
            SweepError: as for `append_logs`. The storage has read what is not in the file, so it
                has to be opened again.
            OSError: likewise.
        """
        with self.locked():
            self._collected, self._n_written = [], None
            try:
                yield
            finally:
                # After an error, too: the records stand for calls that were answered.
                collected, self._collected = self._collected, None
                if collected:
                    self._write(collected)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from a number on, counted from 0."""
        if self._collected is None:
            yield from self._reader.read_logs(log_number_from)
            return
        if self._n_written is None:
            number = log_number_from
            for record in self._reader.read_logs(log_number_from):
                number += 1
                yield record
            self._n_written = number
        yield from self._collected[log_number_from - self._n_written :]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append all records or none of them, and wait until they are on the disk.

        Raises:
            SweepError: the last record of the file is incomplete; nothing is appended.
            OSError: the disk has no room; nothing is left of the records.
        """
        if self._collected is not None:
            self._collected.extend(logs)
            return
        with self.locked():
            self._write(logs)

    def _write(self, logs: list[dict[str, Any]]) -> None:
        with open(self.path, "r+b", buffering=0) as file:
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


class JournalFileStorage(JournalStorage):
    """Optuna's storage in a `JournalFile`.

    Args:
        journal: the file.
    """

    def __init__(self, journal: JournalFile) -> None:
        super().__init__(journal)
        self.journal = journal


def open_journal(path: Path) -> JournalFileStorage:
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
        return JournalFileStorage(journal)
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
