"""Runs side by side: their labels, arms and metrics."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run, training_seconds
from bn_lightning.sweeps.analysis.arms import BASELINE, label_of
from bn_lightning.sweeps.analysis.provenance import BUDGET, DATA, facts_of
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow

# Configuration key that may differ among runs of one arm -> its name in labels.
_DIFFERENCES = {
    "optimizer.lr": "lr",
    "init.std": "std",
    "seed": "seed",
    "trainer.max_steps": "steps",
    "data.batch_size": "batch",
}

MOST_CHARACTERS = 60  # of an override in a label

OVERRIDES_FILE = ".hydra/overrides.yaml"

# First words of overrides that do not change what a run trains, or that set its arm.
_NOT_IN_LABELS = ("ckpt_path", "extras", "hydra", "logger", "norm", "paths", "resume", "task_name")

# Keys that may differ among runs of the same configuration.
_OF_ONE_RUN = ("ckpt_path", "logger", "paths", "resume", "seed", "task_name")

# The callables of conf/norm/ -> arm. Synchronized BatchNorm belongs to the same arm.
_ARMS = {
    "bn_lightning.models.normalization.batch_norm": "batch",
    "bn_lightning.models.normalization.sync_batch_norm": "batch",
    "bn_lightning.models.normalization.ghost_batch_norm": "ghost",
    "bn_lightning.models.normalization.torch_batch_norm": "torch",
}


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        directory: of the run.
        label: its name, unique among the runs that are read together.
        arm: its arm, as in arms.py.
        record: the content of its run.json.
        metrics: metric -> (step, value) pairs.
    """

    directory: Path
    label: str
    arm: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Sequence[tuple[int, float]]]

    def as_row(self, number: int) -> TrialRow:
        """Return the run as a row of a table of trials."""
        facts = facts_of(self.record)
        record = self.record
        attributes: dict[str, Cell] = {
            **(record.get("metrics") or {}),
            **{key: record[key] for key in ("status", "steps") if key in record},
            "seconds": training_seconds(record),
            **{key: record[key] for key in ("steps_per_second", "diverged_at") if key in record},
            "label": self.label,
            "directory": str(self.directory),
            "commit": record.get("commit"),
            DATA: facts.get("data"),
            BUDGET: _selected(record["config"], "trainer.max_steps"),
        }
        states = {"completed": "COMPLETE", "diverged": "COMPLETE", "running": "RUNNING"}
        params: dict[str, Cell] = {
            key: _selected(record["config"], key)
            for key in _DIFFERENCES
            if _selected(record["config"], key) is not None
        }
        state = states.get(record["status"], "FAIL")
        return TrialRow(number, state, (), {"norm": self.arm, **params}, attributes)


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """Read runs that trained with and without normalization.

    Raises:
        ValueError: a directory does not hold a run, or its run lacks a metric of Figure 1.
    """
    records = [read_run(directory) for directory in directories]
    metrics = [read_metrics(directory) for directory in directories]
    for directory, record, logged in zip(directories, records, metrics, strict=True):
        wanted = {"test/accuracy", *(f"activation/p{number}" for number in (15, 50, 85))}
        missing = sorted(wanted - logged.keys())
        if "norm" not in record["config"] or missing:
            raise ValueError(
                f"expected `{directory}` to be a run of bn_lightning.train with its metrics.csv, "
                f"got one without {', '.join(missing) or 'norm'}; run it with "
                "data.test_curve=true and callbacks.activation_percentiles"
            )
    arms = [arm_of_config(record["config"]) for record in records]
    return [
        ComparedRun(directory, label, arm, record, logged)
        for directory, label, arm, record, logged in zip(
            directories, _labels(arms, records, directories), arms, records, metrics, strict=True
        )
    ]


def arm_of_config(config: Mapping[str, Any]) -> str:
    """Return the arm of a run's `norm`: one of arms.py, or the name of its callable."""
    norm = config["norm"]
    if norm is None:
        return BASELINE
    name = str(norm.get("_target_", norm) if isinstance(norm, Mapping) else norm)
    return _ARMS.get(name, name)


def width_growth(run: ComparedRun) -> float | None:
    """Return how much wider the 15th to 85th percentile of a unit's inputs became.

        growth = (p85 - p15 at the end) / (p85 - p15 at the start)

    The percentiles are medians over the units of the layer if the run logged them, else those of
    one unit. None if the first width is 0.
    """
    names = [f"activation/p{number}" for number in (15, 85)]
    medians = [f"{name}_median" for name in names]
    chosen = medians if run.metrics.keys() >= {*medians} else names
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


def _labels(
    arms: Sequence[str], records: Sequence[Mapping[str, Any]], directories: Sequence[Path]
) -> list[str]:
    """Return unique labels: the arm, and the differences among runs of one arm.

    If the task's name differs, it is the label; otherwise all differences are listed.
    """
    labels = list(map(label_of, arms))
    for arm in set(arms):
        places = [i for i, other in enumerate(arms) if other == arm]
        configs = [records[i]["config"] for i in places]
        names = [str(config.get("task_name")) for config in configs]
        words = [[name] if len(set(names)) > 1 else [] for name in names]
        if len(set(names)) < len(names):
            known, typed = _known_differences(configs), [_typed(directories[i]) for i in places]
            shared = set.intersection(*map(set, typed))
            for i, texts in enumerate(typed):
                words[i] += [*known[i], *(text for text in texts if text not in shared)]
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


def _typed(directory: Path) -> list[str]:
    """Return the overrides that change what a run trains and are not in `_DIFFERENCES`."""
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(directory / OVERRIDES_FILE))
    except Exception:  # no such file, or the file of another program
        return []
    texts = [text for text in overrides if isinstance(text, str)]
    keys = [text.partition("=")[0].lstrip("+~") for text in texts]
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
