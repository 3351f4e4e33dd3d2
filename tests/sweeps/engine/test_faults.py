"""If a worker, the storage or the command is killed, no trial is lost or run twice.

`FAULT_REPETITIONS=5 pytest tests/sweeps/engine/test_faults.py` repeats each.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from bn_lightning.sweeps.engine.storage import open_storage, storage_url

REPETITIONS = int(os.environ.get("FAULT_REPETITIONS", "1"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="finds worker processes in Linux's /proc"
    ),
]


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize(
    "kind", ["journal", "postgresql", pytest.param("sqlite", marks=pytest.mark.soak)]
)
def test_60_trials_over_4_workers(program, kind, repetition, request, tmp_path):
    """In odd repetitions the main process is killed, too."""
    server = request.getfixturevalue("postgresql") if kind == "postgresql" else None
    name = f"faults{repetition}"
    storage = {"journal": "journal", "sqlite": f"sqlite:///{tmp_path}/study.db"}.get(kind)
    storage = storage or server.url("${oc.env:QUOTED_PASSWORD}")
    chance = random.Random(f"{kind} {repetition}")
    arguments = [
        "-m",
        "x=range(10)",
        "y=range(6)",
        "seconds=0.1",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=null",
        "hydra.sweeper.n_jobs=4",
        f"hydra.sweeper.storage={storage}",
        f"hydra.sweeper.study_name={name}",
        "hydra.sweeper.heartbeat=1",
        "hydra.sweeper.stale_after=6",
    ]
    process = program.start(*arguments)
    while process.poll() is None and len(workers := workers_of(process.pid)) < 4:
        time.sleep(0.05)
    sweep = program.folder / "sweep"
    while process.poll() is None and not list(sweep.glob("*/outcome.json")):
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 2))
    os.kill(chance.choice(workers), signal.SIGKILL)
    if server is not None:
        time.sleep(chance.uniform(0, 1))
        server.kill()
        time.sleep(chance.uniform(0.5, 2))
        server.start()
    if repetition % 2:
        time.sleep(chance.uniform(0, 2))
        process.kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode in ((0, -signal.SIGKILL) if repetition % 2 else (0,)), output
    again = program.run(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "60 of 60 trials: 60 complete" in again.stdout

    url = storage_url(storage if server is None else server.url(), sweep)
    reader = open_storage(url, 5)
    trials = optuna.load_study(study_name=name, storage=reader).trials
    reader.close()
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    points = Counter((trial.params["x"], trial.params["y"]) for trial in complete)
    assert len(complete) == 60
    assert len(points) == 60
    assert all((sweep / str(trial.number) / "outcome.json").exists() for trial in complete)
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "FAIL"}
    if server is not None:
        for name in ("PGPASSWORD", "QUOTED_PASSWORD"):
            secret = os.environ[name]
            for path in program.folder.rglob("*"):
                assert path.is_dir() or secret.encode() not in path.read_bytes()
            assert secret not in output + again.stdout + again.stderr
