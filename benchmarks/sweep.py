"""Measure the overhead of a trial, the cost of a long study, and the gain of a second worker.

    python benchmarks/sweep.py trial [--trials 20]       # one step, compared to a plain function
    python benchmarks/sweep.py study [--sizes 100 10000] # start, ask and tell
    BN_LIGHTNING_DATA=DIR python benchmarks/sweep.py workers [--trials 16] [--steps 2000]

Each command prints its results and appends them to results/sweep.csv with the load of the machine.
Measure on an idle machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from rows import append_rows

from bn_lightning.runs.machine import git_commit, hardware, package_versions
from bn_lightning.sweeps.engine.creation import create_study
from bn_lightning.sweeps.engine.outcome import Outcome
from bn_lightning.sweeps.engine.sampling import SamplingPlan, make_pruner
from bn_lightning.sweeps.engine.space import Space
from bn_lightning.sweeps.engine.storage import open_storage, storage_url
from bn_lightning.sweeps.engine.stored_names import SLOT
from bn_lightning.sweeps.engine.study import FailurePolicy, SweepStudy

RESULTS = Path(__file__).parent / "results" / "sweep.csv"
GRID = "hydra/sweeper/sampler=grid"
KEY, NAME = "optimizer.lr", "sweep"
SPACE = Space({KEY: FloatDistribution(0, 1)})
SWEEP = ["-m", "+experiment=mnist_bn", "hydra/sweeper=bn_optuna"]


def trial(n_trials: int) -> dict[str, float]:
    """Return the seconds of a trial of one step, and of a plain function with the same work."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"seed=range(1,{n_trials + 1})"
        _sweep(
            folder,
            GRID,
            "data=digits",
            "trainer.max_steps=1",
            "trainer.val_check_interval=1",
            seeds,
        )
        study = optuna.load_study(
            study_name=NAME, storage=open_storage(storage_url("journal", _directory(folder)), 5)
        )
        ends = [t.datetime_complete for t in study.trials if t.datetime_complete is not None]
    between = [(b - a).total_seconds() for a, b in zip(ends, ends[1:], strict=False)]
    # Without the first three, which import modules and warm up.
    sweep, bare = statistics.median(between[3:]), statistics.median(_bare(n_trials)[3:])
    return {"sweep_s": sweep, "bare_s": bare, "overhead_s": sweep - bare}


def _bare(repeats: int) -> list[float]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from bn_lightning.data import DigitsDataModule

    torch.set_num_threads(1)
    data = DigitsDataModule(60, 2500, 1 / 12, seed=1)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        data.setup("fit")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in in (784, 100, 100):
            layers += [nn.Linear(fan_in, 100), nn.BatchNorm1d(100), nn.Sigmoid()]
        network = nn.Sequential(*layers, nn.Linear(100, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        x, target = next(iter(data.train_dataloader()))
        F.cross_entropy(network(x), target).backward()
        optimizer.step()
        network.eval()
        with torch.no_grad():
            for batches in (data.val_dataloader(), data.test_dataloader()):
                for inputs, labels in batches:
                    F.cross_entropy(network(inputs), labels).item()
        seconds.append(time.perf_counter() - started)
    return seconds


def study(sizes: list[int], sampler: str) -> dict[str, float]:
    """Return seconds for studies with a given number of finished trials.

    `command` is a whole command without a trial to run; `load`, a part of it, reads the study;
    `ask` and `tell` are those of one trial.
    """
    found: dict[str, float] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = _directory(name)
            _fill(folder, size)
            arguments = (f"{KEY}=interval(0,1)", "hydra/sweeper/sampler=random")
            _, whole = _timed(lambda n=name, a=arguments, s=size: _sweep(n, *a, n_trials=s))
            figures = {"command": whole, **_engine(folder, size, sampler)}
            found |= {f"{what}_{size}_s": seconds for what, seconds in figures.items()}
    return found


def _fill(folder: Path, size: int) -> None:
    """Create a study of finished trials with as many records as real ones."""
    storage = open_storage(storage_url("journal", folder), 5)
    description = {
        "space": {**SPACE.describe(), "custom_search_space": "None"},
        "overrides": ["+experiment=mnist_bn"],
    }
    create_study(storage, NAME, ["maximize"], description)
    study_id = storage.get_study_id_from_name(NAME)
    fsync, os.fsync = os.fsync, lambda _: None  # not measured
    for number in range(size):
        point = {KEY: (number + 0.5) / size}
        template = create_trial(
            state=TrialState.RUNNING,
            params=point,
            distributions=SPACE.distributions,
            system_attrs={SLOT: number},
        )
        trial_id = storage.create_new_trial(study_id, template)
        for attribute in range(10):
            storage.set_trial_user_attr(trial_id, f"metric {attribute}", 0.5)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [point[KEY]])
    os.fsync = fsync


def _engine(folder: Path, size: int, sampler: str, repeats: int = 20) -> dict[str, float]:
    config = {"_target_": f"optuna.samplers.{sampler}", "seed": 1}
    plan = SamplingPlan(config, SPACE, size + repeats)

    def start() -> SweepStudy:
        storage = open_storage(storage_url("journal", folder), 5)
        policy = FailurePolicy(max_retries=1, heartbeat=60, stale_after=120)
        made = SweepStudy(storage, NAME, folder, plan, make_pruner(None), policy)
        made.refresh()
        return made

    engine, loading = _timed(start)
    engine.fill()
    asking, telling = [], []
    for _ in range(repeats):
        claimed, seconds = _timed(engine.claim)
        assert claimed is not None
        asking.append(seconds)
        outcome = Outcome("COMPLETE", [0.5], {f"metric {i}": 0.5 for i in range(10)})
        telling.append(_timed(lambda c=claimed, o=outcome: engine.finish(c.number, o))[1])
    engine.close()
    return {
        "load": loading,
        "ask": statistics.median(asking),
        "tell": statistics.median(telling),
    }


def workers(n_trials: int, steps: int) -> dict[str, float]:
    """Return the seconds of a whole sweep with one worker and with two."""
    seconds = {}
    for n_jobs in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                GRID,
                f"trainer.max_steps={steps}",
                f"seed=range(1,{n_trials + 1})",
                f"hydra.sweeper.n_jobs={n_jobs}",
            ]
            seconds[n_jobs] = _timed(lambda f=folder, a=arguments: _sweep(f, *a))[1]
    return {"one_s": seconds[1], "two_s": seconds[2], "two/one": seconds[2] / seconds[1]}


def _sweep(folder: str, *overrides: str, n_trials: int | str = "null") -> None:
    subprocess.run(
        [sys.executable, "-m", "bn_lightning.train", *SWEEP, *overrides,
         f"hydra.sweeper.n_trials={n_trials}"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _directory(folder: str) -> Path:
    return Path(folder) / "logs" / "mnist_bn" / "sweeps" / "sweep"


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def main() -> None:
    """Measure, print the results, and append them to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("trial", "study", "workers"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--sampler", default="RandomSampler")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    load = os.getloadavg()[0]
    if arguments.what == "trial":
        figures = trial(arguments.trials)
    elif arguments.what == "study":
        figures = study(arguments.sizes, arguments.sampler)
    else:
        figures = workers(arguments.trials, arguments.steps)
    rows = [
        {
            "what": arguments.what,
            "figure": name,
            "value": round(value, 5),
            "load": round(load, 2),
            "cores": os.cpu_count(),
            "processor": hardware()["processor"],
            "optuna": package_versions()["optuna"],
            "date": time.strftime("%Y-%m-%d"),
            "commit": git_commit(),
        }
        for name, value in figures.items()
    ]
    for row in rows:
        print(f"{row['figure']:16} {row['value']}")
    append_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
