"""Reports of sweeps from their journals and tables, of runs, and of other places."""

import contextlib
import json
import math
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.report import main
from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.record import RunRecord, read_run
from bn_lightning.sweeps.analysis.columns import Columns
from bn_lightning.sweeps.analysis.seed_groups import SeedGroup
from bn_lightning.sweeps.analysis.sources import read_sweep
from bn_lightning.sweeps.report.figure import Heatmap
from bn_lightning.sweeps.report.run_figures import figures_of_groups, run_styles
from bn_lightning.sweeps.report.write_report import ReportOptions, sweep_figures, write_report

pytestmark = pytest.mark.usefixtures("empty_pictures")

METRICS = {
    "test/accuracy": 0.9,
    "test/loss": 0.3,
    "activation/p15": -1.0,
    "activation/p50": 0.0,
    "activation/p85": 1.0,
}
PAGE_FILES = {"report.html", "summary.json", "trials.csv"}
GRID_FIGURES = {
    f"{name}.{suffix}"
    for name in ("accuracy", "outcomes", "rates", "widths", "importances")
    for suffix in ("png", "svg")
}
BATCH = {"_target_": "bn_lightning.models.normalization.batch_norm"}
HOSTILE = "</script><script>window.hacked=1</script>"

ANOTHER_SWEEP = """
hydra:
  sweeper: {sampler: {_target_: optuna.samplers.GridSampler}}
"""


def run(
    directory: Path,
    norm: Any = None,
    leave_out: str = "",
    source: str = "digits",
    steps: int = 2,
    **config: Any,
) -> Path:
    """Write a run; its accuracy is .9, and a hundredth more for each seed above 1."""
    directory.mkdir(parents=True)
    config = {"seed": 1, "norm": norm, "trainer": {"max_steps": steps}} | config
    metrics = METRICS | {"test/accuracy": 0.9 + (config["seed"] - 1) / 100}
    metrics = {name: value for name, value in metrics.items() if name != leave_out}
    measured = {"steps": steps, "steps_per_second": 100.0, "seconds": 2.0, "metrics": metrics}
    RunRecord(directory, config).end("completed", data={"source": source}, **measured)
    logger = MetricsCSVLogger(directory)
    for step in (1, 2):
        logger.log_metrics(metrics, step)
    logger.save()
    return directory


def measured_mae(directory: Path, mae: float = 0.25) -> Path:
    """Replaces the metrics of a run by those of a regression, as one's own module logs them."""
    record = read_run(directory)
    record["config"]["callbacks"] = {"checkpoints": {"monitor": "val/mae", "mode": "min"}}
    record["metrics"] = {"val/mae": mae / 2, "test/mae": mae, "test/bias": 0.125}
    write_json(directory / "run.json", record)
    return directory


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


draws = pytest.mark.usefixtures("pictures")


class TestSweep:
    @draws
    def test_all_files(
        self, tmp_path: Path, make_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep = make_study(tmp_path / "sweep")
        journal = (sweep / "journal.log").read_bytes()
        page = write_report([str(sweep)])
        assert page == sweep / "report.html"
        assert {path.name for path in sweep.iterdir()} == PAGE_FILES | {"journal.log", "figures"}
        assert {path.name for path in (sweep / "figures").iterdir()} == GRID_FIGURES
        assert (sweep / "journal.log").read_bytes() == journal
        content = summary(sweep)
        assert (content["schema_version"], content["kind"]) == (1, "grid")
        assert content["counts"]["complete"] == 48
        share = content["arms"]["batch"]["measures"]["share_trained"]
        assert share == {"value": 0.75, "low": 0.75, "high": 0.75, "seeds": 3, "at_least": False}
        assert content["comparisons"][0]["ratio"]["value"] == 6
        out = capsys.readouterr().out
        assert out.startswith("75% [75, 75] of the cells train with BatchNorm, ")
        assert out.endswith(
            f"A cell trains from an accuracy of 0.90 on; --threshold asks for another.\n{page}\n"
        )
        assert content["sentences"][0] in page.read_text()

    @pytest.mark.slow
    @draws
    def test_a_second_time_the_same_bytes_and_from_the_table_alone(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        sweep = make_study(tmp_path / "sweep")
        run(sweep / "3", steps=2000)
        write_report([str(sweep)])
        first = files(sweep)
        write_report([str(sweep)])
        assert files(sweep) == first
        table = tmp_path / "table"
        table.mkdir()
        for name in ("trials.csv", "summary.json"):
            (table / name).write_bytes(first[name])
        write_report([str(table)])
        again = files(table)
        assert again.pop("report.html") != first["report.html"]  # which links to directories
        assert again == {name: first[name] for name in again} and len(again) == 12

    def test_links_lead_to_directories_that_are_there(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        sweep = make_study(tmp_path / "sweep")
        (sweep / "5").mkdir()
        page = write_report(
            [str(sweep)], ReportOptions(output=tmp_path / "elsewhere/folder")
        ).read_text()
        grid = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["grid"]
        assert grid["base"] == "../../sweep/"
        assert {trial[0]: trial[7] for trial in grid["trials"] if trial[7]} == {5: 1}

    @pytest.mark.slow
    def test_a_url(
        self, tmp_path: Path, make_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_study(tmp_path / "sweep")
        url = f"sqlite:///{tmp_path}/studies.db"
        journal = optuna.storages.journal.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep/journal.log"))
        )
        for name in ("a", "b"):
            optuna.copy_study(
                from_study_name="sweep", from_storage=journal, to_storage=url, to_study_name=name
            )
        with pytest.raises(ValueError, match="got a, b"):
            write_report([url], ReportOptions(output=tmp_path))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "multirun.yaml").write_text(ANOTHER_SWEEP)
        write_report([url], ReportOptions(output=tmp_path, study="b"))
        assert summary(tmp_path)["study"]["name"] == "b"
        assert "sampler" not in summary(tmp_path)["study"]["about"]
        assert summary(tmp_path)["arms"]["batch"]["trials"] == 24

    def test_a_truncated_journal(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path)
        journal = (sweep / "journal.log").read_bytes()
        (sweep / "journal.log").write_bytes(journal[: len(journal) * 3 // 4])
        page = write_report([str(sweep)]).read_text()
        assert "The journal is cut off or damaged" in page
        assert 30 < summary(sweep)["counts"]["complete"] < 40
        assert "cut off" in summary(sweep)["notes"][0]

    def test_a_sweep_that_goes_on(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        waiting = {"state": TrialState.WAITING}
        sweep = make_study(tmp_path, change=lambda n, p: waiting if p["seed"] == 3 else {})
        write_report([str(sweep)])
        assert "not over: 16 trials run or wait" in summary(sweep)["notes"][0]
        assert summary(sweep)["grid"]["seeds"] == [1, 2]

    def test_the_seed_is_that_of_the_runs_if_the_study_does_not_vary_it(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        space = {"optimizer.lr": [0.1, 1.0], "norm": ["none", "batch"]}
        sweep = make_study(tmp_path / "sweep", space=space)
        for number in range(4):
            run(sweep / str(number))
        write_report([str(sweep)])
        assert summary(sweep)["grid"]["seeds"] == [1]
        (tmp_path / "table").mkdir()
        for name in ("trials.csv", "summary.json"):
            (tmp_path / "table" / name).write_bytes((sweep / name).read_bytes())
        write_report([str(tmp_path / "table")])
        assert summary(tmp_path / "table")["grid"]["seeds"] == [1]

    def test_shares_of_a_pruned_sweep_are_called_what_they_are(
        self, tmp_path: Path, make_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        pruned = {"state": TrialState.PRUNED}
        sweep = make_study(tmp_path, change=lambda n, p: pruned if p["seed"] == 3 else {})
        write_report([str(sweep)])
        words = "16 trials were pruned, the worst at their time: shares and widths are those of"
        assert words in capsys.readouterr().out
        assert words in summary(sweep)["notes"][0]

    def test_failed_trials_are_shown(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        failed = {"state": TrialState.FAIL, "user_attrs": {"error": f"disk full {HOSTILE}"}}
        sweep = make_study(tmp_path, change=lambda n, p: [failed, {}] if n == 0 else {})
        page = write_report([str(sweep)]).read_text()
        assert "disk full &lt;/script&gt;" in page
        assert HOSTILE not in page
        assert summary(sweep)["counts"]["retried"] == 1

    @pytest.mark.slow
    def test_rates_alone_of_two_classes_at_another_threshold(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        """Without BatchNorm all at .55; with it .8 at two of three rates, .5 at the third."""

        def change(number: int, params: dict[str, Any]) -> dict[str, Any]:
            learnt = 0.8 if params["optimizer.lr"] < 1 else 0.5
            accuracy = learnt if params["norm"] == "batch" else 0.55
            found = {"test/accuracy": accuracy, "test/loss": 0.6, "directory": str(sweep / "0")}
            return {"user_attrs": found}

        sweep = tmp_path / "sweep"
        record = RunRecord(sweep / "0", {"seed": 1, "trainer": {"max_steps": 20}})
        record.path.parent.mkdir(parents=True)
        record.end("completed", data={"source": "placement", "classes": 2}, steps=20)
        space = {"optimizer.lr": [0.01, 0.1, 1.0], "norm": ["none", "batch"], "seed": [1, 2]}
        make_study(sweep, space=space, change=change)
        write_report([str(sweep)])
        assert any(
            "No cell trains: the best accuracy is 0.800" in n for n in summary(sweep)["notes"]
        )
        page = write_report([str(sweep)], ReportOptions(threshold=0.75)).read_text()
        assert "0.75 or more. It fails if its accuracy is below 0.60" in page
        assert "accuracy ≥ 0.75" in page and "decades of learning rate that reach 0.75" in page
        content = summary(sweep)
        assert content["sentences"][:3] == [
            "67% [67, 67] of the cells train with BatchNorm, 0% [0, 0] without BatchNorm: a "
            "difference of 67 points [67, 67].",
            "33% [33, 33] of the cells fail with BatchNorm, 100% [100, 100] without BatchNorm: at "
            "the end of the budget their accuracy is below 0.60, hardly better than a guess.",
            "The learning rates that train cover ≥ 2.00 decades [2.00, 2.00] with BatchNorm, "
            "0.00 decades [0.00, 0.00] without BatchNorm: a difference of ≥ 2.00 decades "
            "[2.00, 2.00].",
        ]
        table = tmp_path / "table"
        table.mkdir()
        for name in ("trials.csv", "summary.json"):
            (table / name).write_bytes((sweep / name).read_bytes())
        write_report([str(table)])
        assert summary(table) == content

    @pytest.mark.slow
    @pytest.mark.parametrize("classes", [None, 2])
    def test_chance_where_the_runs_lie_elsewhere(
        self, tmp_path: Path, make_study: Callable[..., Path], classes: int | None
    ) -> None:
        """All cells at .55: of two classes that is chance; of an unknown number it may not be."""
        found = {"test/accuracy": 0.55, "test/loss": 0.6, "directory": "/elsewhere/sweep/0"}
        found |= {} if classes is None else {"classes": classes}
        sweep = make_study(tmp_path, change=lambda number, params: {"user_attrs": found})
        page = write_report([str(sweep)]).read_text()
        measures = summary(sweep)["arms"]["batch"]["measures"]
        note = "The number of classes is unknown"
        assert classes is None or measures["share_at_chance"]["value"] == 1
        for text in (page, *summary(sweep)["sentences"]):
            assert classes or not any(words in text for words in ("fails", "fail ", "a guess"))
        assert (note in page) == any(note in n for n in summary(sweep)["notes"]) == (not classes)

    @draws
    def test_a_minimized_metric_is_reported_the_right_way_up(
        self, tmp_path: Path, make_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With BatchNorm the error is .1 to .3, without it .6 to .8, least at the smallest rate."""
        space = {"optimizer.lr": [0.01, 0.1, 1.0], "norm": ["none", "batch"], "seed": [1, 2]}

        def change(number: int, params: dict[str, Any]) -> dict[str, Any]:
            mae = 0.5 * (params["norm"] == "none") + 0.3 + math.log10(params["optimizer.lr"]) / 10
            return {"value": mae, "user_attrs": {"val/mae": mae, "test/mae": mae + 1}}

        sweep = make_study(tmp_path, space=space, change=change, direction="minimize")
        write_report([str(sweep)])
        out, content = capsys.readouterr().out, summary(sweep)
        page = write_report([str(sweep)], ReportOptions(threshold=0.25)).read_text()
        for words in ("with BatchNorm: 0.1 ", "without BatchNorm: 0.6 ", "at optimizer.lr=0.01"):
            assert words in out
        for words in ("accuracy of", "cells", "fail", "0.90"):
            assert words not in out
        best = content["arms"][0]
        assert (best["label"], best["best"]["n"]) == ("with BatchNorm", 2)
        assert best["tests"]["test/mae"]["mean"] == pytest.approx(1.1)
        assert content["importances"]["shares"]["norm"] > 0.5
        assert (sweep / "figures/map.png").exists() and "lower is better" in page
        assert "at most 0.25: 4 of 6 with BatchNorm, 0 of 6 without BatchNorm" in page
        figure = sweep_figures(read_sweep(str(sweep), None)[1])["map"]
        (heatmap,) = figure.panels[0].series
        assert isinstance(heatmap, Heatmap)
        assert (heatmap.scale.label, heatmap.scale.colormap) == ("val mae", "viridis_r")
        assert [panel.title for panel in figure.panels] == ["with BatchNorm", "without BatchNorm"]

    def test_no_finished_trial(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path, change=lambda n, p: {"state": TrialState.WAITING})
        page = write_report([str(sweep)]).read_text()
        assert "No trial has finished: of 48 trials none" in page
        assert summary(sweep)["counts"]["waiting"] == 48
        assert not (sweep / "figures").exists()

    @pytest.mark.slow
    @draws
    def test_names_that_look_like_mathematics(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        name = "$x_{$"

        def change(number: int, params: dict[str, Any]) -> dict[str, Any]:
            return {"user_attrs": {"test/accuracy": 0.5, "data": name}}

        write_report([str(make_study(tmp_path / "sweep", change=change))])
        assert summary(tmp_path / "sweep")["study"]["about"]["runs"]["data"] == {name: 48}
        runs = [run(tmp_path / "a"), run(tmp_path / "b", {"_target_": name})]
        write_report([*map(str, runs)], ReportOptions(tmp_path))
        assert name in [found["label"] for found in summary(tmp_path)["arms"]]

    def test_unequal_seeds(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path, skip=lambda p: p["norm"] == "none" and p["seed"] == 3)
        page = write_report([str(sweep)]).read_text()
        assert summary(sweep)["comparisons"][0]["is_paired"] is False
        assert "do not have the same seeds" in page and "(unpaired)" in page

    @draws
    def test_other_parameters(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        space = {"model.width": [8, 16], HOSTILE: ["<b>", "relu"]}
        sweep = make_study(tmp_path, space=space, name=HOSTILE)
        assert sweep_figures(read_sweep(str(sweep), None)[1]).keys() == {"history", "parameters"}
        page = write_report([str(sweep)]).read_text()
        assert "it varies no learning rate" in page and "parameter-1" in page
        assert HOSTILE not in page
        assert summary(sweep)["kind"] == "study"
        assert summary(sweep)["metrics"] == ["val/accuracy"]
        drawn = {path.stem for path in (sweep / "figures").iterdir()}
        assert drawn == {"history", "parameters"}  # all values are equal

    def test_points_of_no_grid(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        rates = [0.01 * 1.1**i for i in range(12)]
        space = {"optimizer.lr": rates, "init.std": rates}
        sweep = make_study(
            tmp_path,
            space=space,
            skip=lambda p: p["optimizer.lr"] != p["init.std"],
        )
        write_report([str(sweep)])
        assert "fill 8.3% of a grid" in summary(sweep)["reason"]

    def test_arms_without_a_point_in_common(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        """Each rate was tried with one arm, as TPE and random samplers do."""
        space = {"optimizer.lr": [0.01, 0.02, 0.05, 0.1], "norm": ["none", "batch"]}
        arms = {0.01: "none", 0.02: "batch", 0.05: "none", 0.1: "batch"}
        sweep = make_study(
            tmp_path, space=space, skip=lambda p: arms[p["optimizer.lr"]] != p["norm"]
        )
        write_report([str(sweep)])
        assert "arms have no learning rate and initialization in common" in summary(sweep)["reason"]

    def test_an_adaptive_samplers_points_are_no_grid(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        sweep = make_study(tmp_path)
        write_report([str(sweep)])
        content = summary(sweep)
        content["study"]["about"]["sampler"] = "optuna.samplers.TPESampler"
        (sweep / "summary.json").write_text(json.dumps(content))
        (sweep / "journal.log").unlink()
        write_report([str(sweep)])
        assert "its sampler chose the points by their results" in summary(sweep)["reason"]

    def test_columns_that_names_do_not_tell(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        sweep = make_study(tmp_path, space={"step": [0.1, 1.0], "scale": [0.1, 1.0]})
        write_report([str(sweep)], ReportOptions(columns=Columns("step", "scale")))
        assert summary(sweep)["kind"] == "grid"
        assert summary(sweep)["roles"]["lr"] == "step"
        with pytest.raises(ValueError, match="`--lr` to be one of the study's parameters"):
            write_report([str(sweep)], ReportOptions(columns=Columns("width")))

    def test_different_budgets(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path)
        run(sweep / "0", steps=20)
        run(sweep / "1", steps=2000)
        with pytest.raises(ValueError, match="budgets in steps: 20, 2000; .*--allow-mixed"):
            write_report([str(sweep)])
        assert not (sweep / "report.html").exists()
        page = write_report([str(sweep)], ReportOptions(allow_mixed=True)).read_text()
        assert "stand side by side (budgets in steps: 20, 2000)" in page


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the metrics of the runs of each report."""
    given: list[dict[str, Any]] = []

    def recording(groups: list[SeedGroup], with_paper: bool) -> Any:
        given.append({run.label: run.metrics for group in groups for run in group.runs})
        return figures_of_groups(groups, with_paper)

    monkeypatch.setattr(f"{write_report.__module__}.figures_of_groups", recording)
    return given


def linked(folder: Path, names: set[str]) -> Path:
    """Make each name in `folder` a link to the file that is returned."""
    victim = folder.parent / "victim"
    victim.write_text("mine")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    return victim


class TestLinks:
    """Links in someone else's directory do not decide which files are overwritten."""

    @draws
    def test_files_of_a_sweep(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path / "sweep")
        (sweep / "figures").mkdir()
        names = {*PAGE_FILES, *(f"figures/{name}" for name in GRID_FIGURES)}
        victim = linked(sweep, names)
        write_report([str(sweep)])
        assert victim.read_text() == "mine"
        assert not any((sweep / name).is_symlink() for name in names)

    @draws
    def test_files_of_runs(self, tmp_path: Path) -> None:
        run(tmp_path / "runs/a"), run(tmp_path / "runs/b", BATCH)
        (tmp_path / "runs/figures").mkdir()
        names = {*PAGE_FILES, "comparison.png", "comparison.svg", "figures/accuracy.svg"}
        victim = linked(tmp_path / "runs", names)
        write_report([str(tmp_path / "runs")])
        assert victim.read_text() == "mine"

    def test_the_folder_of_figures(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweep = make_study(tmp_path / "sweep")
        (tmp_path / "mine").mkdir()
        (sweep / "figures").symlink_to(tmp_path / "mine")
        with pytest.raises(ValueError, match="figures` to be a folder, got a link"):
            write_report([str(sweep)])
        with pytest.raises(ValueError, match="got a link to"):
            write_report([str(run(tmp_path / "run"))], ReportOptions(sweep))
        assert not list((tmp_path / "mine").iterdir())

    def test_an_output_may_be_a_link(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder")
        write_report([str(make_study(tmp_path / "sweep"))], ReportOptions(tmp_path / "link"))
        assert (tmp_path / "folder/report.html").is_file()


class TestRuns:
    @draws
    def test_both_arms(
        self, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = [run(tmp_path / "a", BATCH), run(tmp_path / "b")]
        output = tmp_path / "new/folder"
        page = write_report([*map(str, runs)], ReportOptions(output)).read_text()
        assert {path.name for path in output.iterdir()} == PAGE_FILES | {
            "comparison.png",
            "comparison.svg",
            "figures",
        }
        assert {path.stem for path in (output / "figures").iterdir()} == {
            "accuracy",
            "percentiles",
            "loss",
            "throughput",
        }
        assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (output / "comparison.svg").read_text()
        printed = capsys.readouterr().out.splitlines()
        assert printed[-2:] == [str(output / "comparison.png"), str(output / "report.html")]
        (runs_drawn,) = drawn
        assert list(runs_drawn) == ["with BatchNorm, seed 1", "without BatchNorm, seed 1"]
        assert runs_drawn["with BatchNorm, seed 1"]["test/accuracy"] == [(1, 0.9), (2, 0.9)]
        assert "percentiles-1" in page and "the paper" not in page
        assert [found["label"] for found in summary(output)["runs"]] == list(runs_drawn)

    def test_another_normalisation_has_its_own_name(
        self, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        norms = (BATCH, None, {"_target_": "torch.nn.GroupNorm"})
        runs = [run(tmp_path / str(i), norm) for i, norm in enumerate(norms)]
        for directory, seconds in zip(runs, (30.0, 20.0, 25.0), strict=True):
            write_json(directory / "run.json", read_run(directory) | {"seconds": seconds})
        page = write_report([*map(str, runs)], ReportOptions(tmp_path / "out")).read_text()
        arms = ["with BatchNorm", "without BatchNorm", "torch.nn.GroupNorm"]
        assert list(drawn[0]) == [f"{arm}, seed 1" for arm in arms]
        assert "torch.nn.GroupNorm / without BatchNorm: 1.25" in capsys.readouterr().out
        assert "Inputs of the last activation, torch.nn.GroupNorm, seed 1" in page
        found = summary(tmp_path / "out")
        assert [of_run["arm"] for of_run in found["runs"]] == [
            "batch",
            "none",
            "torch.nn.GroupNorm",
        ]
        styles = run_styles(*[{of_run["label"]: of_run["arm"] for of_run in found["runs"]}] * 2)
        assert len({style.color for style in styles.values()}) == 3

    def test_how_long_each_arm_trained(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = [run(tmp_path / "a", BATCH), run(tmp_path / "b")]
        for directory, seconds in zip(runs, (37.5, 28.55), strict=True):
            write_json(directory / "run.json", read_run(directory) | {"seconds": seconds})
        page = write_report([*map(str, runs)], ReportOptions(tmp_path / "out")).read_text()
        line = capsys.readouterr().out.splitlines()[-3]
        assert "without BatchNorm 28.55 s; with BatchNorm / without BatchNorm: 1.31" in line
        assert line in page
        assert summary(tmp_path / "out")["seconds"] == {"batch": 37.5, "none": 28.55}

    @pytest.mark.slow
    def test_a_folder_of_runs_also_the_second_time(self, tmp_path: Path, drawn: list[Any]) -> None:
        for name in ("0", "1", "10", "2"):
            run(tmp_path / "job" / name)
        for _ in range(2):
            page = write_report([str(tmp_path / "job")])
            assert page == tmp_path / "job/report.html"
        first, second = drawn
        assert len(first) == 4 and first == second
        assert all(label.startswith("without BatchNorm") for label in first)
        with pytest.raises(ValueError, match="one of runs; name the runs"):
            folder = tmp_path / "table"
            folder.mkdir()
            for name in ("trials.csv", "summary.json"):
                (folder / name).write_bytes((tmp_path / "job" / name).read_bytes())
            write_report([str(folder)])

    def test_different_data(self, tmp_path: Path) -> None:
        runs = [str(run(tmp_path / "a")), str(run(tmp_path / "b", source="mnist"))]
        with pytest.raises(ValueError, match="data: digits in .*/a; mnist in .*/b; .*--allow"):
            write_report(runs, ReportOptions(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        page = write_report(runs, ReportOptions(tmp_path / "out", allow_mixed=True)).read_text()
        assert "stand side by side (data: digits, mnist)" in page

    def test_different_budgets_are_named_with_their_runs(self, tmp_path: Path) -> None:
        steps = (2000, 300, 300, 300)
        runs = [str(run(tmp_path / str(i), steps=count)) for i, count in enumerate(steps)]
        words = f"budgets in steps: 300 in {runs[1]}, {runs[2]} and 1 more; 2000 in {runs[0]}; rep"
        with pytest.raises(ValueError) as caught:
            write_report(runs, ReportOptions(tmp_path / "out"))
        assert words in str(caught.value)
        page = write_report(runs, ReportOptions(tmp_path / "out", allow_mixed=True)).read_text()
        assert all(f'<a href="../{name}/">../{name}</a>' in page for name in range(4))

    @pytest.mark.parametrize(
        ("name", "figures"),
        [("test/accuracy", {"loss", "percentiles"}), ("activation/p50", {"accuracy", "loss"})],
    )
    def test_what_a_run_did_not_log_is_not_drawn(
        self, tmp_path: Path, name: str, figures: set[str]
    ) -> None:
        directory = run(tmp_path / "a", leave_out=name)
        write_report([str(directory)], ReportOptions(tmp_path / "out"))
        drawn = {path.stem for path in (tmp_path / "out/figures").iterdir()}
        assert drawn == figures | {"throughput"}

    def test_runs_that_differ_in_seed_alone_are_one_arm(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Accuracies .90, .91, .92 of three seeds: mean .91, standard deviation .01."""
        folder = tmp_path / "job"
        for seed in (1, 2, 3):
            run(folder / str(seed), BATCH, seed=seed, data={"seed": seed}, task_name="mine")
        run(folder / "4", None, task_name="mine")
        page = write_report([str(folder)]).read_text()
        batch, none = summary(folder)["arms"]
        assert (batch["label"], batch["seeds"]) == ("with BatchNorm", [1, 2, 3])
        assert (none["label"], none["seeds"]) == ("without BatchNorm", [1])
        found = batch["accuracy"]["end"]
        assert (found["mean"], found["n"]) == (pytest.approx(0.91), 3)
        assert found["deviation"] == pytest.approx(0.01)
        assert none["accuracy"]["end"] == {"mean": 0.9, "deviation": None, "n": 1}
        out = capsys.readouterr().out
        rows = [[c.strip() for c in line.split("|")] for line in out.splitlines() if "|" in line]
        assert rows[0][3:5] == ["test accuracy after 1 step", "test accuracy after 2 steps"]
        assert rows[2][1:5] == ["with BatchNorm", "1, 2, 3", "0.910 ± 0.010", "0.910 ± 0.010"]
        assert "Runs of mine" in page and "<td>0.910 ± 0.010</td>" in page
        assert "with BatchNorm, 3 seeds" in page and "without BatchNorm, seed 1" in page

    def test_a_run_without_a_result_is_left_out_of_means(self, tmp_path: Path) -> None:
        folder = tmp_path / "job"
        for seed in (1, 2, 3):
            run(folder / str(seed), seed=seed)
        record = read_run(folder / "3") | {"status": "failed"}
        write_json(folder / "3/run.json", record)
        write_report([str(folder)])
        (arm,) = summary(folder)["arms"]
        assert arm["accuracy"]["end"] == {
            "mean": pytest.approx(0.905),
            "deviation": pytest.approx(0.01 / 2**0.5),
            "n": 2,
        }
        assert summary(folder)["notes"] == [
            "Left out of means, because they have no result: without BatchNorm, seed 3."
        ]

    def test_a_run_that_diverged_counts_as_a_guess_from_then_on(self, tmp_path: Path) -> None:
        folder = tmp_path / "job"
        run(folder / "1"), run(folder / "2", seed=2, steps=1)
        record = read_run(folder / "2")
        record["config"]["trainer"] = {"max_steps": 2}
        record |= {"status": "diverged", "steps": 0, "metrics": {"test/accuracy": 0.1}}
        write_json(folder / "2/run.json", record)
        (folder / "2/metrics.csv").unlink()
        write_report([str(folder)])
        (arm,) = summary(folder)["arms"]
        means = [arm["accuracy"][name]["mean"] for name in ("1", "end")]
        assert means == [pytest.approx(0.5), pytest.approx(0.5)]

    def test_runs_without_an_accuracy_are_compared_by_what_they_monitored(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for seed in (1, 2):
            measured_mae(run(tmp_path / f"job/{seed}", BATCH, seed=seed), 0.25 * seed)
        page = write_report([str(tmp_path / "job")]).read_text()
        out = capsys.readouterr().out
        cells = [[c.strip() for c in line.split("|")] for line in out.splitlines() if "|" in line]
        assert "test mae after 2 steps" in cells[0] and "test bias" in cells[0]
        assert "0.375 ± 0.177" in cells[2] and "0.125 ± 0.000" in cells[2]
        assert "<td>0.5000</td>" in page and "ccuracy of the test" not in page

    def test_where_it_writes_is_never_guessed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One folder is written to; of several runs, or of a URL, the folder must be named."""
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        runs = [str(run(tmp_path / name)) for name in "ab"]
        for sources in (runs, ["sqlite:///study.db"]):
            with pytest.raises(ValueError, match="expected `--output`.*add --output DIR"):
                write_report(sources)
        assert write_report(runs[:1]) == tmp_path / "a/report.html"
        assert not list((tmp_path / "here").iterdir())


class TestNeither:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda path: path.mkdir(), "an empty directory"),
            (lambda path: None, "no such directory"),
            (lambda path: (path / "folder").mkdir(parents=True), "none of them"),
        ],
        ids=["empty", "absent", "another"],
    )
    def test_a_directory_that_is_none(
        self, tmp_path: Path, make: Callable[[Path], Any], words: str
    ) -> None:
        make(tmp_path / "dir")
        with pytest.raises(ValueError, match=f"expected a sweep's directory.*{words}"):
            write_report([str(tmp_path / "dir")], ReportOptions(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_what_was_meant_lies_below(
        self, tmp_path: Path, make_study: Callable[..., Path]
    ) -> None:
        logs = tmp_path / "logs"
        sweep = make_study(logs / "mnist_bn/sweeps/quick")
        for folder in ("mnist_bn/runs/a", "mnist_bn/runs/b", "mnist_bn/sweeps/quick/0"):
            run(logs / folder)
        with contextlib.closing(sqlite3.connect(logs / "mlflow.db")) as database:
            database.execute("CREATE TABLE experiments (name TEXT)")
        words = f"none of them; did you mean {sweep} or {logs}/mnist_bn/runs\\?"
        with pytest.raises(ValueError, match=words):
            write_report([str(logs)])

    def test_a_database_of_optunas(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        journal = optuna.storages.journal.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(make_study(tmp_path) / "journal.log"))
        )
        (tmp_path / "sweep").mkdir()
        url = f"sqlite:///{tmp_path}/sweep/study.db"
        optuna.copy_study(from_study_name="sweep", from_storage=journal, to_storage=url)
        assert write_report([str(tmp_path / "sweep")]) == tmp_path / "sweep" / "report.html"

    @pytest.mark.parametrize("name", ["metrics.csv", "checkpoints/last.ckpt"])
    def test_a_file_of_a_run(self, tmp_path: Path, name: str) -> None:
        directory = run(tmp_path / "run")
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints/last.ckpt").write_bytes(b"PK")
        with pytest.raises(ValueError, match=f"a file of a run; report its directory, {directory}"):
            write_report([str(directory / name)])

    def test_two_sweeps(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        sweeps = [str(make_study(tmp_path / name)) for name in ("a", "b")]
        with pytest.raises(ValueError, match="expected one sweep, or runs, got 2 places"):
            write_report(sweeps)

    def test_a_run_and_what_is_none(self, tmp_path: Path, make_study: Callable[..., Path]) -> None:
        first = run(tmp_path / "run")
        for other in (make_study(tmp_path / "sweep"), tmp_path / "nowhere"):
            with pytest.raises(ValueError, match=f"no run in {other}; report a sweep by itself"):
                write_report([str(first), str(other)], ReportOptions(tmp_path / "out"))
        with pytest.raises(ValueError) as caught:
            write_report([str(first), "postgresql://me:secret@host/db"])
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "summary of the report"),
            ("{}", "summary of the report"),
            ('{"schema_version": 9, "study": {}, "kind": "grid"}', "to have schema_version 1"),
        ],
        ids=["absent", "empty", "of another version"],
    )
    def test_a_table_without_its_summary(
        self, tmp_path: Path, text: str | None, words: str
    ) -> None:
        (tmp_path / "trials.csv").write_text("number,state,value\n")
        if text is not None:
            (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            write_report([str(tmp_path)])


class TestCommand:
    def main(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        main()

    def test_writes_where_it_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = run(tmp_path / "a")
        self.main(monkeypatch, directory, "--output", tmp_path / "out")
        assert (tmp_path / "out/comparison.png").exists()
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        self.main(monkeypatch, directory)
        assert (directory / "comparison.svg").exists()
        assert not list((tmp_path / "here").iterdir())

    def test_lists_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(tmp_path / "logs/mine/runs/a", BATCH)
        measured_mae(run(tmp_path / "logs/mine/runs/b", seed=3))
        (tmp_path / "logs/mine/runs/a/.hydra").mkdir()
        overrides = "- norm=batch\n- optimizer.lr=0.1\n"
        (tmp_path / "logs/mine/runs/a/.hydra/overrides.yaml").write_text(overrides)
        (tmp_path / "logs/other").mkdir()
        (tmp_path / "logs/other/run.json").write_text("{}")
        self.main(monkeypatch, "--list", tmp_path / "logs")
        lines = capsys.readouterr().out.splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert rows[0] == ["run", "arm", "seed", "status", "result", "overrides"]
        assert rows[2:] == [
            ["mine/runs/a", "with BatchNorm", "1", "completed", "test accuracy 0.9000"]
            + ["optimizer.lr=0.1"],
            ["mine/runs/b", "without BatchNorm", "3", "completed", "test mae 0.2500", ""],
            ["other", "", "", "unreadable", "", ""],
        ]
        with pytest.raises(SystemExit):
            self.main(monkeypatch, "--list", tmp_path / "nowhere")

    def test_options(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_study: Callable[..., Path]
    ) -> None:
        space = {"step": [0.1, 1.0], "arm": ["a", "b"], "kind": ["c", "d"]}
        sweep = make_study(tmp_path, space=space)
        self.main(monkeypatch, sweep, "--lr", "step", "--arm", "arm", "kind", "--study", "sweep")
        assert list(summary(sweep)["arms"]) == ["a, c", "a, d", "b, c", "b, d"]

    def test_threshold(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_study: Callable[..., Path]
    ) -> None:
        sweep = make_study(tmp_path)
        self.main(monkeypatch, sweep, "--threshold", "0.94")
        measures = summary(sweep)["arms"]["none"]["measures"]
        assert measures["share_trained"]["value"] == 0  # .931 to .933 at one cell of eight

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
        assert err.startswith("error: expected a sweep's directory")
        assert "bn-report --list logs" in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["here", "--outptu", "there"], "got '--outptu'; did you mean --output?"),
            (["here", "--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
            ([], "arguments are required: DIR"),
        ],
        ids=["unknown", "value", "none"],
    )
    def test_so_is_an_option_that_it_has_not(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        words: str,
    ) -> None:
        with pytest.raises(SystemExit) as end:
            self.main(monkeypatch, *arguments)
        assert end.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and words in err and err.count("\n") == 1
