"""`ckpt_path=best` after a sweep: the checkpoint of its best trial, not of its newest."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from optuna.trial import TrialState

from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.runs.directory import BEST

SPACE = {"optimizer.lr": [0.1, 1.0, 10.0]}
VALUES = [0.7, 0.9, 0.8]


def write_checkpoints(directories: list[Path], age: int) -> None:
    """Write a best.ckpt into each directory, the last one the newest."""
    for i, directory in enumerate(directories):
        path = directory / BEST
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age + i, 1e9 - age + i))


def checkpoint(logs: Path, name: str = "best") -> str:
    return checkpoint_path(OmegaConf.create({"ckpt_path": name, "paths": {"log_dir": str(logs)}}))


@pytest.mark.parametrize(("direction", "number"), [("maximize", 1), ("minimize", 0)])
def test_of_a_sweep_it_is_the_best_trials(
    make_study: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    direction: str,
    number: int,
) -> None:
    sweep = make_study(
        tmp_path / "task" / "sweeps" / "quick",
        space=SPACE,
        direction=direction,
        change=lambda i, params: {"value": VALUES[i], "user_attrs": {"directory": str(i)}},
    )
    write_checkpoints([tmp_path / "task" / "runs" / "before"], age=100)
    write_checkpoints([sweep / str(i) for i in range(3)], age=50)
    path = str(sweep / str(number) / BEST)
    assert checkpoint(tmp_path) == path
    out = capsys.readouterr().out
    assert out.startswith(f"checkpoint: {path}, of trial {number}, the best of its sweep: ")
    assert str(VALUES[number]) in out
    # A run that is newer than the sweep is the one that is meant.
    newer = tmp_path / "task" / "runs" / "after"
    write_checkpoints([newer], age=0)
    assert checkpoint(tmp_path) == str(newer / BEST)
    assert capsys.readouterr().out == f"checkpoint: {newer / BEST}\n"


def failed(number: int, params: Any) -> dict[str, Any]:
    return {"state": TrialState.FAIL}


def best_without_a_checkpoint(number: int, params: Any) -> dict[str, Any]:
    return {"value": 1.0, "user_attrs": {"directory": "elsewhere"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (failed, "got none that is complete; give the path"),
        (best_without_a_checkpoint, "got trial 0 without .*elsewhere"),
        (None, "got no study in its directory"),
    ],
    ids=["no_trial", "no_checkpoint", "no_study"],
)
def test_a_sweep_without_a_best_trial_is_refused(
    make_study: Callable[..., Path], tmp_path: Path, change: Any, words: str
) -> None:
    sweep = tmp_path / "task" / "sweeps" / "quick"
    if change is not None:
        make_study(sweep, space=SPACE, change=change)
    write_checkpoints([sweep / "0"], age=0)
    with pytest.raises(ValueError, match=f"`ckpt_path=best`.*{words}"):
        checkpoint(tmp_path)
