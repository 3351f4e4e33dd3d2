"""Data, budget, hardware and versions of a sweep, from the files of its runs."""

from pathlib import Path

import pytest

from bn_lightning.runs.record import RunRecord
from bn_lightning.sweeps.analysis.provenance import (
    BUDGET,
    DATA,
    SEED,
    classes_of,
    facts_of,
    is_planned,
    mixed,
    with_provenance,
)
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable

MULTIRUN = """
hydra:
  sweeper:
    storage: ${oc.env:NOWHERE}
    sampler: {_target_: optuna.samplers.GridSampler}
"""


def row(number: int, directory: Path | str) -> TrialRow:
    return TrialRow(number, "COMPLETE", (0.5,), {}, {"directory": str(directory)})


def run(directory: Path, source: str = "mnist", steps: int = 2000) -> Path:
    directory.mkdir(parents=True)
    config = {"trainer": {"max_steps": steps}, "model": {"num_classes": 4}, "seed": 3}
    RunRecord(directory, config).update(data={"source": source})
    return directory


def test_facts_are_counted_and_directories_are_relative(tmp_path: Path) -> None:
    base = tmp_path / "sweep"
    rows = (row(0, run(base / "0")), row(1, run(base / "1")), row(2, base / "2"))
    table = with_provenance(TrialTable("t", ("maximize",), rows), base)
    assert [r.attributes["directory"] for r in table.rows] == ["0", "1", "2"]
    assert table.rows[0].attributes[DATA] == "mnist"
    assert table.rows[0].attributes[BUDGET] == 2000
    assert table.rows[0].attributes[SEED] == 3
    assert DATA not in table.rows[2].attributes
    runs = table.about["runs"]
    assert runs["data"] == {"mnist": 2} and runs["steps"] == {"2000": 2}
    assert sum(runs["versions"].values()) == 2 and "torch 2" in next(iter(runs["versions"]))
    assert table.about["first_started"] <= table.about["last_ended"]
    assert classes_of(table.about) == 4
    assert classes_of({}) is None
    assert not mixed(table.rows)


def test_the_data_know_their_classes_where_the_model_does_not(tmp_path: Path) -> None:
    record = {"data": {"source": "placement", "classes": 2}, "config": {"model": {}}}
    assert facts_of(record)["classes"] == "2"
    assert classes_of({"runs": {"classes": {"2": 5}}}) == 2


def test_a_sweep_that_was_moved(tmp_path: Path) -> None:
    base = tmp_path / "sweep"
    run(base / "7")
    table = with_provenance(TrialTable("t", ("maximize",), (row(7, "/elsewhere/sweep/7"),)), base)
    assert table.rows[0].attributes["directory"] == "7"
    assert table.rows[0].attributes[BUDGET] == 2000


def test_runs_on_another_machine(tmp_path: Path) -> None:
    attributes = {"directory": "/there/0", "data": "mnist", "steps": 2000, "commit": "abc"}
    attributes |= {"classes": 2, "seed": 5}
    rows = (
        TrialRow(0, "COMPLETE", (0.5,), {}, attributes),
        TrialRow(
            1, "COMPLETE", (0.1,), {}, attributes | {"diverged": True, "steps": 7, "classes": "a b"}
        ),
        TrialRow(2, "FAIL", (), {}, attributes | {"steps": 9}),
    )
    table = with_provenance(TrialTable("t", ("maximize",), rows), tmp_path)
    assert table.about["runs"] == {
        "classes": {"2": 1},
        "commit": {"abc": 2},
        "data": {"mnist": 2},
        "steps": {"2000": 1},
    }
    assert [row.attributes.get(SEED) for row in table.rows] == [5, 5, None]
    assert not mixed(table.rows)


@pytest.mark.parametrize(
    "text",
    ['{"data": "another program\'s"}', '{"schema_version": 99, "data": {"source": "x"}}', "["],
    ids=["another program", "another version", "no JSON"],
)
def test_a_run_json_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/run.json").write_text(text)
    rows = (TrialRow(0, "COMPLETE", (0.5,), {}, {"directory": "0", "data": "mnist"}),)
    table = with_provenance(TrialTable("t", ("maximize",), rows), tmp_path)
    assert table.about["runs"] == {"data": {"mnist": 1}}  # what the trial itself says


def test_the_sampler_is_that_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(MULTIRUN)
    kept = {"command": "bn-train -m +sweep=lr"}
    about = with_provenance(TrialTable("t", ("maximize",), (), kept), tmp_path).about
    assert about["command"] == "bn-train -m +sweep=lr"
    assert is_planned(about) is True


def test_samplers_that_plan() -> None:
    assert is_planned({"sampler": "optuna.samplers.TPESampler"}) is False
    assert is_planned({}) is None


@pytest.mark.parametrize("text", ["", "a: [", "hydra: 3"], ids=["empty", "no YAML", "another"])
def test_a_configuration_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "multirun.yaml").write_text(text)
    assert "sampler" not in with_provenance(TrialTable("t", ("maximize",), ()), tmp_path).about


def test_different_data_and_budgets(tmp_path: Path) -> None:
    rows = (row(0, run(tmp_path / "0")), row(1, run(tmp_path / "1", "digits", 20)))
    table = with_provenance(TrialTable("t", ("maximize",), rows), tmp_path)
    assert mixed(table.rows) == {DATA: ["digits", "mnist"], BUDGET: [20, 2000]}
