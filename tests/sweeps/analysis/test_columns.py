"""Which parameter is what, and complete trials as trials of a grid."""

import math
from typing import Any

import pytest

from bn_lightning.sweeps.analysis.columns import AS_CONFIGURED, NoGrid, Roles, scored
from bn_lightning.sweeps.analysis.trials import Row, Table


def table(*rows: dict[str, Any], **attributes: Any) -> Table:
    given = {"test/accuracy": 0.9, "test/loss": 0.3} | attributes
    return Table(
        "t",
        ("maximize",),
        tuple(Row(i, "COMPLETE", (0.8,), params, given) for i, params in enumerate(rows)),
    )


@pytest.mark.parametrize(
    ("params", "roles"),
    [
        (
            {"optimizer.lr": 1.0, "init.std": 0.1, "norm": "batch", "seed": 1},
            Roles("optimizer.lr", "init.std", ("norm",), "seed"),
        ),
        (
            {"init": "he", "+model.optimizer.learning_rate": 1.0},
            Roles("+model.optimizer.learning_rate", "init"),
        ),
        ({"lr": 1.0}, Roles("lr")),
    ],
    ids=["grid", "schemes", "line"],
)
def test_roles_by_name(params: dict[str, Any], roles: Roles) -> None:
    assert Roles.of(table(params, params)) == roles


def test_a_parameter_that_has_one_value_is_no_matter() -> None:
    assert Roles.of(table({"lr": 1.0, "width": 8}, {"lr": 0.1, "width": 8})).lr == "lr"


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
        Roles.of(table(*rows))


def test_given_roles_come_first() -> None:
    params = {"a": 1.0, "b": 2.0, "width": 8}
    found = Roles.of(table(params, {**params, "width": 9}), Roles("a", "b", ("width",)))
    assert found == Roles("a", "b", ("width",), "")
    with pytest.raises(ValueError, match="`--lr` expected one of the study's parameters, a, b, wi"):
        Roles.of(table(params), Roles("c"))


class TestScored:
    ROLES = Roles("lr", "init", ("norm", "act"), "seed")
    PARAMS = {"lr": 1, "init": 0.1, "norm": None, "act": "relu", "seed": 2}

    def test_a_trial(self) -> None:
        found = scored(table(self.PARAMS, diverged=True), self.ROLES)
        (trial,) = found.trials
        assert (trial.arm, trial.init, trial.lr, trial.seed) == ("none, relu", 0.1, 1.0, 2)
        assert (trial.accuracy, trial.loss, trial.diverged) == (0.9, 0.3, True)
        assert found.metric == "test/accuracy" and found.numbers == {0: trial}

    def test_what_is_not_varied(self) -> None:
        (trial,) = scored(table({"lr": 1.0}), Roles("lr")).trials
        assert (trial.arm, trial.init, trial.seed) == (AS_CONFIGURED, AS_CONFIGURED, 0)

    def test_one_metric_for_all(self) -> None:
        rows = (
            Row(0, "COMPLETE", (0.8,), {"lr": 1.0}, {"test/accuracy": 0.9, "val/accuracy": 0.7}),
            Row(1, "COMPLETE", (0.8,), {"lr": 2.0}, {"val/accuracy": 0.6, "val/loss": "nan"}),
            Row(2, "FAIL", (), {"lr": 3.0}, {}),
        )
        found = scored(Table("t", ("maximize",), rows), Roles("lr"))
        assert found.metric == "val/accuracy"
        assert [trial.accuracy for trial in found.trials] == [0.7, 0.6]
        assert all(math.isnan(trial.loss) for trial in found.trials)
        plain = Table("t", ("maximize",), (Row(0, "COMPLETE", (0.8,), {"lr": 1.0}),))
        assert scored(plain, Roles("lr")).trials[0].accuracy == 0.8

    def test_of_repeated_points_the_first_counts(self) -> None:
        found = scored(table(self.PARAMS, self.PARAMS), self.ROLES)
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
            scored(table(self.PARAMS | change), self.ROLES)

    def test_a_value_that_is_no_accuracy(self) -> None:
        with pytest.raises(NoGrid, match="no accuracy in"):
            scored(table(self.PARAMS, **{"test/accuracy": 93.0}), self.ROLES)
