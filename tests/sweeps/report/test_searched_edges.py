"""The report of a sweep that searched its edges."""

import json
import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, create_trial

from bn_lightning.sweeps.engine.creation import create_study
from bn_lightning.sweeps.engine.sampling import SamplingPlan
from bn_lightning.sweeps.engine.space import parse_space
from bn_lightning.sweeps.engine.storage import open_storage, storage_url
from bn_lightning.sweeps.report.write_report import ReportOptions, write_report

pytestmark = pytest.mark.usefixtures("empty_pictures")

SPACE = ["seed=1,2", "init.std=0.1,1", "optimizer.lr=0.01,0.1,1,10,100", "norm=none,batch"]
LARGEST = {"batch": 40.0, "none": 0.3}


def accuracy(params: dict[str, Any]) -> float:
    """With BatchNorm 0.05 to 40 train, without one to 0.3, and not 1 with BatchNorm at seed 2."""
    rate = params["optimizer.lr"]
    trains = 0.05 <= rate <= LARGEST[params["norm"]]
    in_hole = (params["norm"], params["seed"], params["init.std"]) == ("batch", 2, 1)
    return 0.95 if trains and not (in_hole and 0.5 < rate < 2) else 0.1


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("edges")
    space = parse_space(None, SPACE)
    target = "bn_lightning.sweeps.analysis.edge_search.EdgeSearch"
    sampler = {"_target_": target, "axis": "optimizer.lr", "resolution": 0.125, "threshold": 0.8}
    plan = SamplingPlan(sampler, space, None)
    results: dict[int, FrozenTrial | None] = {}
    asked = list(range(plan.n_trials))
    while asked:
        for slot in asked:
            params, distributions = plan.point(slot)
            value = accuracy(params)
            results[slot] = create_trial(
                value=value,
                params=params,
                distributions=distributions,
                user_attrs={"test/accuracy": value, "test/loss": 1.0},
            )
        assert plan.following is not None
        asked = list(plan.following(results))
    storage = open_storage(storage_url("journal", directory), 5)
    described = {"space": {**space.describe(), **plan.describe()}, "overrides": []}
    create_study(storage, "edges", ["maximize"], described)
    journal = JournalStorage(JournalFileBackend(str(directory / "journal.log")))
    study = optuna.load_study(study_name="edges", storage=journal)
    study.add_trials([trial for trial in results.values() if trial is not None])
    return directory


@pytest.fixture(scope="module")
def page(sweep: Path, empty_pictures: None) -> str:
    return write_report([str(sweep)]).read_text()


def test_numbers(sweep: Path, page: str) -> None:
    content = json.loads((sweep / "summary.json").read_text())
    # The grid is that of the command, and its widths are those of its rates alone.
    assert content["kind"] == "grid"
    assert content["grid"]["rates"] == [0.01, 0.1, 1, 10, 100]
    assert content["arms"]["none"]["measures"]["mean_width"]["value"] == pytest.approx(1)
    edges = content["edges"]
    arms = edges["arms"]
    assert edges["trials"] == content["counts"]["complete"] > 40
    assert [arm["resolution"] for arm in arms.values()] == pytest.approx([0.125, 0.125], rel=1e-4)
    assert arms["none"]["width"]["value"] == pytest.approx(math.log10(0.3 / 0.05), abs=0.125)
    assert (arms["none"]["holes"], arms["batch"]["holes"]) == (0, 1)
    hollow, whole = arms["batch"]["inits"][1]["width"], arms["batch"]["inits"][0]["width"]
    hole = math.log10(2 / 0.5)
    assert whole["low"] - hollow["low"] == pytest.approx(hole, abs=0.125)
    # The sweep's threshold is the report's.
    assert "from an accuracy of 0.80 on" in page


def test_page(page: str) -> None:
    text = re.sub(r"<[^>]*>", " ", page.partition("Where training begins and ends")[2])
    assert "With each edge searched to 0.125 decades" in text
    assert "not an interval for 1 of 4 pairs of initialization and seed with BatchNorm" in text
    assert "grid (decades), with BatchNorm" in text
    assert "± 0.062" in text and "1 of 2 seeds" in text


@pytest.mark.slow
def test_from_its_table_alone_and_at_another_threshold(
    sweep: Path, page: str, tmp_path: Path
) -> None:
    for name in ("trials.csv", "summary.json"):
        (tmp_path / name).write_bytes((sweep / name).read_bytes())
    before = json.loads((tmp_path / "summary.json").read_text())
    write_report([str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text()) == before
    write_report([str(tmp_path)], ReportOptions(threshold=0.96))
    after = json.loads((tmp_path / "summary.json").read_text())
    assert after["edges"]["arms"]["batch"]["width"]["value"] == 0
