"""`run.json`: its keys and statuses, written whole or not at all."""

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.record import (
    SCHEMA_VERSION,
    STATUSES,
    RunRecord,
    logged_numbers,
    read_run,
    run_outcome,
)

CONFIG = {"seed": 3, "task_name": "mnist_bn", "norm": None}


class TestRecord:
    def test_its_keys_from_the_first_moment(self, tmp_path: Path) -> None:
        RunRecord(tmp_path, CONFIG).update()
        record = read_run(tmp_path)
        assert record["schema_version"] == SCHEMA_VERSION
        assert record["status"] == "running"
        assert record["command"] == sys.argv
        assert record["config"] == CONFIG
        assert record["seed"] == 3
        assert record["resumed_at"] == []
        assert record["data"] is record["ended"] is None
        assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert record["hardware"]["cores"] == os.cpu_count()
        started = datetime.fromisoformat(record["started"])
        assert started.utcoffset() == timedelta(0)
        assert abs(datetime.now(started.tzinfo) - started) < timedelta(minutes=1)

    def test_nothing_is_written_before_update(self, tmp_path: Path) -> None:
        RunRecord(tmp_path, CONFIG)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("status", STATUSES)
    def test_it_ends_with_a_status(self, tmp_path: Path, status: str) -> None:
        RunRecord(tmp_path, CONFIG).end(status, error="wrong", metrics={"test/loss": 0.5})
        record = read_run(tmp_path)
        assert record["status"] == status
        assert record["error"] == "wrong"
        assert record["metrics"] == {"test/loss": 0.5}
        assert record["ended"] >= record["started"]
        assert 10 < record["peak_memory_mib"] < 100_000

    def test_another_status_is_refused_and_nothing_written(self, tmp_path: Path) -> None:
        record = RunRecord(tmp_path, CONFIG)
        record.update(steps=1)
        with pytest.raises(ValueError, match="`status`.*completed, diverged.*'finished'"):
            record.end("finished", steps=2)
        assert read_run(tmp_path)["steps"] == 1

    def test_updates_add_up(self, tmp_path: Path) -> None:
        record = RunRecord(tmp_path, CONFIG)
        record.update(data={"source": "digits"})
        record.update(steps=5)
        assert (read_run(tmp_path)["data"], read_run(tmp_path)["steps"]) == (
            {"source": "digits"},
            5,
        )

    def test_other_ranks_keep_it_in_memory(self, tmp_path: Path) -> None:
        record = RunRecord(tmp_path, CONFIG, write=False)
        record.end("completed", steps=5)
        assert not list(tmp_path.iterdir())
        assert record.content["status"] == "completed"


class TestRead:
    @pytest.mark.parametrize(
        "text",
        [None, "", "{", '{"status": "comp', "\x00"],
        ids=["absent", "empty", "open", "cut", "binary"],
    )
    def test_no_record(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="a run's directory with a run.json") as error:
            read_run(tmp_path)
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize(
        "content", [{}, [], 1, {"schema_version": SCHEMA_VERSION + 1}], ids=str
    )
    def test_another_schema(self, tmp_path: Path, content: Any) -> None:
        write_json(tmp_path / "run.json", content)
        with pytest.raises(ValueError, match=f"schema_version {SCHEMA_VERSION}, got"):
            read_run(tmp_path)

    @pytest.mark.parametrize("changed", [{"status": "asleep"}, {"config": None}], ids=str)
    def test_no_run(self, tmp_path: Path, changed: dict[str, Any]) -> None:
        RunRecord(tmp_path, CONFIG).update(**changed)
        with pytest.raises(ValueError, match="status and config of a run"):
            read_run(tmp_path)


def test_what_a_sweep_keeps_of_a_run() -> None:
    record = {
        "status": "completed",
        "metrics": {"val/accuracy": 0.9},
        "data": {"source": "digits", "train": 1317, "classes": 10},
        "commit": "abc",
        "steps": 50,
        "seed": 3,
    }
    kept = {
        "val/accuracy": 0.9,
        "data": "digits",
        "classes": 10,
        "commit": "abc",
        "steps": 50,
        "seed": 3,
    }
    assert run_outcome(record) == kept | {"diverged": False, "diverged_at": None}
    record |= {"status": "diverged", "diverged_at": 7, "data": None}
    kept |= {"data": None, "classes": None}
    assert run_outcome(record) == kept | {"diverged": True, "diverged_at": 7}
    record |= {"config": {"model": {"num_classes": 4}}}
    assert run_outcome(record)["classes"] == 4


def test_logged_numbers_are_plain_and_without_the_step() -> None:
    numbers = logged_numbers({"test/loss": torch.tensor(0.5), "val/loss": 1.0, "step": 7.0})
    assert numbers == {"test/loss": 0.5, "val/loss": 1.0}
    assert all(type(value) is float for value in numbers.values())
