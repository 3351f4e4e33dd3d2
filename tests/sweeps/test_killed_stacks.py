"""A sweep of stacks that is killed at any moment and started again loses no trial."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from bn_lightning.sweeps.engine.journal_file import open_journal

ARGUMENTS = (
    *("-m", "+experiment=mnist_bn", "+sweep=lr_init", "data=digits", "norm=batch", "seed=1,2"),
    *("init.std=0.1", "trainer.max_steps=60", "trainer.val_check_interval=30"),
    *("hydra.launcher.batch=6", "hydra.sweeper.heartbeat=1", "hydra.sweeper.stale_after=4"),
)
TRIALS = 22


def killed(sweep, workers, chance, longest):
    """Start the sweep, kill it after some time with all its workers, and return whether it ended.

    One of three kills is of one worker only, which the sweep replaces.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bn_lightning.train", *ARGUMENTS]
    command += [f"hydra.sweep.dir={sweep}", f"hydra.sweeper.n_jobs={workers}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=chance.uniform(0, longest))
    except subprocess.TimeoutExpired:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = [int(child) for child in file.read().split()]
        if children and chance.random() < 1 / 3:
            os.kill(chance.choice(children), signal.SIGKILL)
            time.sleep(chance.uniform(0, longest / 4))
        process.kill()  # its workers end after their batch, when their standard input is closed
        for child in children:
            if chance.random() < 0.5:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        process.communicate()
        return None
    assert process.returncode == 0, output
    return output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds workers in Linux's /proc")
@pytest.mark.parametrize(
    "kills",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.soak)],
)
def test_no_trial_is_lost_and_none_is_twice(tmp_path, kills):
    chance = random.Random(kills)
    sweep = tmp_path / "sweep"
    for _ in range(kills):
        # Long enough for the first batches of a resumed sweep, short enough to be in one.
        if killed(sweep, chance.choice([1, 2]), chance, 20) is not None:
            break
    output = killed(sweep, 1, chance, 10_000)
    assert output is not None and f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in output
    storage = open_journal(sweep / "journal.log")
    (study,) = storage.get_all_studies()
    trials = storage.get_all_trials(study._study_id)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    points = Counter(tuple(sorted(trial.params.items())) for trial in complete)
    assert len(points) == TRIALS and set(points.values()) == {1}
    for trial in complete:
        record = json.loads((sweep / str(trial.number) / "run.json").read_text())
        assert record["steps"] == 60 or record["status"] == "diverged"
        assert (sweep / str(trial.number) / "checkpoints" / "last.ckpt").exists()
