"""What every test shares: the device, and Triton's interpreter where there is no GPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState, create_trial

if not torch.cuda.is_available():
    # Read by Triton when it is imported, so it is set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """The name "cuda" where there is a GPU, else "cpu", where Triton interprets its kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def grid_accuracy(arm: str, init: float, lr: float, seed: int) -> float:
    """Of a made-up grid: with normalisation three of four rates train, without one or none."""
    if arm == "batch":
        return 0.95 if lr < 10 else 0.1
    return 0.93 + seed / 1000 if (init, lr) == (0.1, 1.0) else 0.1


GRID: dict[str, list[Any]] = {
    "optimizer.lr": [0.01, 0.1, 1.0, 10.0],
    "init.std": [0.01, 0.1],
    "norm": ["none", "batch"],
    "seed": [1, 2, 3],
}


@pytest.fixture
def make_study() -> Callable[..., Path]:
    """Writes the journal of a sweep over `GRID` into a directory, and returns the directory.

    `make_study(directory, skip=..., change=..., name=..., space=...)`: `skip(params)` leaves a
    trial out, `change(number, params)` replaces arguments of `create_trial`, a list of them makes
    several trials of one point.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(
        directory: Path,
        skip: Callable[[dict[str, Any]], bool] = lambda params: False,
        change: Callable[[int, dict[str, Any]], Any] = lambda number, params: {},
        name: str = "sweep",
        space: dict[str, list[Any]] | None = None,
    ) -> Path:
        space = space or GRID
        directory.mkdir(parents=True, exist_ok=True)
        points: list[dict[str, Any]] = [{}]
        for key, values in space.items():
            points = [{**point, key: value} for point in points for value in values]
        distributions = {key: CategoricalDistribution(values) for key, values in space.items()}
        trials: list[Any] = []
        for params in points:
            if skip(params):
                continue
            accuracy = 0.5
            if space.keys() == GRID.keys():
                accuracy = grid_accuracy(
                    params["norm"], params["init.std"], params["optimizer.lr"], params["seed"]
                )
            changes = change(len(trials), params)
            for changed in changes if isinstance(changes, list) else [changes]:
                attributes = {
                    "test/accuracy": accuracy,
                    "test/loss": 2.5 * (1 - accuracy),
                    "val/accuracy": accuracy,
                    "diverged": False,
                    "directory": str(directory.absolute() / str(len(trials))),
                    "seconds": 2.0,
                }
                arguments: dict[str, Any] = {
                    "params": params,
                    "distributions": distributions,
                    "state": TrialState.COMPLETE,
                    "value": accuracy,
                    "user_attrs": attributes,
                }
                arguments |= changed
                if arguments["state"] != TrialState.COMPLETE:
                    arguments["value"] = None
                trials.append(create_trial(**arguments))
        storage = JournalStorage(JournalFileBackend(str(directory / "journal.log")))
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        study.add_trials(trials)
        return directory

    return make
