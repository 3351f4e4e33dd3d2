"""Runs side by side: labels, arms, width of activations, and time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.record import read_run
from bn_lightning.sweeps.analysis.arms import arm_of_config
from bn_lightning.sweeps.analysis.compared_runs import (
    ComparedRun,
    read_runs,
    runtime_sentences,
    runtimes,
    width_growth,
)
from bn_lightning.sweeps.analysis.seed_groups import seed_groups
from bn_lightning.sweeps.report.page_parts import duration_text
from bn_lightning.sweeps.report.page_skeleton import Plot
from bn_lightning.sweeps.report.plotly_renderer import log_ticks, plots_of
from bn_lightning.sweeps.report.run_figures import figures_of_groups

BATCH = {"_target_": "bn_lightning.models.normalization.batch_norm"}
SYNC = {"_target_": "bn_lightning.models.normalization.sync_batch_norm"}
TORCH = {"_target_": "bn_lightning.models.normalization.torch_batch_norm"}
GROUP = {"_target_": "torch.nn.GroupNorm", "_partial_": True, "num_groups": 4}

ARMS: dict[str, list[Any]] = {
    "none": [None],
    "batch": [BATCH, SYNC],
    "torch": [TORCH],
    "torch.nn.GroupNorm": [GROUP],
    "my_package.batch_norm": [{"_target_": "my_package.batch_norm"}],
}


def test_arms() -> None:
    arms = {arm: [arm_of_config({"norm": norm}) for norm in norms] for arm, norms in ARMS.items()}
    assert arms == {arm: [arm] * len(norms) for arm, norms in ARMS.items()}


def test_labels_say_what_differs(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    runs = [
        make_run(tmp_path / "a", BATCH),
        make_run(tmp_path / "b", None, lr=0.1),
        make_run(tmp_path / "c", None, lr=0.1, seed=2),
        make_run(tmp_path / "d", None, lr=0.1, seed=2),
    ]
    assert [(read.group, read.label) for read in read_runs(runs)] == [
        ("with BatchNorm", "with BatchNorm, seed 1"),
        ("without BatchNorm", "without BatchNorm, seed 1"),
        ("without BatchNorm", "without BatchNorm, seed 2"),
        ("without BatchNorm (2)", "without BatchNorm (2), seed 2"),
    ]


def test_a_run_that_was_stopped_early_is_complete_and_one_of_epochs_has_a_budget(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    directory = make_run(tmp_path / "a", BATCH)
    record = read_run(directory) | {"status": "stopped early", "stopped_at": 2}
    record["config"]["trainer"] = {"max_steps": -1, "max_epochs": 3}
    write_json(directory / "run.json", record)
    row = read_runs([directory])[0].as_row(0, tmp_path)
    assert (row.state, row.attributes["stopped_at"]) == ("COMPLETE", 2)
    assert row.attributes["run/max_steps"] == "3 epochs"


def test_labels_of_runs_that_differ_by_what_was_typed(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    typed = {
        "a": ["+experiment=mnist_bn", "norm=batch", "logger=csv"],
        "b": ["+experiment=mnist_bn", "optimizer.lr=0.1", "model.network.activation=relu"],
        "c": ["+experiment=mnist_bn", "optimizer.lr=0.1", "init=he", f"a={'x' * 99}"],
        "d": [],  # copied without its file
    }
    runs = [make_run(tmp_path / n, BATCH, lr=1.0 if n == "a" else 0.1) for n in typed]
    for run, overrides in zip(runs, typed.values(), strict=True):
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text("\n".join(f"- '{o}'" for o in overrides))
    networks = [{"activation": name} for name in ("sigmoid", "relu", "tanh")]
    for run, network in zip(runs, networks, strict=False):
        record = read_run(run)
        record["config"]["model"] = {"network": network}
        write_json(run / "run.json", record)
    assert [read.group for read in read_runs(runs[:3])] == [
        "with BatchNorm, learning rate 1",
        "with BatchNorm, learning rate 0.1, model.network.activation=relu",
        f"with BatchNorm, learning rate 0.1, init=he, a={'x' * 58}",
    ]
    assert read_runs(runs)[3].group == "with BatchNorm, learning rate 0.1"


def test_the_tasks_name_is_enough_where_it_differs(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    for directory, name, lr in (("a", "two", 1.0), ("b", "eps", 0.1), ("c", "eps", 1.0)):
        run = make_run(tmp_path / directory, None, lr=lr)
        record = read_run(run)
        record["config"]["task_name"] = name
        write_json(run / "run.json", record)
    labels = [run.group for run in read_runs([tmp_path / "a", tmp_path / "b"])]
    assert labels == ["without BatchNorm, two", "without BatchNorm, eps"]
    labels = [run.group for run in read_runs([tmp_path / n for n in "abc"])]
    names = ("two, learning rate 1", "eps, learning rate 0.1", "eps, learning rate 1")
    assert labels == [f"without BatchNorm, {name}" for name in names]


def test_a_run_as_a_line_of_a_table(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    (read,) = read_runs([make_run(tmp_path / "a", None)])
    row = read.as_row(5, tmp_path / "report")
    assert (row.number, row.state) == (5, "COMPLETE")
    assert row.params == {"norm": "none", "optimizer.lr": 1.0, "seed": 1, "trainer.max_steps": 2}
    assert row.attributes["directory"] == "../a"
    assert row.attributes["test/accuracy"] == 0.9 and row.attributes["run/data"] == "mnist"


@pytest.mark.parametrize(("spread", "growth"), [(4.0, 4), (0.5, 0.5)], ids=["wider", "narrower"])
def test_width_growth(
    tmp_path: Path, make_run: Callable[..., Path], spread: float, growth: float
) -> None:
    (read,) = read_runs([make_run(tmp_path / "a", None, spread=spread)])
    assert width_growth(read) == pytest.approx(growth)


def timed(make_run: Callable[..., Path], directory: Path, norm: Any, **record: Any) -> Path:
    run = make_run(directory, norm)
    write_json(run / "run.json", read_run(run) | record)
    return run


def plots_of_runs(runs: list[ComparedRun]) -> dict[str, Plot]:
    figures = figures_of_groups(seed_groups(runs), with_paper=False).values()
    return {plot.id: plot for figure in figures for plot in plots_of(figure)}


def test_nothing_lies_on_the_curves(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Plotly's buttons have the margin above, the legend the one below; the last tick is whole."""
    plots = plots_of_runs(read_runs([make_run(tmp_path / "a", None)]))
    for name in ("accuracy", "loss", "percentiles-0"):
        layout = plots[name].layout
        assert layout["margin"]["t"] >= 40 and layout["margin"]["r"] >= 30
        if layout["showlegend"]:
            assert layout["legend"]["y"] < 0 and layout["legend"]["yanchor"] == "top"
    assert not plots["throughput"].has_tools


@pytest.mark.parametrize("points", [1, 2])
def test_each_measurement_has_a_marker(
    tmp_path: Path, make_run: Callable[..., Path], points: int
) -> None:
    """A line through one point would be invisible."""
    (read,) = read_runs([make_run(tmp_path / "a", None)])
    metrics = {name: series[:points] for name, series in read.metrics.items()}
    plots = plots_of_runs([replace(read, metrics=metrics)])
    for name in ("accuracy", "loss", "percentiles-0"):
        assert plots[name].traces[-1]["mode"] == "markers+lines"
        assert plots[name].traces[-1]["cliponaxis"] is False


def test_bars_are_on_an_axis_of_names(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """On an axis of numbers they would not be drawn."""
    plots = plots_of_runs(read_runs([make_run(tmp_path / "a", None)]))
    assert plots["throughput"].layout["yaxis"]["type"] == "category"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1000, 2000], {}),
        ([0.1, 1.0], {"dtick": "D2"}),
        ([1, 50_000], {"dtick": 1}),
        ([1000, 1000], {"dtick": 1}),
        ([], {"dtick": 1}),
    ],
)
def test_ticks_of_a_logarithmic_axis(values: list[float], ticks: dict[str, Any]) -> None:
    assert log_ticks(values) == ticks


@pytest.mark.parametrize(
    ("seconds", "text"), [(47.4, "47 seconds"), (600, "10 minutes"), (7000, "1.9 hours")]
)
def test_a_time_is_in_a_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_runtimes_of_the_arms(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    times = (("a", BATCH, 30.0), ("b", BATCH, 40.0), ("c", None, 28.0))
    runs = [timed(make_run, tmp_path / name, norm, seconds=s) for name, norm, s in times]
    # Version 0.1.0 recorded the time since a run was resumed; one that failed is not complete.
    old = {"resumed_at": [1], "versions": {"bn-lightning": "0.1.0"}}
    runs.append(timed(make_run, tmp_path / "d", None, seconds=3.0, **old))
    runs.append(timed(make_run, tmp_path / "f", BATCH, seconds=None))
    runs.append(timed(make_run, tmp_path / "e", None, seconds=4.0, status="failed", steps=1))
    found = runtimes(read_runs(runs))
    assert found == {"batch": 35.0, "none": 28.0}
    assert runtime_sentences(read_runs(runs)) == [
        "Time of training: with BatchNorm 35.00 s, without BatchNorm 28.00 s; "
        "with BatchNorm / without BatchNorm: 1.25"
    ]
    assert read_runs(runs)[3].as_row(3, tmp_path).attributes["seconds"] is None
    sentences = runtime_sentences(read_runs([*runs[:2], runs[3]]))
    assert sentences[0] == "Time of training: with BatchNorm 35.00 s"
    assert sentences[1].startswith("Time unknown: without BatchNorm,")


def test_a_resumed_run_counts_with_the_time_of_all_its_parts(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    runs = [timed(make_run, tmp_path / "a", None, seconds=28.0, resumed_at=[1])]
    assert runtimes(read_runs(runs)) == {"none": 28.0}


def test_runtimes_of_different_budgets_say_nothing(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    runs = [
        timed(make_run, tmp_path / "a", BATCH, seconds=30.0),
        timed(make_run, tmp_path / "b", None, seconds=3.0, steps=1),
    ]
    assert runtimes(read_runs(runs)) == {}
    assert runtime_sentences(read_runs(runs)) == []


def test_runtimes_of_different_networks_say_nothing(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    runs = [timed(make_run, tmp_path / name, BATCH, seconds=30.0) for name in "abc"]
    for run, changes in zip(runs, ({}, {"seed": 2}, {"model": {"depth": 9}}), strict=True):
        record = read_run(run)
        places = {"paths": {"output_dir": str(run)}, "callbacks": {"dirpath": f"{run}/checkpoints"}}
        record["config"] |= places | changes
        write_json(run / "run.json", record)
    assert runtimes(read_runs(runs[:2])) == {"batch": 30.0}
    assert runtimes(read_runs(runs)) == {}
