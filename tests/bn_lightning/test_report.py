"""Runs side by side in one figure."""

import sys
from pathlib import Path
from typing import Any

import pytest

import bn_lightning.report
from bn_lightning.metrics_csv import MetricsCSVLogger
from bn_lightning.report import label_of, main, report
from bn_lightning.run_record import RunRecord

METRICS = {
    "test/accuracy": 0.9,
    "activation/p15": -1.0,
    "activation/p50": 0.0,
    "activation/p85": 1.0,
}


def run(directory: Path, norm: Any = None, leave_out: str = "") -> Path:
    directory.mkdir(parents=True)
    RunRecord(directory, {"seed": 1, "norm": norm}).update()
    logger = MetricsCSVLogger(directory)
    metrics = {k: v for k, v in METRICS.items() if k != leave_out}
    for step in (1, 2):
        logger.log_metrics(metrics, step)
    logger.save()
    return directory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was given to be drawn."""
    given: list[dict[str, Any]] = []
    draw = bn_lightning.report.comparison_figure

    def recording(runs: dict[str, Any]) -> Any:
        given.append(runs)
        return draw(runs)

    monkeypatch.setattr(bn_lightning.report, "comparison_figure", recording)
    return given


def test_both_arms_as_one_figure(
    tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run(tmp_path / "a", {"_target_": "x"}), run(tmp_path / "b")]
    output = tmp_path / "new/folder"
    report(runs, output)
    assert {path.name for path in output.iterdir()} == {"comparison.png", "comparison.svg"}
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (output / "comparison.svg").read_text()
    assert capsys.readouterr().out == f"{output / 'comparison.png'}\n"
    (runs_drawn,) = drawn
    assert list(runs_drawn) == ["with BatchNorm", "without BatchNorm"]
    assert runs_drawn["with BatchNorm"]["test/accuracy"] == [(1, 0.9), (2, 0.9)]


def test_runs_of_the_same_arm_stay_apart(tmp_path: Path, drawn: list[Any]) -> None:
    report([run(tmp_path / name) for name in "abc"], tmp_path)
    labels = list(drawn[0])
    assert len(labels) == 3
    assert all(label.startswith("without BatchNorm") for label in labels)


def test_label() -> None:
    assert label_of({"norm": None}) == "without BatchNorm"
    assert label_of({"norm": {"_target_": "bn_lightning.models.normalization.batch_norm"}}) == (
        "with BatchNorm"
    )


@pytest.mark.parametrize("name", ["test/accuracy", "activation/p50"])
def test_a_run_that_did_not_log_what_is_drawn(tmp_path: Path, name: str) -> None:
    directory = run(tmp_path / "a", leave_out=name)
    with pytest.raises(ValueError, match=f"{name}.*data.test_curve=true") as caught:
        report([directory], tmp_path / "out")
    assert str(directory) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a run's directory"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestCommand:
    def main(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        main()

    def test_writes_where_it_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = run(tmp_path / "a")
        self.main(monkeypatch, directory, "--output", tmp_path / "out")
        assert (tmp_path / "out/comparison.png").exists()
        monkeypatch.chdir(tmp_path)
        self.main(monkeypatch, directory)
        assert (tmp_path / "comparison.svg").exists()

    def test_an_error_is_one_line(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit) as end:
            self.main(monkeypatch, tmp_path)
        assert end.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {tmp_path} expected a run's directory")
        assert err.count("\n") == 1

    def test_no_runs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as end:
            self.main(monkeypatch)
        assert end.value.code != 0
        assert "RUN" in capsys.readouterr().err

    def test_a_record_without_norm_is_no_training_run(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As `bn_lightning.evaluate` writes it."""
        directory = tmp_path / "evaluated"
        directory.mkdir()
        RunRecord(directory, {"seed": 1, "task_name": "evaluate"}).update()
        with pytest.raises(SystemExit):
            self.main(monkeypatch, directory)
        assert str(directory) in capsys.readouterr().err

    def test_the_traceback_on_demand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the line of an unforeseen error promises, here as in the other commands."""
        directory = run(tmp_path / "a")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        with pytest.raises(NotADirectoryError):
            self.main(monkeypatch, directory, "--output", tmp_path / "file/below")
