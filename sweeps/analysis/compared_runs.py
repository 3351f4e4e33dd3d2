"""Runs to put side by side: what each is called, which arm it is, what it logged."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.sweeps.analysis.arms import BASELINE, label_of
from bn_lightning.sweeps.analysis.provenance import BUDGET, DATA, facts_of
from bn_lightning.sweeps.analysis.trials import Cell, Row

# What may tell runs of one arm apart, and what it is called.
_DIFFERENCES = {
    "optimizer.lr": "lr",
    "init.std": "std",
    "seed": "seed",
    "trainer.max_steps": "steps",
    "data.batch_size": "batch",
}

# Of an override in a label.
MOST_CHARACTERS = 60

OVERRIDES_FILE = ".hydra/overrides.yaml"

# Beginnings of overrides that do not change what a run trains, or are its arm.
_BESIDE = ("ckpt_path", "extras", "hydra", "logger", "norm", "paths", "resume", "task_name")

# Keys by which runs of one kind may differ.
_OF_ONE_RUN = ("ckpt_path", "logger", "paths", "resume", "seed", "task_name")

# The callables of conf/norm/, by the arm that they are: BatchNorm over all ranks is BatchNorm.
_ARMS = {
    "bn_lightning.models.normalization.batch_norm": "batch",
    "bn_lightning.models.normalization.sync_batch_norm": "batch",
    "bn_lightning.models.normalization.torch_batch_norm": "torch",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        directory: where it lies.
        label: what it is called; no two runs that are read together have the same.
        arm: which network, as `arms.py` names them.
        record: its run.json.
        metrics: metric -> (step, value) pairs.
    """

    directory: Path
    label: str
    arm: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Sequence[tuple[int, float]]]

    def as_row(self, number: int) -> Row:
        """The run as a line of a table of trials."""
        facts = facts_of(self.record)
        record = self.record
        attributes: dict[str, Cell] = {
            **(record.get("metrics") or {}),
            **{key: record[key] for key in ("status", "steps", "seconds") if key in record},
            **{key: record[key] for key in ("steps_per_second", "diverged_at") if key in record},
            "label": self.label,
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
        return Row(number, state, (), {"norm": self.arm, **params}, attributes)


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read runs that trained with and without normalisation.

    Raises:
        ValueError: a directory is no run's, or its run did not log what Figure 1 shows.
    """
    records = [read_run(directory) for directory in directories]
    metrics = [read_metrics(directory) for directory in directories]
    for directory, record, logged in zip(directories, records, metrics, strict=True):
        wanted = {"test/accuracy", *(f"activation/p{number}" for number in (15, 50, 85))}
        missing = sorted(wanted - logged.keys())
        if "norm" not in record["config"] or missing:
            raise ValueError(
                f"{directory} expected a run of bn_lightning.train and its metrics.csv, got one "
                f"without {', '.join(missing) or 'norm'}; run it with data.test_curve=true and "
                "callbacks.activation_percentiles"
            )
    arms = [arm_of(record["config"]) for record in records]
    return [
        Run(directory, label, arm, record, logged)
        for directory, label, arm, record, logged in zip(
            directories, _labels(arms, records, directories), arms, records, metrics, strict=True
        )
    ]


def arm_of(config: Mapping[str, Any]) -> str:
    """The arm of a run, from its configuration's `norm`; one of another kind by its own name."""
    norm = config["norm"]
    if norm is None:
        return BASELINE
    name = str(norm.get("_target_", norm) if isinstance(norm, Mapping) else norm)
    return _ARMS.get(name, name)


def width_growth(run: Run) -> float | None:
    """How much wider the 15th to 85th percentile of one unit's inputs became.

        growth = (p85 - p15 at the end) / (p85 - p15 at the start)

    Of each percentile the median over the layer's units, where the run logged it; None if the first
    width is 0.
    """
    names = [f"activation/p{number}" for number in (15, 85)]
    medians = [f"{name}_median" for name in names]
    chosen = medians if run.metrics.keys() >= {*medians} else names
    low, high = (run.metrics[name] for name in chosen)
    first, last = (high[i][1] - low[i][1] for i in (0, -1))
    return last / first if first > 0 else None


def runtimes(runs: Sequence[Run]) -> dict[str, float]:
    """Arm -> seconds of training, evaluations included, the mean over its runs.

    Of completed runs that were never interrupted; empty unless all of them took as many steps, and
    those of one arm differ by their seeds alone.
    """
    whole = [
        run
        for run in runs
        if run.record["status"] == "completed"
        and not run.record.get("resumed_at")
        and "seconds" in run.record
    ]
    if len({run.record.get("steps") for run in whole}) != 1:
        return {}
    if len({(run.arm, _trained(run.record)) for run in whole}) != len({run.arm for run in whole}):
        return {}
    seconds: dict[str, list[float]] = {}
    for run in whole:
        seconds.setdefault(run.arm, []).append(run.record["seconds"])
    return {arm: fmean(values) for arm, values in seconds.items()}


def runtime_sentences(times: Mapping[str, float]) -> list[str]:
    """The seconds of each arm, and of each arm with normalisation how many times those without.

    Args:
        times: from `runtimes`.
    """
    if not times:
        return []
    texts = [", ".join(f"{label_of(arm)} {value:.2f} s" for arm, value in times.items())]
    base = times.get(BASELINE)
    for arm, value in times.items():
        if base and arm != BASELINE:
            texts.append(f"{label_of(arm)} / {label_of(BASELINE)}: {value / base:.2f}")
    return [f"Time of training: {'; '.join(texts)}"]


def _labels(
    arms: Sequence[str], records: Sequence[Mapping[str, Any]], directories: Sequence[Path]
) -> list[str]:
    """The arm, and for runs of one arm what tells them apart: the task's name, else all else."""
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
    """The overrides of a run that change what it trains and have no word of their own."""
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(directory / OVERRIDES_FILE))
    except Exception:  # copied without it, or whatever else another program may have put there
        return []
    texts = [text for text in overrides if isinstance(text, str)]
    keys = [text.partition("=")[0].lstrip("+~") for text in texts]
    return [
        text.lstrip("+")[:MOST_CHARACTERS]
        for text, key in zip(texts, keys, strict=True)
        if key not in _DIFFERENCES and key.partition(".")[0] not in _BESIDE
    ]


def _trained(record: Mapping[str, Any]) -> str:
    """All that a run's configuration says but for its seed, its name and its places, as text."""
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
