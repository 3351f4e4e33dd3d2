"""`run.json`: its keys and statuses, written whole or not at all."""

import json
import math
import os
import stat
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_lightning.metrics_logger import MetricsCSVLogger
from bn_lightning.run_record import (
    SCHEMA_VERSION,
    STATUSES,
    RunRecord,
    git_commit,
    hardware,
    logged_numbers,
    package_versions,
    peak_memory_mib,
    read_run,
    run_outcome,
    write_atomically,
    write_json,
)
from bn_lightning.summary import print_steps, print_summary

CONFIG = {"seed": 3, "task_name": "mnist_bn", "norm": None}
DATA = {"source": "digits", "train": 1317, "validation": 120, "test": 360}


def ended(folder: Path, status: str = "completed", **content: Any) -> RunRecord:
    record = RunRecord(folder, CONFIG)
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
        ended(tmp_path, status, error="what went wrong")
        record = read_run(tmp_path)
        assert record["status"] == status
        assert record["error"] == "what went wrong"
        assert record["metrics"]["test/accuracy"] == 0.98126
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
        record.update(data=DATA)
        record.update(steps=5)
        assert (read_run(tmp_path)["data"], read_run(tmp_path)["steps"]) == (DATA, 5)

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
        with pytest.raises(ValueError, match="expected a run's directory with a run.json") as error:
            read_run(tmp_path)
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize(
        "content", [{}, [], 1, {"schema_version": SCHEMA_VERSION + 1}], ids=str
    )
    def test_another_schema(self, tmp_path: Path, content: Any) -> None:
        write_json(tmp_path / "run.json", content)
        with pytest.raises(ValueError, match=f"expected schema_version {SCHEMA_VERSION}, got"):
            read_run(tmp_path)

    @pytest.mark.parametrize("changed", [{"status": "asleep"}, {"config": None}], ids=str)
    def test_no_run(self, tmp_path: Path, changed: dict[str, Any]) -> None:
        RunRecord(tmp_path, CONFIG).update(**changed)
        with pytest.raises(ValueError, match="expected the status and config of a run"):
            read_run(tmp_path)


class TestJson:
    def test_numbers_that_json_lacks_become_null(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_json(path, {"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)], "c": {"d": math.nan}})

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        content = json.loads(path.read_text(), parse_constant=refuse)
        assert content == {"a": None, "b": [None, 1.5, [None]], "c": {"d": None}}

    def test_what_json_does_not_know_becomes_its_text(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"path": Path("runs/1")})
        assert json.loads((tmp_path / "a.json").read_text()) == {"path": "runs/1"}

    def test_letters_of_any_alphabet(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", "größer ≥ 1")
        assert json.loads((tmp_path / "a.json").read_bytes()) == "größer ≥ 1"


def test_what_a_sweep_keeps_of_a_run() -> None:
    record = {
        "status": "completed",
        "metrics": {"val/accuracy": 0.9},
        "data": {"source": "digits", "train": 1317, "classes": 10},
        "commit": "abc",
        "steps": 50,
    }
    kept = {"val/accuracy": 0.9, "data": "digits", "classes": 10, "commit": "abc", "steps": 50}
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


class TestAtomically:
    @pytest.mark.parametrize("step", ["os.fsync", "os.chmod", "os.replace"])
    def test_a_write_that_fails_leaves_the_old_file_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "run.json"
        write_atomically(path, "old")

        def fail(*_: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(step, fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert [child.name for child in tmp_path.iterdir()] == ["run.json"]

    def test_text_that_cannot_be_encoded(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a", "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(tmp_path / "a", "new \ud800")
        assert (tmp_path / "a").read_text() == "old"
        assert [child.name for child in tmp_path.iterdir()] == ["a"]

    def test_a_reader_never_sees_half(self, tmp_path: Path) -> None:
        """Whoever has the old file open goes on reading the old one."""
        path = tmp_path / "a"
        write_atomically(path, "old " * 1000)
        with open(path) as reader:
            start = reader.read(10)
            write_atomically(path, "new")
            assert start + reader.read() == "old " * 1000
        assert path.read_text() == "new"

    @pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
    def test_it_is_as_readable_as_any_new_file(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "ours", "text")
            (tmp_path / "pythons").write_text("text")
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "pythons")]
        assert modes[0] == modes[1]

    def test_line_ends_are_kept(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a", "one\ntwo\r\n")
        assert (tmp_path / "a").read_bytes() == b"one\ntwo\r\n"


class TestSurroundings:
    def test_versions(self) -> None:
        versions = package_versions()
        assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
        assert versions["lightning"].startswith("2.")
        assert "bn-lightning" in versions

    def test_hardware(self) -> None:
        found = hardware()
        assert found["processor"]
        assert found["torch_threads"] == torch.get_num_threads()
        assert len(found["accelerators"]) == torch.cuda.device_count()

    def test_peak_memory_is_in_mebibytes(self) -> None:
        """Of an interpreter that holds 300 MiB and one that holds none, not of who started it."""
        peaks = []
        for size in (0, 300):
            script = (
                "from bn_lightning.run_record import peak_memory_mib\n"
                f"held = b'x' * ({size} * 2**20)\n"
                "print(peak_memory_mib())"
            )
            done = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks.append(float(done.stdout))
        assert peaks[1] - peaks[0] == pytest.approx(300, abs=20)
        assert peak_memory_mib() > 0

    def test_no_commit_outside_a_checkout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*_: Any, **__: Any) -> None:
            raise FileNotFoundError("git")

        monkeypatch.setattr("subprocess.run", absent)
        assert git_commit() is None


class TestSummary:
    def test_the_result_and_where_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_summary(ended(tmp_path).content, tmp_path)
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

    def test_a_divergence_is_said_aloud(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = ended(tmp_path, "diverged", diverged_at=1234)
        print_summary(record.content, tmp_path)
        out = " ".join(capsys.readouterr().out.split())
        assert "mnist_bn: diverged" in out
        assert "diverged │ at step 1,234: scored as chance" in out
        assert "finite" not in out  # as it is where the loss was above max_loss

    def test_of_a_record_that_was_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Where NaN has become null."""
        ended(tmp_path, metrics={"test/loss": math.nan, "test/accuracy": 0.1})
        print_summary(read_run(tmp_path), tmp_path)
        assert "0.1000" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["lr=0.1,init=[he]", ":x:", "a" * 200], ids=str)
    def test_the_directory_is_printed_as_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        print_summary(ended(tmp_path).content, tmp_path / name)
        assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / name)

    def test_the_evaluations_step_by_step(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        logger = MetricsCSVLogger(tmp_path)
        for step, loss, accuracy in ((200, 0.1234, 0.95), (1400, math.nan, 0.1)):
            logger.log_metrics({"val/loss": loss, "val/accuracy": accuracy}, step)
            logger.log_metrics({"train/loss": 7.0}, step)
        logger.save()
        print_steps(tmp_path)
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["│", "200", "│", "0.1234", "│", "0.9500", "│"] in rows
        assert ["│", "1,400", "│", "nan", "│", "0.1000", "│"] in rows
        assert len([row for row in rows if row[0] == "│"]) == 2

    def test_a_run_without_evaluations_has_no_such_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_steps(tmp_path)
        assert capsys.readouterr().out == ""
