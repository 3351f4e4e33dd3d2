"""Runs side by side: their labels, their arms, how much wider their inputs became."""

from pathlib import Path
from typing import Any

import pytest

from bn_lightning.metrics_csv import MetricsCSVLogger
from bn_lightning.run_record import RunRecord
from bn_lightning.sweeps.runs import arm_of, read_runs, width_growth

BATCH = {"_target_": "bn_lightning.models.normalization.batch_norm"}
TORCH = {"_target_": "bn_lightning.models.normalization.torch_batch_norm"}


def run(directory: Path, norm: Any, lr: float = 1.0, seed: int = 1, spread: float = 4.0) -> Path:
    directory.mkdir(parents=True)
    config = {"norm": norm, "seed": seed, "optimizer": {"lr": lr}, "trainer": {"max_steps": 2}}
    record = RunRecord(directory, config)
    record.end("completed", data={"source": "mnist"}, steps=2, metrics={"test/accuracy": 0.9})
    logger = MetricsCSVLogger(directory)
    for step, half in ((0, 1.0), (2, spread)):
        percentiles = {f"activation/p{p}": s * half for p, s in ((15, -1), (50, 0), (85, 1))}
        logger.log_metrics({"test/accuracy": 0.9, **percentiles}, step)
    logger.save()
    return directory


def test_arms() -> None:
    assert [arm_of({"norm": norm}) for norm in (None, BATCH, TORCH)] == ["none", "batch", "torch"]


def test_labels_say_what_differs(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a", BATCH),
        run(tmp_path / "b", None, lr=0.1),
        run(tmp_path / "c", None, lr=0.1, seed=2),
        run(tmp_path / "d", None, lr=0.1, seed=2),
    ]
    assert [read.label for read in read_runs(runs)] == [
        "with BatchNorm",
        "without BatchNorm, seed 1",
        "without BatchNorm, seed 2",
        "without BatchNorm, seed 2 (2)",
    ]


def test_a_run_as_a_line_of_a_table(tmp_path: Path) -> None:
    (read,) = read_runs([run(tmp_path / "a", None)])
    row = read.as_row(5)
    assert (row.number, row.state) == (5, "COMPLETE")
    assert row.params == {"norm": "none", "optimizer.lr": 1.0, "seed": 1, "trainer.max_steps": 2}
    assert row.attributes["test/accuracy"] == 0.9 and row.attributes["run/data"] == "mnist"


@pytest.mark.parametrize(("spread", "growth"), [(4.0, 4), (0.5, 0.5)], ids=["wider", "narrower"])
def test_width_growth(tmp_path: Path, spread: float, growth: float) -> None:
    (read,) = read_runs([run(tmp_path / "a", None, spread=spread)])
    assert width_growth(read) == pytest.approx(growth)
