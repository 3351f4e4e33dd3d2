"""From the return value of a task to the outcome of its trial."""

import errno
import json

import numpy as np
import optuna
import pytest
import torch

from bn_lightning.sweeps.engine.environment import STORAGE_VARIABLE
from bn_lightning.sweeps.engine.outcome import (
    ERROR_CHARACTERS,
    Outcome,
    failed,
    last_line,
    outcome_of,
    outcome_of_error,
    read_outcome,
)
from bn_lightning.sweeps.engine.stored_names import ERROR, HOPELESS

NUMBERS = {
    "float": (0.5, [0.5]),
    "int": (2, [2.0]),
    "numpy": (np.float32(0.5), [0.5]),
    "tensor": (torch.tensor(0.5), [0.5]),
    "infinite": (float("-inf"), [float("-inf")]),
    "list_of_one": ([1.5], [1.5]),
}

UNUSABLE = {
    "none": (None, 1, "a number, got None"),
    "text": ("0.5", 1, "a number, got '0.5'"),
    "nan": (float("nan"), 1, "a number, got nan"),
    "list_of_two": ([1, 2], 1, "a number, got 2"),
    "tensor_of_two": (torch.zeros(2), 1, "a number"),
    "one_for_two": (1.0, 2, "2 numbers, got 1"),
    "three_for_two": ((1, 2, 3), 2, "2 numbers, got 3"),
    "none_among_two": ((1, None), 2, "2 numbers, got None"),
}


class TestNumbers:
    @pytest.mark.parametrize(("result", "values"), NUMBERS.values(), ids=NUMBERS.keys())
    def test_a_number(self, result, values):
        assert outcome_of(result, None, 1) == Outcome("COMPLETE", values)

    def test_several(self):
        assert outcome_of((1, np.float64(2)), None, 2).values == [1.0, 2.0]

    @pytest.mark.parametrize(("result", "n", "words"), UNUSABLE.values(), ids=UNUSABLE.keys())
    def test_no_number(self, result, n, words):
        """The trial fails and is not repeated."""
        outcome = outcome_of(result, None, n)
        assert outcome.state == "FAIL"
        assert outcome.values is None
        assert outcome.attributes[HOPELESS] is True
        assert words in outcome.attributes[ERROR]


class TestMappings:
    RESULT = {"acc": 0.5, "loss": torch.tensor(2.0), "diverged": True, "at": None, "data": "d"}

    def test_the_values_are_picked_and_all_is_kept(self):
        outcome = outcome_of(self.RESULT, ["loss", "acc"], 2)
        assert outcome.state == "COMPLETE"
        assert outcome.values == [2.0, 0.5]
        assert outcome.attributes == {
            "acc": 0.5,
            "loss": 2.0,
            "diverged": True,
            "at": None,
            "data": "d",
        }

    def test_what_is_no_scalar_is_left_out_and_nan_is_text(self):
        outcome = outcome_of({"a": 1, "b": [1, 2], "c": float("nan"), 3: object()}, ["a"], 1)
        assert outcome.attributes == {"a": 1, "c": "nan"}
        json.dumps(outcome.attributes, allow_nan=False)

    @pytest.mark.parametrize(
        ("metric", "words"),
        [(None, "`metric`"), (["f1"], "`f1`"), (["at"], "`at`")],
        ids=["unnamed", "missing", "none"],
    )
    def test_without_the_value_the_names_are_listed(self, metric, words):
        outcome = outcome_of(self.RESULT, metric, 1)
        assert outcome.state == "FAIL"
        assert words in outcome.attributes[ERROR]
        assert "acc, loss, diverged" in outcome.attributes[ERROR]
        assert outcome.attributes["acc"] == 0.5


class TestErrors:
    def test_pruned(self):
        assert outcome_of_error(optuna.TrialPruned("early")) == Outcome("PRUNED")

    def test_the_last_lines_are_kept(self):
        try:
            raise RuntimeError("x" * 5000 + "\nthe reason")
        except RuntimeError as error:
            outcome = outcome_of_error(error)
        assert outcome.state == "FAIL"
        assert HOPELESS not in outcome.attributes
        assert len(outcome.attributes[ERROR]) == ERROR_CHARACTERS
        assert last_line(outcome.attributes[ERROR]) == "the reason"

    def test_no_password_is_kept(self, monkeypatch):
        monkeypatch.setenv(STORAGE_VARIABLE, "postgresql://user:secret@host/db")
        outcome = failed("no answer from postgresql://user:secret@host/db")
        assert outcome.attributes[ERROR] == "no answer from postgresql://user:***@host/db"


class TestFile:
    def test_it_is_read_as_written(self, tmp_path):
        outcome = Outcome("COMPLETE", [float("inf"), 0.1], {"a": None, "b": "é"})
        assert read_outcome(tmp_path / "7") is None
        outcome.write(tmp_path / "7")
        assert read_outcome(tmp_path / "7") == outcome
        assert [path.name for path in (tmp_path / "7").iterdir()] == ["outcome.json"]

    def test_a_full_disk_leaves_no_part(self, tmp_path, monkeypatch):
        def full(self, *_, **__):
            self.touch()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space"):
            Outcome("PRUNED").write(tmp_path)
        assert list(tmp_path.iterdir()) == []
