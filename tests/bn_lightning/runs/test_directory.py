"""Where a run lies: a new directory, or that of the run it resumes."""

import os
from pathlib import Path

import pytest

from bn_lightning.runs.directory import (
    BEST,
    LAST,
    hydra_directory,
    resumed_checkpoint,
    run_directory,
    trained_checkpoint,
)


def run(runs: Path, name: str, age: float = 0, last: bool = True) -> Path:
    """A run's directory whose last checkpoint is so many seconds old."""
    directory = runs / name
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "run.json").write_text("{}")
    if last:
        (directory / LAST).write_bytes(b"")
        os.utime(directory / LAST, (1e9 - age, 1e9 - age))
    return directory


class TestNew:
    def test_without_a_checkpoint(self, tmp_path: Path) -> None:
        run(tmp_path, "before")
        assert run_directory(None, str(tmp_path), "now") == str(tmp_path / "now")
        assert not (tmp_path / "now").exists()

    def test_from_a_checkpoint_that_lies_in_no_run(self, tmp_path: Path) -> None:
        lonely = tmp_path / "elsewhere/deep/a.ckpt"
        lonely.parent.mkdir(parents=True)
        lonely.write_bytes(b"")
        runs = tmp_path / "runs"
        assert run_directory(str(lonely), str(runs), "now") == str(runs / "now")


class TestResumed:
    @pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
    def test_by_path_it_goes_on_in_its_own_directory(self, tmp_path: Path, name: str) -> None:
        directory = run(tmp_path / "of_another_task", "then")
        path = directory / "checkpoints" / name
        assert run_directory(str(path), str(tmp_path / "runs"), "now") == str(directory)

    def test_by_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = run(tmp_path, "then")
        monkeypatch.chdir(directory / "checkpoints")
        assert Path(run_directory("last.ckpt", "runs", "now")) == directory
        monkeypatch.chdir(tmp_path)
        assert Path(run_directory(f"then/{LAST}", "runs", "now")) == directory

    def test_last_is_the_newest_checkpoint(self, tmp_path: Path) -> None:
        run(tmp_path, "2026-01-03", age=20)
        newest = run(tmp_path, "2026-01-01", age=10)
        run(tmp_path, "2026-01-02", age=30)
        assert run_directory("last", str(tmp_path), "now") == str(newest)

    def test_last_passes_over_runs_that_have_none(self, tmp_path: Path) -> None:
        directory = run(tmp_path, "2026-01-01", age=10)
        run(tmp_path, "2026-01-02", last=False)
        assert run_directory("last", str(tmp_path), "now") == str(directory)

    @pytest.mark.parametrize("exists", [True, False], ids=["no_checkpoint", "no_folder"])
    def test_last_of_none(self, tmp_path: Path, exists: bool) -> None:
        runs = tmp_path / "runs"
        if exists:
            run(runs, "then", last=False)
        with pytest.raises(ValueError, match="`ckpt_path=last`.*got none; leave") as error:
            run_directory("last", str(runs), "now")
        assert str(runs) in str(error.value)

    def test_best_is_the_newest_best_checkpoint(self, tmp_path: Path) -> None:
        for name, age in (("2026-01-01", 10), ("2026-01-02", 30)):
            best = run(tmp_path, name) / BEST
            best.touch()
            os.utime(best, (1e9 - age, 1e9 - age))
        directory = run_directory("best", str(tmp_path), "now")
        assert directory == str(tmp_path / "2026-01-01")
        assert resumed_checkpoint("best", Path(directory)) == Path(directory) / BEST
        assert hydra_directory("best") == hydra_directory("last")

    def test_the_path_of_a_run_is_its_last(self, tmp_path: Path) -> None:
        directory = run(tmp_path, "then")
        assert run_directory(str(directory), "runs", "now") == str(directory)
        assert resumed_checkpoint(str(directory), directory) == directory / LAST
        assert hydra_directory(str(directory)) == hydra_directory("last")


class TestTrained:
    """The checkpoint that evaluate, predict, export, landscape and inspect read."""

    def test_by_name_that_of_the_newest_run_of_any_task(self, tmp_path: Path) -> None:
        run(tmp_path / "a/runs", "2026-01-02", age=30)
        newest = run(tmp_path / "b/runs", "2026-01-01", age=10)
        assert trained_checkpoint("last", str(tmp_path)) == str(newest / LAST)
        with pytest.raises(ValueError, match="`ckpt_path=best`.*got none; use ckpt_path=last"):
            trained_checkpoint("best", str(tmp_path))
        with pytest.raises(ValueError, match="`ckpt_path=last`.*got none; give the path"):
            trained_checkpoint("last", str(tmp_path / "a"))

    @pytest.mark.parametrize("folder", ["a/multiruns/2026-01-03", "a/sweeps/sweep"])
    def test_jobs_of_multiruns_and_sweeps_are_runs(self, tmp_path: Path, folder: str) -> None:
        run(tmp_path / "a/runs", "2026-01-02", age=30)
        newest = run(tmp_path / folder, "0", age=10)
        assert trained_checkpoint("last", str(tmp_path)) == str(newest / LAST)

    def test_by_run_its_best(self, tmp_path: Path) -> None:
        directory = run(tmp_path, "then")
        assert trained_checkpoint(str(directory), "logs") == str(directory / LAST)
        (directory / BEST).touch()
        assert trained_checkpoint(str(directory), "logs") == str(directory / BEST)
        assert trained_checkpoint("a.ckpt", "logs") == "a.ckpt"


def test_a_resumed_run_keeps_the_hydra_directory_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    resumed = hydra_directory(str(tmp_path / "checkpoints" / "best.ckpt"))
    assert hydra_directory("last") == resumed != ".hydra"
    assert hydra_directory(None) == hydra_directory("in_no_run.ckpt") == ".hydra"
