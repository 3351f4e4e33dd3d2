"""Sweeps that prune within stacks, stopped in the middle of a batch, and the command again."""

import json
import signal
import time
from collections import Counter

import optuna
import pytest
from run_process import SMALL, finish, start

from bn_lightning.runs.record import read_run
from bn_lightning.sweeps.engine.storage import open_storage, storage_url

pytestmark = pytest.mark.slow

RATES = (0.3, 0.1, 1e-6, 1.0, 1e-5, 1e-4)  # of both batches of three, one is pruned at least
SWEEP = (
    "-m",
    *SMALL[:3],
    "trainer.val_check_interval=20",
    "trainer.max_steps=2000",  # a signal comes before the end on a fast machine, too
    "~callbacks.activation_percentiles",
    "extras.figures=false",
    f"optimizer.lr={','.join(map(str, RATES))}",
    *("hydra/sweeper=bn_optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null"),
    *("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=2"),
    *("hydra/launcher=bn_stack", "hydra.sweeper.study_name=pruned"),
)


def trials_in(directory):
    storage = open_storage(storage_url("journal", directory), 5)
    return optuna.load_study(study_name="pruned", storage=storage).trials


def wait_for_a_pruned_run(directory, process):
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        for path in directory.glob("*/run.json"):
            if json.loads(path.read_text())["status"] == "pruned":
                return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("signals", "batch", "lost"),
    [
        ([signal.SIGKILL], 6, 6),
        ([signal.SIGINT, signal.SIGINT], 6, 6),
        pytest.param([signal.SIGINT], 3, 0, marks=pytest.mark.soak),
    ],
    ids=["killed", "interrupted_twice", "interrupted_once"],
)
def test_nothing_is_lost_or_counted_twice(tmp_path, signals, batch, lost):
    directory = tmp_path / "logs" / "mnist_bn" / "sweeps" / "pruned"
    arguments = (*SWEEP, f"hydra.launcher.batch={batch}")
    process = start(tmp_path, *arguments)
    wait_for_a_pruned_run(directory, process)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(120)
    assert process.returncode != 0
    finish(start(tmp_path, *arguments))
    trials = trials_in(directory)
    states = Counter(trial.state.name for trial in trials)
    # The second signal may come when some trials of the batch have been told already.
    assert states["FAIL"] in (range(1, lost + 1) if len(signals) == 2 else (lost,))
    assert len(trials) == states["FAIL"] + len(RATES)
    ended = [trial for trial in trials if trial.state.name != "FAIL"]
    assert sorted(trial.params["optimizer.lr"] for trial in ended) == sorted(RATES)
    assert "PRUNED" in states and "COMPLETE" in states
    for trial in ended:
        record = read_run(trial.user_attrs["directory"])
        assert record["steps"] == trial.last_step
        if trial.state.name == "PRUNED":
            assert record["status"] == "pruned"
            assert trial.user_attrs["pruned_at"] == trial.last_step == record["pruned_at"]
            assert trial.value == trial.intermediate_values[trial.last_step]
        else:
            assert record["status"] == "completed" and record["steps"] == 2000
