"""How the trials of a table were run, from the files of their runs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bn_lightning.runs.record import number_of_classes, read_run
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable, is_diverged
from bn_lightning.sweeps.engine.sampling import PLANNED
from bn_lightning.sweeps.engine.stored_names import CONFIGURATION_FILE

DATA, BUDGET, SEED = "run/data", "run/max_steps", "run/seed"
"""Attributes of a trial: the name of its data set, its budget in steps, and its seed."""

# A report compares names, because it does not import the class that a configuration names.
_PLANNED = tuple(kind.__name__ for kind in PLANNED)


def with_provenance(table: TrialTable, base: Path, is_of_sweep: bool = True) -> TrialTable:
    """Return the table with data, budget, seed, hardware and versions from the files of its runs.

    `about` gets `runs`, which has for each of data, budget, hardware, versions, ... the values and
    the number of finished runs with each, and `sampler` from the sweep's configuration. Directories
    become relative to `base`.

    Args:
        table: from a study. A table from trials.csv has all of this already.
        base: the sweep's directory.
        is_of_sweep: whether the configuration in `base` belongs to this sweep; false for a study
            given by the URL of its storage.
    """
    found: dict[str, Counter[str]] = {}
    times: list[str] = []
    rows = []
    for row in table.rows:
        directory = row.attributes.get("directory")
        attributes: dict[str, Cell] = dict(row.attributes)
        record: dict[str, Any] | None = None
        facts: dict[str, str] = {}
        if isinstance(directory, str):
            directory = attributes["directory"] = _relative(directory, base)
            record = _record(base / directory) if row.is_complete else None
            if record is not None:
                facts = facts_of(record)
                times += [str(record[key]) for key in ("started", "ended") if record.get(key)]
                attributes |= {DATA: facts.get("data"), BUDGET: budget_of(record)}
                attributes[SEED] = record["config"].get("seed")
        if record is None and row.is_complete:
            # The run is on another machine, so only what it returned to the study is known.
            facts = {key: str(attributes[key]) for key in ("data", "commit") if key in attributes}
            if type(attributes.get("classes")) is int:  # another program may return a string
                facts["classes"] = str(attributes["classes"])
            if "steps" in attributes and not is_diverged(row):
                facts["steps"] = str(attributes["steps"])
                attributes[BUDGET] = attributes["steps"]
            for name, key in ((DATA, "data"), (SEED, "seed")):
                if key in attributes:
                    attributes[name] = attributes[key]
        for name, value in facts.items():
            found.setdefault(name, Counter())[value] += 1
        rows.append(replace(row, attributes=attributes))
    about = {
        **(_sampler(base / CONFIGURATION_FILE) if is_of_sweep else {}),
        **table.about,
        "runs": {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())},
    }
    if times:
        about |= {"first_started": min(times), "last_ended": max(times)}
    return replace(table, rows=tuple(rows), about=about)


def is_planned(about: Mapping[str, Any]) -> bool | None:
    """Return whether the points were chosen before any result was known, None if unknown."""
    sampler = about.get("sampler")
    return None if sampler is None else str(sampler).rpartition(".")[2] in _PLANNED


def mixed(rows: Iterable[TrialRow]) -> dict[str, list[Cell]]:
    """Return attribute -> values, for each of data and budget that has several among the rows."""
    found: dict[str, set[Cell]] = {DATA: set(), BUDGET: set()}
    for row in rows:
        for name, values in found.items():
            if row.attributes.get(name) is not None:
                values.add(row.attributes[name])
    return {
        name: sorted(values, key=_sort_key) for name, values in found.items() if len(values) > 1
    }


def _sort_key(value: Cell) -> tuple[float, str]:
    return (value if isinstance(value, int | float) else math.inf, str(value))


def facts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return data, budget, hardware and versions of a run.json as strings."""
    config, hardware = record.get("config") or {}, record.get("hardware") or {}
    facts = {
        "data": (record.get("data") or {}).get("source"),
        "steps": budget_of(record),
        "batch size": (config.get("data") or {}).get("batch_size"),
        "classes": number_of_classes(record),
        "processor": hardware.get("processor"),
        "cores": hardware.get("cores"),
        "threads": hardware.get("torch_threads"),
        "accelerators": ", ".join(hardware.get("accelerators") or []) or None,
        "versions": ", ".join(
            f"{name} {number}" for name, number in (record.get("versions") or {}).items() if number
        )
        or None,
        "commit": record.get("commit"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def classes_of(about: Mapping[str, Any]) -> int | None:
    """Return the number of classes of the runs' data, None if unknown."""
    found = next(iter((about.get("runs") or {}).get("classes") or ()), None)
    return None if found is None else int(found)


def budget_of(record: Mapping[str, Any]) -> Cell:
    """Return the steps that a run may take, or its epochs as words if it has no limit of steps."""
    trainer = (record.get("config") or {}).get("trainer") or {}
    steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    return f"{epochs} epochs" if steps == -1 and epochs else steps


def _record(directory: Path) -> dict[str, Any] | None:
    try:
        return read_run(directory)
    except ValueError:  # a run of another program or of another version
        return None


def _relative(directory: str, base: Path) -> str:
    """Return a path below the sweep's directory relative to that directory.

    A sweep that was moved or copied has the old paths, of which only the last part is right.
    """
    path = Path(directory)
    if path.is_relative_to(base.absolute()):
        return str(path.relative_to(base.absolute()))
    if path.is_absolute() and path.parent.name == base.absolute().name:
        return path.name
    return directory


def _sampler(path: Path) -> dict[str, str]:
    """Return the sampler of a sweep's configuration as an entry of `about`, if there is one."""
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        sampler = (config["hydra"]["sweeper"].get("sampler") or {}).get("_target_")
        return {"sampler": sampler} if sampler else {}
    except Exception:  # no such file, or the file of another program
        return {}
