"""What is printed of a run that ended."""

import math
from pathlib import Path
from typing import Any

import pytest

from bn_lightning.cli.run_table import print_run_table, print_validation_table
from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.record import RunRecord, read_run

DATA = {"source": "digits", "train": 1317, "validation": 120, "test": 360}


def ended(folder: Path, status: str = "completed", **content: Any) -> RunRecord:
    record = RunRecord(folder, {"task_name": "mnist_bn"})
    record.end(
        status,
        **{
            "data": DATA,
            "steps": 50_000,
            "seconds": 12.34,
            "steps_per_second": 4051.9,
            "metrics": {"test/accuracy": 0.98126, "test/loss": 0.0625},
            **content,
        },
    )
    return record


class TestSummary:
    def test_the_result_and_where_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_run_table(ended(tmp_path).content, tmp_path)
        out = capsys.readouterr().out
        assert out.strip().splitlines()[-1] == str(tmp_path)
        for words in (
            "mnist_bn: completed",
            "digits, 1,317 / 120 / 360",
            "0.9813",
            "0.0625",
            "50,000",
            "12.3 s, 4052 steps/s",
            "MiB",
        ):
            assert words in out
        assert "diverged" not in out

    def test_a_metric_of_ones_own(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What chose the best checkpoint, and every number of the test."""
        metrics = {"val/mae": 0.1251, "val/loss": 0.75, "test/mae": 0.2512, "test/loss": 0.5}
        record = ended(tmp_path, metrics=metrics).content
        named = {"task_name": "waves_reg", "norm": "batch", "seed": 1}
        checkpoints = {"monitor": "val/mae", "mode": "min"}
        record["config"] = named | {"callbacks": {"checkpoints": checkpoints}}
        print_run_table(record, tmp_path)
        out = capsys.readouterr().out
        for words in ("0.1251", "0.2512", "0.5000", "test/loss "):
            assert words in out
        assert "0.7500" not in out and "log loss" not in out and "none before" not in out
        assert "waves_reg, with BatchNorm, seed 1: completed\n" in out  # one line

    def test_the_title_names_task_arm_and_seed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """An evaluation names those of the network that it evaluates."""
        record = ended(tmp_path).content
        named = {"task_name": "mine", "norm": None, "seed": 3}
        for config, trained in ((named, None), ({"task_name": "evaluate"}, named)):
            print_run_table(record | {"config": config}, tmp_path, trained)
            words = " ".join(capsys.readouterr().out.split())
            assert "mine, without BatchNorm, seed 3: completed" in words

    @pytest.mark.parametrize(("steps", "is_said"), [(999, True), (1000, False)])
    def test_a_run_too_short_to_be_validated_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, is_said: bool
    ) -> None:
        record = ended(tmp_path, steps=steps)
        record.content["config"]["trainer"] = {"val_check_interval": 1000}
        print_run_table(record.content, tmp_path)
        assert ("trainer.val_check_interval=1000" in capsys.readouterr().out) == is_said

    def test_an_evaluation_has_no_validation(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = ended(tmp_path, steps=40)
        record.content["config"]["trainer"] = {"val_check_interval": 1000}
        del record.content["seconds"], record.content["steps_per_second"]
        print_run_table(record.content, tmp_path)
        assert "validation" not in capsys.readouterr().out

    def test_a_divergence_is_said_aloud(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = ended(tmp_path, "diverged", diverged_at=1234)
        print_run_table(record.content, tmp_path)
        out = " ".join(capsys.readouterr().out.split())
        assert "mnist_bn: diverged" in out
        assert "diverged │ at step 1,234: scored as chance" in out
        assert "finite" not in out  # as it is where the loss was above max_loss

    def test_of_a_record_that_was_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Where NaN has become null."""
        ended(tmp_path, metrics={"test/loss": math.nan, "test/accuracy": 0.1})
        print_run_table(read_run(tmp_path), tmp_path)
        assert "0.1000" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["lr=0.1,init=[he]", ":x:", "a" * 200], ids=str)
    def test_the_directory_is_printed_as_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        print_run_table(ended(tmp_path).content, tmp_path / name)
        assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / name)

    def test_the_evaluations_step_by_step(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        logger = MetricsCSVLogger(tmp_path)
        for step, loss, accuracy in ((200, 0.1234, 0.95), (1400, math.nan, 0.1)):
            logger.log_metrics({"val/loss": loss, "val/accuracy": accuracy}, step)
            logger.log_metrics({"train/loss": 7.0}, step)
        logger.save()
        print_validation_table(tmp_path)
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["│", "200", "│", "0.1234", "│", "0.9500", "│"] in rows
        assert ["│", "1,400", "│", "nan", "│", "0.1000", "│"] in rows
        assert len([row for row in rows if row[0] == "│"]) == 2

    def test_a_run_without_evaluations_has_no_such_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_validation_table(tmp_path)
        assert capsys.readouterr().out == ""
