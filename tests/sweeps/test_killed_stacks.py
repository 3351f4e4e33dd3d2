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
    *("-m", "+experiment=mnist_bn", "+sweep=lr_init", "data=digits", "norm=batch"),
    *("init.std=0.1", "trainer.max_steps=60", "trainer.val_check_interval=30"),
    *("hydra.launcher.batch=6", "hydra.sweeper.heartbeat=1", "hydra.sweeper.stale_after=4"),
)


def killed(sweep, seeds, workers, chance, longest):
    """Start the sweep, kill it some seconds after it has written to the journal, and return None.

    At times a worker is killed first, which the sweep replaces, or workers outlive the sweep. If
    the sweep ends before, return its output.
    """
    journal = sweep / "journal.log"
    size = journal.stat().st_size if journal.exists() else 0
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bn_lightning.train", *ARGUMENTS]
    command += [f"seed={','.join('123456789'[:seeds])}"]
    command += [f"hydra.sweep.dir={sweep}", f"hydra.sweeper.n_jobs={workers}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
        time.sleep(0.05)
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
    ("kills", "seeds", "longest"),
    [pytest.param(3, 2, 1, marks=pytest.mark.slow), pytest.param(20, 9, 4, marks=pytest.mark.soak)],
)
def test_no_trial_is_lost_and_none_is_twice(tmp_path, kills, seeds, longest):
    n_trials = 11 * seeds
    chance = random.Random(kills)
    sweep = tmp_path / "sweep"
    ended = [killed(sweep, seeds, chance.choice([1, 2]), chance, longest) for _ in range(kills)]
    assert ended.count(None) >= kills / 2  # the last ones may come too late
    output = killed(sweep, seeds, 1, chance, 1_000_000)
    assert output is not None and f"{n_trials} of {n_trials} trials: {n_trials} complete" in output
    storage = open_journal(sweep / "journal.log")
    (study,) = storage.get_all_studies()
    trials = storage.get_all_trials(study._study_id)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    points = Counter(tuple(sorted(trial.params.items())) for trial in complete)
    assert len(points) == n_trials and set(points.values()) == {1}
    for trial in complete:
        record = json.loads((sweep / str(trial.number) / "run.json").read_text())
        assert record["steps"] == 60 or record["status"] == "diverged"
        assert (sweep / str(trial.number) / "checkpoints" / "last.ckpt").exists()
