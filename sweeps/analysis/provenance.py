"""How the trials of a table were run, from what their runs left on disk."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bn_lightning.runs.record import number_of_classes, read_run
from bn_lightning.sweeps.analysis.trials import Cell, Row, Table, is_diverged
from bn_lightning.sweeps.engine.sampling import PLANNED
from bn_lightning.sweeps.engine.stored_names import CONFIGURATION_FILE

DATA, BUDGET = "run/data", "run/max_steps"
"""Attributes of a trial: the data set's name, and the steps that it was given."""

# By their names: a report imports no class that a configuration names.
_PLANNED = tuple(kind.__name__ for kind in PLANNED)


def with_provenance(table: Table, base: Path, is_of_sweep: bool = True) -> Table:
    """Add what the runs and the sweep's configuration say; directories become relative to `base`.

    `about` gets `runs`: for each of data, budget, hardware, versions..., what was found and in how
    many finished runs; and, from the sweep's configuration, `sampler`, and `command` where the
    study did not keep it and it is known.

    Args:
        table: from a study; one read from trials.csv has all of it already.
        base: the sweep's directory.
        is_of_sweep: whether the configuration in `base` is this sweep's; not so where the study was
            given by the address of its storage, and `base` is where the command runs.
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
                attributes |= {DATA: facts.get("data"), BUDGET: _budget(record)}
        if record is None and row.is_complete:
            # The run is on another machine: what it returned says less.
            facts = {key: str(attributes[key]) for key in ("data", "commit") if key in attributes}
            if type(attributes.get("classes")) is int:  # another program may return a text
                facts["classes"] = str(attributes["classes"])
            if "steps" in attributes and not is_diverged(row):
                facts["steps"] = str(attributes["steps"])
                attributes[BUDGET] = attributes["steps"]
            if "data" in attributes:
                attributes[DATA] = attributes["data"]
        for name, value in facts.items():
            found.setdefault(name, Counter())[value] += 1
        rows.append(replace(row, attributes=attributes))
    about = {
        **(_configuration(base / CONFIGURATION_FILE) if is_of_sweep else {}),
        **table.about,
        "runs": {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())},
    }
    if times:
        about |= {"first_started": min(times), "last_ended": max(times)}
    return replace(table, rows=tuple(rows), about=about)


def is_planned(about: Mapping[str, Any]) -> bool | None:
    """Whether the points were chosen before any result was known; None if that is not known."""
    sampler = about.get("sampler")
    return None if sampler is None else str(sampler).rpartition(".")[2] in _PLANNED


def mixed(rows: Iterable[Row]) -> dict[str, list[Cell]]:
    """Attribute -> its values, of those of data and budget that have several among these trials."""
    found: dict[str, set[Cell]] = {DATA: set(), BUDGET: set()}
    for row in rows:
        for name, values in found.items():
            if row.attributes.get(name) is not None:
                values.add(row.attributes[name])
    return {
        name: sorted(values, key=_in_order) for name, values in found.items() if len(values) > 1
    }


def _in_order(value: Cell) -> tuple[float, str]:
    return (value if isinstance(value, int | float) else math.inf, str(value))


def facts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run.json says of how it was run, as texts that can be counted and shown."""
    config, hardware = record.get("config") or {}, record.get("hardware") or {}
    facts = {
        "data": (record.get("data") or {}).get("source"),
        "steps": _budget(record),
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
    """How many classes the runs told apart; None where that is not known."""
    found = next(iter((about.get("runs") or {}).get("classes") or ()), None)
    return None if found is None else int(found)


def _budget(record: Mapping[str, Any]) -> Cell:
    return ((record.get("config") or {}).get("trainer") or {}).get("max_steps")


def _record(directory: Path) -> dict[str, Any] | None:
    try:
        return read_run(directory)
    except ValueError:  # another program's run, or of another version
        return None


def _relative(directory: str, base: Path) -> str:
    """A path below the sweep's directory as one relative to it, wherever the sweep was moved to.

    A sweep copied from another machine has the paths of that machine, whose end is still right.
    """
    path = Path(directory)
    if path.is_relative_to(base.absolute()):
        return str(path.relative_to(base.absolute()))
    if path.is_absolute() and path.parent.name == base.absolute().name:
        return path.name
    return directory


def _configuration(path: Path) -> dict[str, Any]:
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        hydra = config["hydra"]
        overrides = [
            *hydra["overrides"]["task"],
            *(text for text in hydra["overrides"]["hydra"] if text != "hydra.mode=MULTIRUN"),
        ]
        about = {}
        if _is_of_train(hydra):
            command = ["python", "-m", "bn_lightning.train", "-m", *overrides]
            about["command"] = shlex.join(command)
        sampler = (hydra["sweeper"].get("sampler") or {}).get("_target_")
        return about | ({"sampler": sampler} if sampler else {})
    except Exception:  # absent, or whatever else another program may have put there
        return {}


def _is_of_train(hydra: Mapping[str, Any]) -> bool:
    """Whether `python -m bn_lightning.train` swept, without a `--config-dir`.

    For studies whose sweeper did not keep its command yet.
    """
    sources = hydra["runtime"]["config_sources"]
    main = [f"{s['schema']}://{s['path']}" for s in sources if s["provider"] == "main"]
    is_complete = not any(source["provider"] == "command-line" for source in sources)
    return (
        main == ["pkg://bn_lightning.conf"]
        and hydra["job"]["config_name"] == "train"
        and is_complete
    )
