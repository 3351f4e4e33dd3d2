"""A package of one's own is trained, swept, reported, evaluated and exported by the commands."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command  # noqa: F401  a fixture
from omegaconf import OmegaConf

from bn_lightning import evaluate, export, landscape, predict, report, train
from bn_lightning.sweeps.analysis.trials import rows_from_csv

PACKAGE = Path(__file__).parents[2] / "examples" / "own_package"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of `train`, in a copy of the package's folder."""
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(tmp_path)  # as if it were installed
    return ["--config-dir", "conf", "+experiment=spirals"]


@pytest.mark.slow
def test_every_command_takes_it(
    command: Any,  # noqa: F811
    arguments: list[str],
    tmp_path: Path,
) -> None:
    accuracy = {}
    for norm in ("none", "batch"):
        run = command(train.main, *arguments, f"norm={norm}", "trainer.max_steps=200")
        assert run.code == 0, run.err
        record = json.loads((run.directory / "run.json").read_text())
        assert record["status"] == "completed" and record["data"]["source"] == "spirals"
        accuracy[norm] = record["metrics"]["test/accuracy"]
        assert "gradient_norm" in (run.directory / "metrics.csv").read_text().partition("\n")[0]
    assert accuracy["batch"] > 0.9 > 0.5 < accuracy["none"]

    best = f"ckpt_path={run.directory}/checkpoints/best.ckpt"
    refused = command(evaluate.main, best)
    assert refused.code == 1 and "'trusted=[spirals.]'" in refused.err
    best_and_trust = [best, "trusted=[spirals.]"]
    tested = command(evaluate.main, *best_and_trust)
    assert tested.code == 0, tested.err
    assert "test/accuracy" in tested.out
    exported = command(export.main, *best_and_trust, "output=spirals.pt2")
    assert exported.code == 0, exported.err
    program = torch.export.load(tmp_path / "spirals.pt2").module()
    assert program(torch.zeros(5, 2)).shape == (5, 2)
    seen = command(landscape.main, *best_and_trust, "points=5", "batches=1")
    assert seen.code == 0, seen.err
    labelled = command(predict.main, *best_and_trust, "input=points.csv")
    assert labelled.code == 1 and "`prediction_inputs`" in labelled.err  # an option of data modules

    few = ["trainer.max_steps=10", "trainer.val_check_interval=10", "optimizer.lr=0.1,1"]
    sweep = command(train.main, "-m", *arguments, "+sweep=spirals", *few)
    assert sweep.code == 0, sweep.err
    repeat = next(line for line in sweep.out.splitlines() if " --config-dir conf +exp" in line)
    assert "norm=" in repeat and "optimizer.lr=" in repeat

    for source, is_sweep in (("logs/spirals/runs", False), (str(sweep.directory), True)):
        reported = command(report.main, source, "--output", f"report-{is_sweep}")
        assert reported.code == 0, reported.err
        rows = rows_from_csv((tmp_path / f"report-{is_sweep}" / "trials.csv").read_text())
        assert len(rows) == (4 if is_sweep else 2)
        assert all("test/accuracy" in row.attributes for row in rows)


def test_it_is_whole() -> None:
    packages = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")}
    assert folders == set(packages["packages"])
    for path in PACKAGE.rglob("*.yaml"):
        for key, value in OmegaConf.to_container(OmegaConf.load(path), resolve=False).items():
            if key == "_target_" and value.startswith("spirals."):
                _, module, name = value.split(".")
                assert f"class {name}(" in (PACKAGE / "spirals" / f"{module}.py").read_text()
