"""The columns of a study, and complete trials as trials of a grid."""

import math
from dataclasses import replace
from typing import Any

import pytest

from bn_lightning.sweeps.analysis.columns import (
    AS_CONFIGURED,
    UNKNOWN,
    Columns,
    NoGrid,
    grid_trials,
    metric_trials,
)
from bn_lightning.sweeps.analysis.provenance import SEED
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable


def table(*rows: dict[str, Any], **attributes: Any) -> TrialTable:
    given = {"test/accuracy": 0.9, "test/loss": 0.3} | attributes
    return TrialTable(
        "t",
        ("maximize",),
        tuple(TrialRow(i, "COMPLETE", (0.8,), params, given) for i, params in enumerate(rows)),
    )


@pytest.mark.parametrize(
    ("params", "columns"),
    [
        (
            {"optimizer.lr": 1.0, "init.std": 0.1, "norm": "batch", "seed": 1},
            Columns("optimizer.lr", "init.std", ("norm",), "seed"),
        ),
        (
            {"init": "he", "+model.optimizer.learning_rate": 1.0},
            Columns("+model.optimizer.learning_rate", "init"),
        ),
        ({"lr": 1.0}, Columns("lr")),
    ],
    ids=["grid", "schemes", "line"],
)
def test_columns_by_name(params: dict[str, Any], columns: Columns) -> None:
    assert Columns.of(table(params, params)) == columns


def test_a_parameter_that_has_one_value_is_no_matter() -> None:
    assert Columns.of(table({"lr": 1.0, "width": 8}, {"lr": 0.1, "width": 8})).lr == "lr"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"width": 8}], "no learning rate"),
        ([{"lr": 1.0, "width": 8}, {"lr": 1.0, "width": 9}], "also varies width"),
        ([{"lr": 1.0, "init": "he", "init.std": 1.0}], "varies init and init.std; name one"),
    ],
    ids=["no rate", "another parameter", "two initialisations"],
)
def test_what_is_no_grid(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(NoGrid, match=words):
        Columns.of(table(*rows))


def test_given_columns_come_first() -> None:
    params = {"a": 1.0, "b": 2.0, "width": 8}
    found = Columns.of(table(params, {**params, "width": 9}), Columns("a", "b", ("width",)))
    assert found == Columns("a", "b", ("width",), "")
    with pytest.raises(ValueError, match="`--lr` to be one of the study's parameters, a, b, wi"):
        Columns.of(table(params), Columns("c"))


class TestGridTrials:
    COLUMNS = Columns("lr", "init", ("norm", "act"), "seed")
    PARAMS = {"lr": 1, "init": 0.1, "norm": None, "act": "relu", "seed": 2}

    def test_a_trial(self) -> None:
        found = grid_trials(table(self.PARAMS, diverged=True), self.COLUMNS)
        (trial,) = found.numbers.values()
        assert (trial.arm, trial.init, trial.lr, trial.seed) == ("none, relu", 0.1, 1.0, 2)
        assert (trial.accuracy, trial.loss, trial.diverged) == (0.9, 0.3, True)
        assert found.metric == "test/accuracy" and found.numbers == {0: trial}

    def test_what_is_not_varied(self) -> None:
        (trial,) = grid_trials(table({"lr": 1.0}), Columns("lr")).numbers.values()
        assert (trial.arm, trial.init, trial.seed) == (AS_CONFIGURED, AS_CONFIGURED, UNKNOWN)

    def test_a_seed_that_is_not_varied_is_that_of_the_runs(self) -> None:
        found = grid_trials(table({"lr": 1.0}, {"lr": 2.0}, **{SEED: 7}), Columns("lr"))
        assert [trial.seed for trial in found.numbers.values()] == [7, 7]
        known, unknown = table({"lr": 1.0}, **{SEED: 7}).rows[0], table({"lr": 2.0}).rows[0]
        mixed = TrialTable("t", ("maximize",), (known, replace(unknown, number=1)))
        found = grid_trials(mixed, Columns("lr"))
        assert [trial.seed for trial in found.numbers.values()] == [UNKNOWN, UNKNOWN]

    def test_one_metric_for_all(self) -> None:
        rows = (
            TrialRow(
                0, "COMPLETE", (0.8,), {"lr": 1.0}, {"test/accuracy": 0.9, "val/accuracy": 0.7}
            ),
            TrialRow(1, "COMPLETE", (0.8,), {"lr": 2.0}, {"val/accuracy": 0.6, "val/loss": "nan"}),
            TrialRow(2, "FAIL", (), {"lr": 3.0}, {}),
        )
        found = grid_trials(TrialTable("t", ("maximize",), rows), Columns("lr"))
        assert found.metric == "val/accuracy"
        assert [trial.accuracy for trial in found.numbers.values()] == [0.7, 0.6]
        assert all(math.isnan(trial.loss) for trial in found.numbers.values())
        row = TrialRow(0, "COMPLETE", (0.8,), {"lr": 1.0})
        plain = TrialTable("t", ("maximize",), (row,), {"metrics": ["val/acc"]})
        assert grid_trials(plain, Columns("lr")).numbers[0].accuracy == 0.8

    @pytest.mark.parametrize(
        ("metric", "direction"),
        [("val/mae", "minimize"), ("val/auroc", "maximize"), ("val/accuracy_gap", "minimize")],
    )
    def test_what_is_no_accuracy(self, metric: str, direction: str) -> None:
        rows = (TrialRow(0, "COMPLETE", (0.8,), {"lr": 1.0}, {metric: 0.8}),)
        study = TrialTable("t", (direction,), rows)
        with pytest.raises(NoGrid, match=f"its metric, {metric}, is no accuracy"):
            grid_trials(study, Columns("lr"))
        found = metric_trials(study, Columns("lr"))
        assert (found.metric, found.numbers[0].accuracy) == (metric, 0.8)

    def test_of_repeated_points_the_first_counts(self) -> None:
        found = grid_trials(table(self.PARAMS, self.PARAMS), self.COLUMNS)
        assert list(found.numbers) == [0] and found.repeated == 1

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"lr": "fast"}, "no number above 0"),
            ({"lr": 0.0}, "no number above 0"),
            ({"seed": 0.5}, "no integer"),
        ],
        ids=["text", "zero", "seed"],
    )
    def test_what_is_no_place(self, change: dict[str, Any], words: str) -> None:
        with pytest.raises(NoGrid, match=words):
            grid_trials(table(self.PARAMS | change), self.COLUMNS)

    def test_a_value_that_is_no_accuracy(self) -> None:
        with pytest.raises(NoGrid, match="no accuracy in"):
            grid_trials(table(self.PARAMS, **{"test/accuracy": 93.0}), self.COLUMNS)
