"""trials.csv: what has been measured, under which versions, data and options.

A row is one measure of one network. Each writing replaces the whole file in one step, so that a
killed process leaves the rows of whole networks, and the same command measures the others.
`setups.json` beside it lists the versions, data and options under which rows were measured.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bn_lightning.runs.atomic_write import write_atomically, write_json
from bn_lightning.sweeps.analysis.trials import TABLE_FILE

SETUPS_FILE = "setups.json"

_COLUMNS = ("claim", "arm", "setting", "seed", "setup", "seconds", "measure", "value")


class TrialKey(NamedTuple):
    """Which network was measured.

    Attributes:
        claim: name.
        arm: name.
        setting: label.
        seed: of weights and batches.
    """

    claim: str
    arm: str
    setting: str
    seed: int


@dataclass(frozen=True)
class TrialResult:
    """What was measured of one network.

    Attributes:
        setup: place in `setups.json`.
        seconds: processor time of training and measuring it; of a stack, its share.
        measures: name -> value.
    """

    setup: int
    seconds: float
    measures: Mapping[str, float]


class ResultTable:
    """The measured networks of a folder.

    Args:
        folder: read if it has results, and written to.
        setup: versions, data and options of what will be measured now; plain values.
        allow_mixed: add to results of another setup.

    Raises:
        ValueError: the folder has results of another setup, or files of something else.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any], allow_mixed: bool) -> None:
        self.folder = folder
        self.setups: list[dict[str, Any]] = []
        self.results: dict[TrialKey, TrialResult] = {}
        try:
            if (folder / SETUPS_FILE).exists():
                self.setups = json.loads((folder / SETUPS_FILE).read_text(encoding="utf-8"))
                self.results = _read(folder / TABLE_FILE)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected `{folder}` to have the {TABLE_FILE} and {SETUPS_FILE} of this command,"
                f" got others: {error}; name another --output"
            ) from error
        # As JSON has them, so that what was written compares equal.
        current = json.loads(json.dumps(setup))
        others = [other for other in self.setups if other != current]
        if others and not allow_mixed:
            raise ValueError(
                f"expected `{folder}` to have results of the same versions, data and options, got "
                f"others: {_difference(others[0], current)}; name another --output, or add "
                "--allow-mixed"
            )
        if current not in self.setups:
            self.setups.append(current)
        self.setup = self.setups.index(current)

    @property
    def used_setups(self) -> list[dict[str, Any]]:
        """The setups that there are results of."""
        used = {result.setup for result in self.results.values()}
        return [setup for number, setup in enumerate(self.setups) if number in used]

    @property
    def is_mixed(self) -> bool:
        """Whether there are results of several setups."""
        return len(self.used_setups) > 1

    def mixture(self) -> str:
        """Return how the first two setups differ, "" if there is one."""
        return _difference(*self.setups[:2]) if len(self.setups) > 1 else ""

    def add(self, measured: Mapping[TrialKey, tuple[float, Mapping[str, float]]]) -> None:
        """Add seconds and measures of networks, and write the files."""
        for key, (seconds, measures) in measured.items():
            self.results[key] = TrialResult(self.setup, round(seconds, 3), dict(measures))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETUPS_FILE, self.setups)
        write_atomically(self.folder / TABLE_FILE, _to_csv(self.results))


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    texts = [
        f"{name} {one.get(name)} and {other.get(name)}"
        for name in [*other, *(one.keys() - other.keys())]
        if one.get(name) != other.get(name)
    ]
    return "; ".join(texts)


def _to_csv(results: Mapping[TrialKey, TrialResult]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for key, result in results.items():
        for name, value in result.measures.items():
            writer.writerow([*key, result.setup, result.seconds, name, f"{value:.9g}"])
    return buffer.getvalue()


def _read(path: Path) -> dict[TrialKey, TrialResult]:
    results: dict[TrialKey, TrialResult] = {}
    for row in _rows(path.read_text(encoding="utf-8").splitlines()):
        key = TrialKey(row["claim"], row["arm"], row["setting"], int(row["seed"]))
        found = results.setdefault(key, TrialResult(int(row["setup"]), float(row["seconds"]), {}))
        results[key] = TrialResult(
            found.setup, found.seconds, {**found.measures, row["measure"]: float(row["value"])}
        )
    return results


def _rows(lines: Sequence[str]) -> Iterable[dict[str, str]]:
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise ValueError(f"{TABLE_FILE} has the columns {reader.fieldnames}")
    return reader
