"""What a place holds: a sweep's study, the table of an earlier report, or runs."""

import contextlib
import json
import sqlite3
from pathlib import Path

from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.sweeps.analysis.provenance import with_provenance
from bn_lightning.sweeps.analysis.trials import (
    DATABASES,
    TABLE,
    Table,
    read_study,
    rows_from_csv,
)
from bn_lightning.sweeps.engine.stored_names import JOURNAL_FILE

SUMMARY = "summary.json"
SCHEMA_VERSION = 1
"""Of summary.json."""

# Folders below one that holds nothing to report: logs/TASK/multiruns/TIME/JOB has most.
_DEPTH, _MOST_MEANT = 4, 3


def runs_in(source: str) -> list[Path]:
    """The run in a directory, or the runs in its folders where it holds no study."""
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
    """What the report in a directory is of; None without one."""
    try:
        return json.loads((directory / SUMMARY).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _storage_in(directory: Path) -> Path | None:
    if (directory / JOURNAL_FILE).is_file():
        return directory / JOURNAL_FILE
    found = sorted(path for pattern in DATABASES for path in directory.glob(pattern))
    databases = [path for path in found if _is_of_optuna(path)]
    return databases[0] if len(databases) == 1 else None


def _is_of_optuna(path: Path) -> bool:
    """Whether an SQLite file has studies: others, such as MLflow's, lie beside runs, too."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            query = "SELECT 1 FROM sqlite_master WHERE name = 'studies'"
            return connection.execute(query).fetchone() is not None
    except sqlite3.Error:
        return True  # for the reader of studies to say what is wrong with it


def _places_below(directory: Path) -> list[str]:
    """Sweeps, and folders of runs, some folders below: what was meant, perhaps."""
    found: dict[Path, None] = {}
    for depth in range(1, _DEPTH + 1):
        folders = "/".join("*" * depth)
        sweeps = [path.parent for path in sorted(directory.glob(f"{folders}/{JOURNAL_FILE}"))]
        runs = [path.parent.parent for path in sorted(directory.glob(f"{folders}/{RUN_FILE}"))]
        # The trials of a sweep are not reported without it.
        found |= dict.fromkeys([*sweeps, *(p for p in runs if not (p / JOURNAL_FILE).is_file())])
    return list(map(str, found))


def read_sweep(source: str, name: str | None) -> tuple[Path, Table]:
    """The directory of a sweep, and its trials.

    Args:
        source: a sweep's directory, a journal file or a database, a storage URL, or the folder of a
            report.
        name: of the study, where a storage holds several.

    Raises:
        ValueError: it is none of them.
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
    if (path / TABLE).is_file():
        return path, _read_table(path)
    what = "an empty directory" if path.is_dir() and not any(path.iterdir()) else "none of them"
    below = _places_below(path)
    meant = f"; did you mean {' or '.join(below[:_MOST_MEANT])}?" if below else ""
    raise ValueError(
        f"expected a sweep's directory with a {JOURNAL_FILE} or a {TABLE}, a storage URL, or the "
        f"directory of a run with its {RUN_FILE}, got {path}: "
        f"{what if path.is_dir() else 'no such directory'}{meant}"
    )


def _read_table(directory: Path) -> Table:
    """The trials of an earlier report, with what its summary says of them."""
    path = directory / SUMMARY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, study, kind = (content[key] for key in ("schema_version", "study", "kind"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} expected the summary of the report that wrote {TABLE}, got {error!r}"
        ) from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} expected schema_version {SCHEMA_VERSION}, got {version}")
    if kind == "runs":
        raise ValueError(
            f"{directory} expected the report of a sweep, got one of runs; name the runs"
        )
    text = (directory / TABLE).read_text(encoding="utf-8")
    return Table(
        study["name"],
        tuple(study["directions"]),
        rows_from_csv(text, directory / TABLE),
        study["about"],
        tuple(study["notes"]),
    )
