"""Find what a path or a URL holds: the study of a sweep, the table of a report, or runs."""

import contextlib
import json
import sqlite3
from pathlib import Path

from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.sweeps.analysis.provenance import with_provenance
from bn_lightning.sweeps.analysis.trials import (
    DATABASES,
    TABLE_FILE,
    TrialTable,
    read_study,
    rows_from_csv,
)
from bn_lightning.sweeps.engine.stored_names import JOURNAL_FILE

SUMMARY_FILE = "summary.json"
SUMMARY_SCHEMA_VERSION = 1
"""Version of the format of summary.json."""

_DEPTH = 4  # of the folders that are searched for suggestions, as logs/TASK/multiruns/TIME/JOB
_MOST_SUGGESTED = 3


def runs_in(source: str) -> list[Path]:
    """Return the run in a directory, or the runs in its folders if it holds no study."""
    if "://" in source:
        return []
    directory = Path(source)
    if (directory / RUN_FILE).is_file():
        return [directory]
    if not directory.is_dir() or _storage_in(directory) or _kind_of(directory) in ("grid", "study"):
        return []
    found = [path.parent for path in directory.glob(f"*/{RUN_FILE}")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _kind_of(directory: Path) -> str | None:
    """Return the `kind` of the report in a directory, None without a report."""
    try:
        return json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _storage_in(directory: Path) -> Path | None:
    if (directory / JOURNAL_FILE).is_file():
        return directory / JOURNAL_FILE
    found = sorted(path for pattern in DATABASES for path in directory.glob(pattern))
    databases = [path for path in found if _is_of_optuna(path)]
    return databases[0] if len(databases) == 1 else None


def _is_of_optuna(path: Path) -> bool:
    """Return whether an SQLite file has studies; MLflow's database, for instance, has none."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            query = "SELECT 1 FROM sqlite_master WHERE name = 'studies'"
            return connection.execute(query).fetchone() is not None
    except sqlite3.Error:
        return True  # read_study reports what is wrong with it


def _places_below(directory: Path) -> list[str]:
    """Return sweeps and folders of runs in a few levels of folders below, as suggestions."""
    found: dict[Path, None] = {}
    for depth in range(1, _DEPTH + 1):
        folders = "/".join("*" * depth)
        sweeps = [path.parent for path in sorted(directory.glob(f"{folders}/{JOURNAL_FILE}"))]
        runs = [path.parent.parent for path in sorted(directory.glob(f"{folders}/{RUN_FILE}"))]
        # The runs of a sweep are reported with the sweep.
        found |= dict.fromkeys([*sweeps, *(p for p in runs if not (p / JOURNAL_FILE).is_file())])
    return list(map(str, found))


def read_sweep(source: str, name: str | None) -> tuple[Path, TrialTable]:
    """Return the directory of a sweep, and its trials.

    Args:
        source: a sweep's directory, a journal file or a database, a storage URL, or the folder of a
            report.
        name: of the study, if a storage has several.

    Raises:
        ValueError: `source` is none of these.
    """
    if "://" in source:
        return Path("."), with_provenance(read_study(source, name), Path("."), is_of_sweep=False)
    path = Path(source)
    if path.is_file():
        for folder in path.absolute().parents[:2]:
            if (folder / RUN_FILE).is_file() and path.name != JOURNAL_FILE:
                raise ValueError(
                    f"expected a sweep or a run's directory, got {path}, a file of a run; report "
                    f"its directory, {folder}"
                )
        return path.parent, with_provenance(read_study(path, name), path.parent)
    storage = _storage_in(path)
    if storage is not None:
        return path, with_provenance(read_study(storage, name), path)
    if (path / TABLE_FILE).is_file():
        return path, _read_table(path)
    what = "no such directory"
    if path.is_dir():
        what = "none of them" if any(path.iterdir()) else "an empty directory"
    below = _places_below(path)
    suggested = f"did you mean {' or '.join(below[:_MOST_SUGGESTED])}?"
    if not below:
        suggested = "type `bn-report --list logs` to see the runs under logs"
    raise ValueError(
        f"expected a sweep's directory with a {JOURNAL_FILE} or a {TABLE_FILE}, a storage URL, or "
        f"the directory of a run with its {RUN_FILE}, got {path}: {what}; {suggested}"
    )


def _read_table(directory: Path) -> TrialTable:
    """Return the trials of an earlier report, with the study's part of its summary."""
    path = directory / SUMMARY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, study, kind = (content[key] for key in ("schema_version", "study", "kind"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected `{path}` to be the summary of the report that wrote {TABLE_FILE}, got "
            f"{error!r}; report the study again"
        ) from error
    if version != SUMMARY_SCHEMA_VERSION:
        raise ValueError(
            f"expected `{path}` to have schema_version {SUMMARY_SCHEMA_VERSION}, got {version}; "
            "report the study again"
        )
    if kind == "runs":
        raise ValueError(
            f"expected `{directory}` to be the report of a sweep, got one of runs; name the runs"
        )
    text = (directory / TABLE_FILE).read_text(encoding="utf-8")
    return TrialTable(
        study["name"],
        tuple(study["directions"]),
        rows_from_csv(text, directory / TABLE_FILE),
        study["about"],
        tuple(study["notes"]),
    )
