"""The trials of a study as a table, read from its storage or from a trials.csv.

Nothing is written to the study. A damaged journal is read up to its first incomplete record, and
the table has a note that says so.
"""

import csv
import io
import json
import sqlite3
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bn_lightning.sweeps.engine.journal_file import parse_record
from bn_lightning.sweeps.engine.passwords import redacted, refuse_several_ats
from bn_lightning.sweeps.engine.stored_names import COMMAND, DESCRIPTION, DIVERGED

TABLE_FILE = "trials.csv"
DATABASES = ("*.db", "*.sqlite", "*.sqlite3")

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        number: in its study.
        state: the name of an `optuna.trial.TrialState`.
        values: one for each direction; empty without a result.
        params: override key, such as `optimizer.lr`, -> value.
        attributes: what the trial returned, and what its sweeper stored with it.
    """

    number: int
    state: str
    values: tuple[float, ...] = ()
    params: Mapping[str, Cell] = field(default_factory=dict)
    attributes: Mapping[str, Cell] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the trial has a result."""
        return self.state == TrialState.COMPLETE.name


@dataclass(frozen=True)
class TrialTable:
    """The trials of a study, in the order of their numbers.

    Attributes:
        name: of the study.
        directions: "maximize" or "minimize", one for each value.
        rows: all trials, in any state.
        about: how the trials were made, as plain JSON.
        notes: what is wrong with the trials, in sentences.
    """

    name: str
    directions: tuple[str, ...]
    rows: tuple[TrialRow, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def optuna_directions(self) -> list[StudyDirection]:
        """The directions as Optuna's enum."""
        return [StudyDirection[name.upper()] for name in self.directions]

    @property
    def complete(self) -> list[TrialRow]:
        """The trials that have a result."""
        return [row for row in self.rows if row.is_complete]

    @property
    def value_names(self) -> list[str]:
        """The names of the values: the metrics that the trials returned with them.

        That is the attribute which equals the value in every complete trial, a metric of the
        validation first; else the study's own name, else "value".
        """
        complete, count = self.complete, len(self.directions)
        given = self.about.get("metrics") or (
            ["value"] if count == 1 else [f"value {k}" for k in range(count)]
        )
        names = []
        for k in range(count):
            found = [
                name
                for name in (complete[0].attributes if complete else ())
                if all(row.attributes.get(name) == row.values[k] for row in complete)
            ]
            found.sort(key=lambda name: (not name.startswith("val/"), len(name), name))
            names.append(found[0] if found else given[k])
        return names

    def counts(self) -> dict[str, int]:
        """Return the number of trials in each state, and of the following.

        `retried` trials failed and were followed by another trial of the same point. `lost` points
        have failed trials only. `diverged` trials are complete.
        """
        states = Counter(row.state for row in self.rows)
        failed = [row for row in self.rows if row.state == TrialState.FAIL.name]
        last = {_point(row): row for row in self.rows}
        retried = sum(last[_point(row)] is not row for row in failed)
        others = {_point(row) for row in self.rows if row.state != TrialState.FAIL.name}
        return {
            "trials": len(self.rows),
            **{state.name.lower(): states[state.name] for state in TrialState},
            "retried": retried,
            "lost": len({_point(row) for row in failed} - others),
            "diverged": sum(row.is_complete and is_diverged(row) for row in self.rows),
        }


def is_diverged(row: TrialRow) -> bool:
    """Return whether the run of a trial diverged."""
    return row.attributes.get(DIVERGED) in (True, 1, "true", "True")


def read_study(storage: str | Path, name: str | None = None) -> TrialTable:
    """Read a study.

    Args:
        storage: path of a journal file or of a database (`DATABASES`), or a URL: one of Optuna's,
            `journal:///PATH` or `grpc://HOST:PORT`.
        name: of the study; may be None if the storage has one study.

    Raises:
        ValueError: there is no such storage or no such study, or several studies and no name.
    """
    opened, notes = _open(storage)
    names = sorted(summary.study_name for summary in optuna.get_all_study_summaries(opened))
    shown = redacted(str(storage), str(storage))
    if name is None and len(names) != 1:
        raise ValueError(
            f"expected `{shown}` to have one study, got {', '.join(names) or 'none'}; name one by "
            "`--study NAME`"
        )
    if name is not None and name not in names:
        raise ValueError(
            f"expected `--study` to be one of {', '.join(names) or 'none'} in {shown}, got {name}"
        )
    study = optuna.load_study(study_name=name or names[0], storage=opened)
    trials = study.get_trials(deepcopy=False)
    return TrialTable(
        study.study_name,
        tuple(direction.name.lower() for direction in study.directions),
        tuple(map(row_of, trials)),
        _description(study, trials),
        notes,
    )


def to_csv(table: TrialTable) -> str:
    """Return the table as the text of trials.csv, a line for each trial.

    Columns are `number`, `state`, `value` (or `value/0`, `value/1`, ...), `params/KEY`,
    `attributes/KEY`. A cell is a JSON scalar. A string that cannot be read as another scalar has
    no quotation marks. An empty cell means that the trial does not have the value.
    """
    values = _value_columns(max((len(row.values) for row in table.rows), default=1))
    params = list(dict.fromkeys(key for row in table.rows for key in row.params))
    attributes = sorted({key for row in table.rows for key in row.attributes})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["number", "state", *values]
        + [f"params/{key}" for key in params]
        + [f"attributes/{key}" for key in attributes]
    )
    for row in table.rows:
        numbers = [_text(value) for value in row.values]
        writer.writerow(
            [str(row.number), row.state, *numbers, *[""] * (len(values) - len(numbers))]
            + [_text(row.params[key]) if key in row.params else "" for key in params]
            + [_text(row.attributes[key]) if key in row.attributes else "" for key in attributes]
        )
    return buffer.getvalue()


def rows_from_csv(text: str, path: str | Path = TABLE_FILE) -> tuple[TrialRow, ...]:
    """Return the rows that `to_csv` wrote.

    Args:
        text: of the file.
        path: of the file, for errors.

    Raises:
        ValueError: the text is another table, or one of its lines is incomplete.
    """
    lines = csv.DictReader(io.StringIO(text))
    columns = lines.fieldnames or []
    if list(columns[:2]) != ["number", "state"]:
        raise ValueError(
            f"expected `{path}` to begin with the columns number and state, got "
            f"{', '.join(columns[:2]) or 'an empty file'}; report the study again"
        )
    rows = []
    for line in lines:
        if None in line or None in line.values() or line["state"] not in TrialState.__members__:
            raise ValueError(
                f"expected `{path}` to have {len(columns)} cells and a state of Optuna's in each "
                f"line, got another in line {lines.line_num}; report the study again"
            )
        rows.append(
            TrialRow(
                int(line["number"]),
                line["state"],
                tuple(
                    float(line[name]) for name in columns if _is_value(name) and line[name] != ""
                ),
                _cells(line, "params/"),
                _cells(line, "attributes/"),
            )
        )
    return tuple(rows)


class _WholeRecords(BaseJournalBackend):
    """The records of a journal file up to the first that is incomplete or damaged, read-only."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self.lost = 0
        with open(path, "rb") as file:
            for line in file:
                record = parse_record(line)
                if record is None:
                    self.lost = 1 + sum(1 for _ in file)
                    break
                self.records.append(record)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        yield from self.records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise ValueError("expected a report to read the study only, got a record to write")


def _open(storage: str | Path) -> tuple[BaseStorage, tuple[str, ...]]:
    url = str(storage)
    scheme, separator, rest = url.partition("://")
    is_path = isinstance(storage, Path) or not separator
    is_database = is_path and any(Path(storage).match(pattern) for pattern in DATABASES)
    if scheme == "journal" or (is_path and not is_database):
        return _open_journal(Path(storage if is_path else rest))
    try:
        with catch_warnings():
            simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if scheme == "grpc":
                host, _, port = rest.rpartition(":")
                proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
                proxy.get_all_studies()
                return proxy, ()
            if is_database:
                return _open_sqlite(Path(storage)), ()
            from sqlalchemy.engine import make_url

            if (address := make_url(url)).get_backend_name() == "sqlite":
                return _open_sqlite(Path(address.database or "")), ()
            refuse_several_ats(url)
            return RDBStorage(url, skip_table_creation=True), ()
    except Exception as error:
        # Imported here, because it imports SQLAlchemy, which journals do not need.
        from bn_lightning.sweeps.engine.storage import reason_of

        raise ValueError(
            f"expected `{redacted(url, url)}` to be a storage of Optuna's that answers, got: "
            f"{redacted(reason_of(error), url)}"
        ) from None


def _open_sqlite(path: Path) -> RDBStorage:
    """Open a database read-only, from a path, because ? and % have a meaning in a URL."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    address = f"{path.absolute().as_uri()}?mode=ro"
    return RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": lambda: sqlite3.connect(address, uri=True)},
        skip_table_creation=True,
    )


def _open_journal(path: Path) -> tuple[BaseStorage, tuple[str, ...]]:
    if not path.is_file():
        raise ValueError(f"expected `{path}` to be a journal file, got no such file")
    backend = _WholeRecords(path)
    if not backend.records:
        raise ValueError(
            f"expected `{path}` to be a journal of Optuna's, got a file without a whole record"
        )
    notes: tuple[str, ...] = ()
    if backend.lost:
        whole = len(backend.records)
        notes = (
            f"The journal is cut off or damaged: of {whole + backend.lost:,} records the first "
            f"{whole:,} are whole and reported.",
        )
    try:
        return JournalStorage(backend), notes
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected `{path}` to be a journal of Optuna's, got {error!r}") from error


def _description(study: optuna.Study, trials: list[FrozenTrial]) -> dict[str, Any]:
    """Return what the study says of itself: space, fixed overrides, command, names, log scales."""
    is_log = {
        name: getattr(distribution, "log", False)
        for trial in trials
        for name, distribution in trial.distributions.items()
    }
    on_log_scale = sorted(name for name, is_so in is_log.items() if is_so)
    found, command = (study.user_attrs.get(name) for name in (DESCRIPTION, COMMAND))
    if isinstance(found, dict):
        found = {key: found[key] for key in ("space", "overrides") if key in found}
    return {
        **({"sweep": found} if isinstance(found, dict) else {}),
        **({"command": command} if isinstance(command, str) else {}),
        **({"metrics": list(study.metric_names)} if study.metric_names else {}),
        **({"log": on_log_scale} if on_log_scale else {}),
    }


def row_of(trial: FrozenTrial) -> TrialRow:
    """Return one of Optuna's trials as a row; attributes that are not scalars become JSON text."""
    return TrialRow(
        trial.number,
        trial.state.name,
        tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else (),
        {key: _cell(value) for key, value in trial.params.items()},
        {key: _cell(value) for key, value in trial.user_attrs.items()},
    )


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, default=str)


def _text(value: Cell) -> str:
    if isinstance(value, str) and value and value.isprintable() and _parsed(value) == value:
        return value
    return json.dumps(value)


def _parsed(text: str) -> Cell:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict | list) else value


def _cells(line: Mapping[str, str], prefix: str) -> dict[str, Cell]:
    return {
        name.removeprefix(prefix): _parsed(text)
        for name, text in line.items()
        if name.startswith(prefix) and text != ""
    }


def _value_columns(count: int) -> list[str]:
    return ["value"] if count <= 1 else [f"value/{i}" for i in range(count)]


def _is_value(column: str) -> bool:
    return column == "value" or column.startswith("value/")


def _point(row: TrialRow) -> frozenset[tuple[str, Cell]]:
    return frozenset(row.params.items())
