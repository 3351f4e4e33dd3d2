"""SIGKILL at random moments of a run's whole life: nothing torn is read, nothing is lost."""

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from forked import Forked
from run_process import SMALL, check_same_end, check_whole, finish, run, start

from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.record import read_run
from bn_lightning.train import main

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]

STEPS = 200
ARGUMENTS = (*SMALL, f"trainer.max_steps={STEPS}")
SEED = 8


class Chain:
    """One run after another: each is killed, and the next goes on where it stopped."""

    def __init__(self, folder: Path, whole: Path, seconds: float) -> None:
        self.folder, self.whole, self.seconds = folder, whole, seconds
        self.training = read_run(whole)["seconds"]
        self.random = random.Random(SEED)
        self.where: Counter[str] = Counter()
        self.finished = 0

    @property
    def kills(self) -> int:
        return sum(self.where.values())

    def start(self) -> subprocess.Popen[str]:
        goes_on = list(self.folder.glob("logs/*/runs/*/checkpoints/last.ckpt"))
        return start(self.folder, *ARGUMENTS, *["ckpt_path=last"] * bool(goes_on))

    def last_time(self) -> int:
        return max((p.stat().st_mtime_ns for p in self.folder.rglob("last.ckpt")), default=0)

    def kill_one(self) -> None:
        """Kills while it starts, one time in three, else once it trains and writes checkpoints."""
        before = self.last_time()
        process = self.start()
        if self.random.random() < 1 / 3:
            moment = self.random.uniform(0, self.seconds - self.training)
        else:
            while process.poll() is None and self.last_time() == before:
                time.sleep(0.001)
            moment = self.random.uniform(0, self.training / 2)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        _, err = process.communicate()
        assert code in (0, -signal.SIGKILL), err
        runs = list(self.folder.glob("logs/*/runs/*"))
        for directory in runs:
            check_whole(directory)
        if any(read_run(p.parent)["status"] == "completed" for p in self.folder.rglob("run.json")):
            if code:
                self.where["after its end"] += 1
                print(f"killed after {moment:.2f} s: at its end")
            self.check_end()
            return
        assert code, "the run ended and its run.json does not say so"
        lasts = [directory / "checkpoints/last.ckpt" for directory in runs]
        steps = max((load_checkpoint(p)["global_step"] for p in lasts if p.exists()), default=0)
        parts = len(list(self.folder.rglob("*.part")))
        place = {0: "before a checkpoint", STEPS: "after the last"}.get(steps, "in training")
        self.where[place] += 1
        print(f"killed after {moment:.2f} s: at step {steps}, {parts} files not whole")

    def end(self) -> None:
        """Lets the last run come to its end, or a new one if all were killed before they began."""
        finish(self.start())
        self.check_end()

    def check_end(self) -> None:
        (directory,) = (
            path.parents[1] for path in self.folder.glob("logs/*/runs/*/checkpoints/last.ckpt")
        )
        check_whole(directory)
        check_same_end(self.whole, directory)
        assert not list(directory.rglob("*.part"))
        self.finished += 1
        shutil.rmtree(self.folder / "logs")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments(tmp_path, kills):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    began = time.perf_counter()
    whole = run(tmp_path / "whole", *ARGUMENTS)
    chain = Chain(tmp_path / "killed", whole, time.perf_counter() - began)
    print(f"seed {SEED}, a whole run takes {chain.seconds:.2f} s")
    while chain.kills < kills:
        chain.kill_one()
    chain.end()
    print(f"{chain.kills} kills: {dict(chain.where)}; {chain.finished} runs ended as the whole one")
    assert chain.finished >= 1


# Moments too short to be met by chance.
KILLED = {
    "before the last row": "MetricsCSVLogger.log_metrics = lambda self, metrics, step: "
    "kill() if step == 5 else log(self, metrics, step)",
    "before the test": "Trainer.test = kill",
    "after the test": "RunRecord.end = kill",
}

SCRIPT = """
import os, signal
from lightning import Trainer
from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.record import RunRecord
from bn_lightning.train import main
log = MetricsCSVLogger.log_metrics
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    return run(tmp_path_factory.mktemp("five"), *ARGUMENTS, "trainer.max_steps=5")


@pytest.mark.parametrize("moment", KILLED)
def test_killed_about_the_last_step(tmp_path, five_steps, command, moment):
    (tmp_path / "killed.py").write_text(f"{SCRIPT}{KILLED[moment]}\nmain()\n")
    arguments = (*ARGUMENTS, "trainer.max_steps=5")
    killed = Forked("killed", arguments, tmp_path)
    finish(killed, code=-signal.SIGKILL)
    (directory,) = tmp_path.glob("logs/*/runs/*")
    check_whole(directory)
    result = command(main, *arguments, "ckpt_path=last")
    assert result.code == 0, result.err
    assert result.directory == directory
    check_same_end(five_steps, directory)
