"""Two processes at the same run, or at the same checkpoint."""

import fcntl
import os
import shutil
import threading
import time

import pytest
from run_process import SMALL, check_same_end, check_whole, finish, one_line_error, start

from bn_lightning.evaluate import main as evaluate
from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.record import read_run
from bn_lightning.train import main

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]

ARGUMENTS = (*SMALL, "trainer.max_steps=5")


def test_two_runs_in_the_same_directory(tmp_path, command):
    """Whoever is first has it to the end, and nothing in it is the other's."""
    processes = {
        seed: start(tmp_path, *ARGUMENTS, f"seed={seed}", "hydra.run.dir=one") for seed in (1, 2)
    }
    for process in processes.values():
        process.wait(timeout=200)
    (first,) = (seed for seed, process in processes.items() if process.returncode == 0)
    finish(processes.pop(first))
    ((_, second),) = processes.items()
    _, err = finish(second, code=1)
    assert "is at work in another process" in one_line_error(err) or "without a run" in err
    alone = command(main, *ARGUMENTS, f"seed={first}").directory
    assert f"seed={first}" in (tmp_path / "one/.hydra/overrides.yaml").read_text()
    check_same_end(alone, tmp_path / "one")

    again = command(main, *ARGUMENTS, "seed=2", "hydra.run.dir=one")
    assert again.code == 1
    assert "to be a directory without a run" in one_line_error(again.err)
    check_same_end(alone, tmp_path / "one")


def test_a_run_at_work_is_not_resumed(command):
    directory = command(main, *ARGUMENTS).directory
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        result = command(main, *ARGUMENTS, "trainer.max_steps=7", "ckpt_path=last")
    finally:
        os.close(lock)
    assert result.code == 1
    assert "is at work in another process" in one_line_error(result.err)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert command(main, *ARGUMENTS, "trainer.max_steps=7", "ckpt_path=last").code == 0


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.soak)])
def test_evaluated_while_it_is_replaced(tmp_path, command, rounds):
    results = {}
    for seed in (1, 2):
        directory = command(main, *ARGUMENTS, f"seed={seed}").directory
        shutil.copy(directory / "checkpoints/last.ckpt", tmp_path / f"{seed}.ckpt")
        results[seed] = read_run(directory)["metrics"]["test/loss"]
    assert results[1] != results[2]
    target = tmp_path / "one.ckpt"
    shutil.copy(tmp_path / "1.ckpt", target)
    ended, replaced = threading.Event(), []

    def replace():
        while not ended.is_set():
            seed = 1 + len(replaced) % 2
            shutil.copy(tmp_path / f"{seed}.ckpt", tmp_path / "next")
            os.replace(tmp_path / "next", target)
            replaced.append(seed)
            time.sleep(0.001)

    thread = threading.Thread(target=replace)
    thread.start()
    seen = []
    try:
        for _ in range(rounds):
            both = [start(tmp_path, f"ckpt_path={target}", command="evaluate") for _ in range(2)]
            for process in both:
                out, _ = finish(process)
                seen.append(read_run(out.strip().splitlines()[-1]))
        for _ in range(5):
            done = command(evaluate, f"ckpt_path={target}")
            assert done.code == 0, done.err
            seen.append(read_run(done.directory))
        for _ in range(100):
            load_checkpoint(target)
    finally:
        ended.set()
        thread.join()
    assert len(replaced) > 100
    for record in seen:
        assert record["metrics"]["test/loss"] in results.values()
    print(f"{len(seen)} evaluations, 100 more readings, {len(replaced)} replacements")
    check_whole(tmp_path)
