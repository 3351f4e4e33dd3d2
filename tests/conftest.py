"""What every test shares: the device, and Triton's interpreter where there is no GPU."""

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when it is imported, so it is set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes has one core, and so has what it starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# Loggers that would otherwise send something, to be set before they are imported.
os.environ |= {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spreads the modules that have slow tests evenly over the list, each module in one piece.

    Several processes are dealt runs of hundreds of tests, and the slow ones lie side by side in a
    few directories: one process would be left alone with them.
    """
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    slow = {path for path in modules if any(map(_is_slow, modules[path]))}
    quick_count = sum(len(modules[path]) for path in modules.keys() - slow)
    places: dict[Path, float] = {}  # each module's place in the list, from 0 to 1
    seen = 0
    for path, tests in modules.items():
        if path in slow:
            places[path] = sum(other in slow for other in places) / len(slow)
        else:
            places[path] = seen / quick_count
            seen += len(tests)
    items[:] = [item for path in sorted(modules, key=places.__getitem__) for item in modules[path]]


def pytest_collection_finish() -> None:
    """Spares each collection of garbage a look at what was collected for all tests."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Gives each test the same random numbers, whichever tests ran before it in its process."""
    torch.manual_seed(0)


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Spares Triton's interpreter what it repeats without need."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from quick_interpreter import speed_up_interpreter

        speed_up_interpreter()


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


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Path]:
    """Writes the journal of a sweep over `GRID` into a directory, and returns the directory.

    `make_study(directory, skip=..., change=..., name=..., space=..., direction=...)`:
    `skip(params)` leaves a trial out, `change(number, params)` replaces arguments of
    `create_trial`, a list of them makes several trials of one point.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(
        directory: Path,
        skip: Callable[[dict[str, Any]], bool] = lambda params: False,
        change: Callable[[int, dict[str, Any]], Any] = lambda number, params: {},
        name: str = "sweep",
        space: dict[str, list[Any]] | None = None,
        direction: str = "maximize",
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
        study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        study.add_trials(trials)
        return directory

    return make


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Writes what the report reads of a run into a new directory, and returns the directory.

    `make_run(directory, norm, lr=1.0, seed=1, spread=4.0)`: `norm` is its configuration's, and the
    percentiles of its activations grow by the factor `spread`.
    """

    def make(
        directory: Path, norm: Any, lr: float = 1.0, seed: int = 1, spread: float = 4.0
    ) -> Path:
        # Here, as the tests of the kernels run where Lightning is not installed.
        from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
        from bn_lightning.runs.record import RunRecord

        directory.mkdir(parents=True)
        trainer = {"max_steps": 2}
        config = {"norm": norm, "seed": seed, "optimizer": {"lr": lr}, "trainer": trainer}
        RunRecord(directory, config).end(
            "completed",
            data={"source": "mnist"},
            steps=2,
            steps_per_second=100.0,
            metrics={"test/accuracy": 0.9},
        )
        logger = MetricsCSVLogger(directory)
        for step, half in ((0, 1.0), (2, spread)):
            percentiles = {f"activation/p{p}": s * half for p, s in ((15, -1), (50, 0), (85, 1))}
            logger.log_metrics({"test/accuracy": 0.9, "test/loss": 0.3, **percentiles}, step)
        logger.save()
        return directory

    return make


@pytest.fixture(scope="module")
def empty_pictures() -> Iterator[None]:
    """Writes empty files instead of the pictures of runs and reports, which take most time."""
    from bn_lightning.sweeps.report import run_figures, write_report

    def save(figure: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            path.with_name(f"{path.name}.{suffix}").touch()

    with pytest.MonkeyPatch.context() as patch:
        for module in (run_figures, write_report):
            patch.setattr(module, "save", save)
        yield


@pytest.fixture
def pictures(empty_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the pictures all the same."""
    from bn_lightning.sweeps.report import run_figures, write_report
    from bn_lightning.sweeps.report.matplotlib_renderer import save

    for module in (run_figures, write_report):
        monkeypatch.setattr(module, "save", save)
