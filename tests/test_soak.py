"""What runs for long keeps its memory, its files and its processes: `pytest -m soak -s`."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc"),
]

EVERY_SECONDS = 0.5


class Sample(NamedTuple):
    """Of a process, at one time: its memory, what it has open, its children.

    The memory is what it has itself written, swapped out or not: pages of mapped libraries come and
    go as the system likes, by hundreds of MiB.
    """

    memory_mib: float
    open_files: int
    children: int
    zombies: int


def sample(pid: int) -> Sample:
    """What /proc says of it now."""
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    kibibytes = sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem", "VmSwap"))
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # ended in between
            continue
        if int(parent) == pid:
            states.append(state)
    return Sample(
        kibibytes / 2**10,
        len(list((process / "fd").iterdir())),
        len(states),
        states.count("Z"),
    )


def watched(command: list[str], folder: Path) -> list[Sample]:
    """Runs a command of this project in `folder` to its end, and samples its process."""
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    samples = []
    while process.poll() is None:
        try:
            samples.append(sample(process.pid))
        except (OSError, KeyError):  # ended in between: nothing of it, or no memory
            break
        time.sleep(EVERY_SECONDS)
    assert process.wait() == 0, (folder / "output.txt").read_text()[-3000:]
    return samples


def check_steady(samples: list[Sample], name: str) -> None:
    """From the second tenth to the last one: nothing grows by more than 5%, or at all."""
    tenth = len(samples) // 10
    assert tenth >= 10, f"only {len(samples)} samples"
    warm, last = samples[tenth : 2 * tenth], samples[-tenth - 2 : -2]  # the end closes files

    def median(part: list[Sample], field: str) -> float:
        return statistics.median(getattr(s, field) for s in part)

    growth = median(last, "memory_mib") / median(warm, "memory_mib") - 1
    print(
        f"\n{name}: {len(samples)} samples, {median(warm, 'memory_mib'):.0f} MiB, growth"
        f" {growth:.2%}, open files {median(warm, 'open_files'):.0f} to"
        f" {median(last, 'open_files'):.0f}, children at most {max(s.children for s in samples)},"
        f" zombies at most {max(s.zombies for s in samples)}"
    )
    assert growth <= 0.05
    assert median(last, "open_files") <= median(warm, "open_files")
    # A child that has just ended is one until it is waited for.
    assert median(samples, "zombies") == 0 and samples[-2].zombies == 0


def test_2000_trials_in_one_process(tmp_path: Path) -> None:
    trials = 2000
    samples = watched(
        ["bn_lightning.train", "-m", "+experiment=mnist_bn", "data=digits",
         "hydra/sweeper=bn_optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.n_jobs=1",
         f"hydra.sweeper.n_trials={trials}", "optimizer.lr=tag(log, interval(0.01, 1))",
         "trainer.max_steps=1", "trainer.val_check_interval=1"],
        tmp_path,
    )  # fmt: skip
    assert len(list(tmp_path.glob("logs/mnist_bn/sweeps/*/*/run.json"))) == trials
    check_steady(samples, f"{trials} trials")


def test_50000_steps_with_every_callback(tmp_path: Path) -> None:
    callbacks = "[default,batch_norm_monitor,precise_batch_norm,fused_batch_norm,steps_to_accuracy]"
    samples = watched(
        ["bn_lightning.train", "+experiment=mnist_bn", "data=digits", f"callbacks={callbacks}",
         "trainer.max_steps=50000", "trainer.val_check_interval=500",
         "callbacks.batch_norm_monitor.every_n_steps=10", "hydra.run.dir=run"],
        tmp_path,
    )  # fmt: skip
    assert (tmp_path / "run" / "figures" / "percentiles.png").exists()
    check_steady(samples, "50,000 steps")
