"""Tables: the law they are drawn by, CSV files, and all that can be wrong with one."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bn_lightning.data import TabularDataModule
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.tabular import generate

DEFAULTS: dict[str, Any] = {
    "path": None,
    "features": ["cgpa", "iq"],
    "target": "placement",
    "law": "linear",
    "samples": 200,
    "noise": 0.5,
    "standardize": False,
    "test_fraction": 0.2,
    "batch_size": 16,
    "eval_batch_size": 50,
    "validation_fraction": 0.125,
    "seed": 1,
}
HEADER = "name,cgpa,iq,placement\n"


def module(**options: Any) -> TabularDataModule:
    return TabularDataModule(**{**DEFAULTS, **options})


def ready(**options: Any) -> TabularDataModule:
    made = module(**options)
    made.setup("fit")
    return made


def rows(count: int) -> str:
    """Lines whose class is that of the row's number."""
    return "".join(f"n{i},{i / 10},{90 + i},{i % 2}\n" for i in range(count))


class TestGenerated:
    def test_ranges(self) -> None:
        inputs, targets = generate("linear", 20_000, 0.5)
        assert inputs[:, 0].min() >= 0 and inputs[:, 0].max() <= 10
        assert inputs.mean(axis=0) == pytest.approx([7, 100], rel=0.01)
        # Cutting grades off at 10, two deviations above their mean, takes 2% of the deviation.
        assert inputs.std(axis=0) == pytest.approx([1.47, 15], rel=0.02)
        assert set(targets.tolist()) == {0, 1}

    @pytest.mark.parametrize("law", ["linear", "nonlinear"])
    def test_the_share_that_is_placed_is_what_the_law_says(self, law: str) -> None:
        inputs, targets = generate(law, 200_000, 0.5)
        u, v = (inputs[:, 0] - 7) / 1.5, (inputs[:, 1] - 100) / 15
        score = (u + v) / math.sqrt(2) if law == "linear" else 1 + v - u**2
        for low in (-2, -0.5, 0, 0.5):
            there = (score >= low) & (score < low + 0.1)
            expected = 1 / (1 + math.exp(-(low + 0.05) / 0.5))
            # Five standard errors of the share.
            assert targets[there].mean() == pytest.approx(
                expected, abs=5 * math.sqrt(0.25 / there.sum())
            )

    def test_no_noise_to_speak_of(self) -> None:
        inputs, targets = generate("linear", 1000, 1e-300)
        score = (inputs[:, 0] - 7) / 1.5 + (inputs[:, 1] - 100) / 15
        assert (targets == (score > 0)).all()

    def test_the_table_and_its_split_do_not_depend_on_the_seed(self) -> None:
        one, other = (ready(seed=seed).test_dataloader() for seed in (1, 2))
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)

    def test_sizes_and_types(self) -> None:
        info = ready().info
        assert (info["train"], info["validation"], info["test"]) == (140, 20, 40)
        assert (info["source"], info["classes"], info["positive"]) == (
            "placement (linear law)",
            2,
            "placed",
        )
        x, target = next(iter(ready().train_dataloader()))
        assert (x.shape, x.dtype, target.shape, target.dtype) == (
            (16, 2),
            torch.float32,
            (16,),
            torch.int64,
        )

    def test_standardize_by_what_is_not_the_test_set(self) -> None:
        raw, scaled = ready(), ready(standardize=True)
        seen = torch.cat([raw._splits[s][0] for s in ("train", "validation")]).double()
        mean, deviation = seen.mean(0), seen.std(0, correction=0)
        expected = (raw.test_dataloader().inputs - mean) / deviation
        torch.testing.assert_close(
            scaled.test_dataloader().inputs.double(), expected, atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"law": "cubic"}, "`law`.*got 'cubic'"),
            ({"samples": 9}, "`samples`"),
            ({"noise": 0}, "`noise`.*got 0"),
            ({"noise": -1}, "`noise`.*got -1"),
            ({"noise": math.inf}, "`noise`.*got inf"),
            ({"test_fraction": 1.0}, "`test_fraction`"),
            ({"test_fraction": 1.5}, "`test_fraction`"),
            ({"test_fraction": 0}, "`test_fraction`"),
            ({"test_fraction": -0.5}, "`test_fraction`"),
            ({"features": []}, "`features` and `target`"),
            ({"features": ["iq", "iq"]}, "`features` and `target`.*iq, iq, placement"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            module(**options)


class TestFile:
    def test_a_table(self, tmp_path: Path) -> None:
        path = tmp_path / "students.csv"
        path.write_text(HEADER + rows(40))
        made = ready(path=path)
        info = made.info
        assert (info["train"], info["validation"], info["test"]) == (28, 4, 8)
        assert (info["source"], info["root"]) == ("students.csv", str(tmp_path))
        assert info["positive"] == "1" and set(info["sha256"]) == {"students.csv"}
        # Each row is in one split, and its features belong to its class.
        inputs = torch.cat([x for x, _ in made._splits.values()])
        targets = torch.cat([y for _, y in made._splits.values()])
        number = (inputs[:, 1] - 90).round().long()
        assert sorted(number.tolist()) == list(range(40))
        assert torch.equal(targets, number % 2)
        torch.testing.assert_close(inputs[:, 0], number / 10)

    @pytest.mark.parametrize("name", ["nowhere.csv", ""], ids=["absent", "a folder"])
    def test_no_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataUnavailableError, match="`data.path`"):
            ready(path=tmp_path / name)

    def test_a_split_without_one_of_the_classes(self, tmp_path: Path) -> None:
        path = tmp_path / "rare.csv"
        path.write_text(HEADER + "".join(f"n,7,{i},{int(i == 0)}\n" for i in range(40)))
        made = module(path=path)
        with pytest.raises(DataError, match="both classes in each split"):
            made.setup("fit")
        assert not made.is_loaded

    def test_too_few_rows_for_a_test(self, tmp_path: Path) -> None:
        path = tmp_path / "few.csv"
        path.write_text(HEADER + rows(2))
        with pytest.raises(DataError, match="`test_fraction`.* 0.2 of 2 samples"):
            ready(path=path)

    def test_a_feature_that_does_not_vary(self, tmp_path: Path) -> None:
        path = tmp_path / "same.csv"
        path.write_text(HEADER + "".join(f"n,7,{i},{i % 2}\n" for i in range(40)))
        inputs = ready(path=path, standardize=True).test_dataloader().inputs
        assert np.isfinite(inputs.numpy()).all() and (inputs[:, 0] == 0).all()


class TestState:
    """What a checkpoint keeps, for rows that come without a table."""

    @pytest.mark.parametrize("standardize", [False, True])
    def test_other_rows_become_what_the_test_rows_are(self, standardize: bool) -> None:
        made, other = ready(standardize=standardize), module(standardize=standardize)
        plain = ready().test_dataloader().inputs.double().numpy()
        other.load_state_dict(made.state_dict())
        expected = made.test_dataloader().inputs
        torch.testing.assert_close(other.evaluated(plain), expected, rtol=1e-5, atol=1e-5)
        assert made.state_dict()["classes"] == ["not placed", "placed"]
        samples = other.sample_inputs(2000)
        assert torch.equal(samples, other.sample_inputs(2000))
        mean, deviation = ((0, 0), (1, 1)) if standardize else ((7, 100), (1.5, 15))
        assert samples.mean(0).tolist() == pytest.approx(mean, rel=0.05, abs=0.1)
        assert samples.std(0).tolist() == pytest.approx(deviation, rel=0.1)

    def test_nothing_is_made_up(self) -> None:
        made = module(standardize=True)
        assert made.state_dict() == {}
        with pytest.raises(DataError, match="neither a table nor a checkpoint"):
            made.evaluated(np.zeros((1, 2)))

    def test_a_table_that_was_read_counts_more(self) -> None:
        made = ready()
        before = made.state_dict()
        made.load_state_dict({"classes": ["a", "b"], "mean": [0, 0], "deviation": [1, 1]})
        assert made.state_dict() == before
