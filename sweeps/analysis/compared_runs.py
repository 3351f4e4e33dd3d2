"""Runs side by side: their labels, arms and metrics, and which of them differ in seed alone."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run, training_seconds
from bn_lightning.sweeps.analysis.arms import BASELINE, arm_of_config, label_of
from bn_lightning.sweeps.analysis.provenance import BUDGET, DATA, budget_of, facts_of
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow
from bn_lightning.sweeps.engine.space import key_of

# Configuration key that may differ among runs of one arm -> its name in labels.
_DIFFERENCES = {
    "optimizer.lr": "learning rate",
    "init.std": "initial standard deviation",
    "trainer.max_steps": "steps",
    "data.batch_size": "batch size",
}

MOST_CHARACTERS = 60  # of an override in a label

OVERRIDES_FILE = ".hydra/overrides.yaml"

# First words of overrides that do not change what a run trains, or that set its arm or its seed.
_NOT_IN_LABELS = (
    "ckpt_path",
    "extras",
    "hydra",
    "logger",
    "norm",
    "paths",
    "resume",
    "seed",
    "task_name",
)

# Keys that may differ among runs of the same configuration.
_OF_ONE_RUN = ("ckpt_path", "logger", "paths", "resume", "seed", "task_name")

WITH_RESULT = ("completed", "diverged", "stopped early")
"""The statuses of runs that came to their end, and so have a result."""


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        directory: of the run.
        group: name of the runs that differ from this one in seed alone, this one included.
        label: its name, unique among the runs that are read together.
        arm: its arm, as in arms.py.
        record: the content of its run.json.
        metrics: metric -> (step, value) pairs.
    """

    directory: Path
    group: str
    label: str
    arm: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def has_result(self) -> bool:
        """Whether the run came to its end."""
        return self.record["status"] in WITH_RESULT

    @property
    def task(self) -> str:
        """The name of its task, "" if it has none."""
        return str(self.record["config"].get("task_name") or "")

    def as_row(self, number: int, base: Path) -> TrialRow:
        """Return the run as a row of a table of trials, with its directory relative to `base`."""
        facts = facts_of(self.record)
        record = self.record
        attributes: dict[str, Cell] = {
            **(record.get("metrics") or {}),
            **{key: record[key] for key in ("status", "steps") if key in record},
            "seconds": training_seconds(record),
            **{
                key: record[key]
                for key in ("steps_per_second", "diverged_at", "stopped_at")
                if key in record
            },
            "label": self.label,
            "directory": os.path.relpath(self.directory, base).replace(os.sep, "/"),
            "commit": record.get("commit"),
            DATA: facts.get("data"),
            BUDGET: budget_of(record),
        }
        params: dict[str, Cell] = {
            key: _selected(record["config"], key)
            for key in (*_DIFFERENCES, "seed")
            if _selected(record["config"], key) is not None
        }
        state = "COMPLETE" if self.has_result else "FAIL"
        if record["status"] == "running":
            state = "RUNNING"
        return TrialRow(number, state, (), {"norm": self.arm, **params}, attributes)


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """Read runs, of any network and with any metrics.

    Raises:
        ValueError: a directory does not hold a run.
    """
    records = [read_run(directory) for directory in directories]
    metrics = [read_metrics(directory) for directory in directories]
    arms = [arm_of_config(record["config"]) for record in records]
    groups = _groups(arms, records, directories)
    seeds = [record.get("seed") for record in records]
    return [
        ComparedRun(
            directory,
            group,
            group if seed is None else f"{group}, seed {seed}",
            arm,
            record,
            logged,
        )
        for directory, group, seed, arm, record, logged in zip(
            directories, groups, seeds, arms, records, metrics, strict=True
        )
    ]


def width_growth(run: ComparedRun) -> float | None:
    """Return how much wider the 15th to 85th percentile of a unit's inputs became.

        growth = (p85 - p15 at the end) / (p85 - p15 at the start)

    The percentiles are medians over the units of the layer if the run logged them, else those of
    one unit. None if the run logged neither, or if the first width is 0.
    """
    names = [f"activation/p{number}" for number in (15, 85)]
    medians = [f"{name}_median" for name in names]
    chosen = medians if run.metrics.keys() >= {*medians} else names
    if not run.metrics.keys() >= {*chosen}:
        return None
    low, high = (run.metrics[name] for name in chosen)
    first, last = (high[i][1] - low[i][1] for i in (0, -1))
    return last / first if first > 0 else None


def runtimes(runs: Sequence[ComparedRun]) -> dict[str, float]:
    """Return arm -> seconds of training with evaluations, the mean over its runs.

    Only completed runs whose time is known count. The result is empty unless all of them took the
    same number of steps and runs of one arm differ in their seeds only.
    """
    whole = [
        (run, seconds)
        for run in runs
        if run.record["status"] == "completed"
        and (seconds := training_seconds(run.record)) is not None
    ]
    if len({run.record.get("steps") for run, _ in whole}) != 1:
        return {}
    arms = {run.arm for run, _ in whole}
    if len({(run.arm, _trained(run.record)) for run, _ in whole}) != len(arms):
        return {}
    times: dict[str, list[float]] = {}
    for run, seconds in whole:
        times.setdefault(run.arm, []).append(seconds)
    return {arm: fmean(values) for arm, values in times.items()}


def runtime_sentences(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a sentence with the seconds of each arm and their ratios to the baseline.

    A second sentence names arms whose time is unknown.
    """
    times = runtimes(runs)
    if not times:
        return []
    texts = [", ".join(f"{label_of(arm)} {value:.2f} s" for arm, value in times.items())]
    base = times.get(BASELINE)
    for arm, value in times.items():
        if base and arm != BASELINE:
            texts.append(f"{label_of(arm)} / {label_of(BASELINE)}: {value / base:.2f}")
    sentences = [f"Time of training: {'; '.join(texts)}"]
    unknown = [label_of(arm) for arm in dict.fromkeys(run.arm for run in runs) if arm not in times]
    if unknown:
        sentences.append(
            f"Time unknown: {', '.join(unknown)}, of which no run completed with all of its time"
            " recorded"
        )
    return sentences


def _groups(
    arms: Sequence[str], records: Sequence[Mapping[str, Any]], directories: Sequence[Path]
) -> list[str]:
    """Return the name of each run's group: the arm, and the differences among groups of one arm.

    Runs of one group have the same task and configuration, and each has another seed. If the task's
    name differs among the groups of an arm, it is enough; otherwise all differences are listed.
    """
    repeats: Counter[tuple[str, ...]] = Counter()
    keys = []
    for arm, record in zip(arms, records, strict=True):
        trained = arm, str(record["config"].get("task_name")), _trained(record)
        of_seed = (*trained, str(record.get("seed")))
        keys.append((*trained, str(repeats[of_seed])))
        repeats[of_seed] += 1
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    places = sorted(first.values())
    labels = _labels(
        [arms[i] for i in places],
        [records[i]["config"] for i in places],
        [_typed(directories[i]) for i in places],
    )
    of_place = dict(zip(places, labels, strict=True))
    return [of_place[first[key]] for key in keys]


def _labels(
    arms: Sequence[str], configs: Sequence[Mapping[str, Any]], typed: Sequence[Sequence[str]]
) -> list[str]:
    labels = list(map(label_of, arms))
    for arm in set(arms):
        places = [i for i, other in enumerate(arms) if other == arm]
        names = [str(configs[i].get("task_name")) for i in places]
        words = [[name] if len(set(names)) > 1 else [] for name in names]
        if len(set(names)) < len(names):
            known = _known_differences([configs[i] for i in places])
            shared = set.intersection(*(set(typed[i]) for i in places))
            for i, place in enumerate(places):
                words[i] += [*known[i], *(text for text in typed[place] if text not in shared)]
        for i, place in enumerate(places):
            labels[place] = ", ".join([labels[place], *words[i]])
    seen: Counter[str] = Counter()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(f"{label} ({seen[label]})" if seen[label] > 1 else label)
    return unique


def _known_differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{word} {_selected(config, key):g}"
            for key, word in _DIFFERENCES.items()
            if len({repr(_selected(other, key)) for other in configs}) > 1
            and isinstance(_selected(config, key), int | float)
        ]
        for config in configs
    ]


def typed_overrides(directory: Path) -> list[str]:
    """Return the overrides of a run as typed, [] if they are unknown."""
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(directory / OVERRIDES_FILE))
    except Exception:  # no such file, or the file of another program
        return []
    return [text for text in overrides if isinstance(text, str)]


def _typed(directory: Path) -> list[str]:
    """Return the overrides that change what a run trains and are not in `_DIFFERENCES`."""
    texts = typed_overrides(directory)
    keys = [key_of(text) for text in texts]
    return [
        text.lstrip("+")[:MOST_CHARACTERS]
        for text, key in zip(texts, keys, strict=True)
        if key not in _DIFFERENCES and key.partition(".")[0] not in _NOT_IN_LABELS
    ]


def _trained(record: Mapping[str, Any]) -> str:
    """Return the configuration of a run as text, without its seed, name and directories."""
    config = record["config"]
    place = str(_selected(config, "paths.output_dir"))

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: without(v) for k, v in value.items() if k not in _OF_ONE_RUN}
        return value.replace(place, "") if isinstance(value, str) else value

    return json.dumps(without(config), sort_keys=True, default=str)


def _selected(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for word in key.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value
