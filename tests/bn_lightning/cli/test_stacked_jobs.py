"""`hydra/launcher=bn_stack`, by the command that people type."""

import signal
import subprocess
import sys
import time

import optuna
import pytest
import torch

from bn_lightning.runs.record import read_run
from bn_lightning.sweeps.engine.storage import open_storage, storage_url
from bn_lightning.train import main

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

SHORT = (
    "+experiment=mnist_bn",
    "data=digits",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "callbacks=none",
    "extras.figures=false",
    "hydra/launcher=bn_stack",
)
WITH_CALLBACKS = tuple(text for text in SHORT if text != "callbacks=none")


def test_hydras_own_sweeper_gets_stacks(command, tmp_path):
    folder = tmp_path / "there"
    result = command(main, "-m", *SHORT, "norm=none,batch", "seed=1,2", f"hydra.sweep.dir={folder}")
    assert result.code == 0, result.err
    assert result.out.count("2 jobs as one stack") == 2
    for number in range(4):
        record = read_run(folder / str(number))
        assert record["status"] == "completed" and record["stack"]["size"] == 2
        assert record["seed"] == number % 2 + 1
        assert (folder / str(number) / ".hydra" / "config.yaml").exists()


def test_the_best_checkpoint_of_a_member_is_not_resumed(command, tmp_path):
    command(main, "-m", *WITH_CALLBACKS, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'there'}")
    member = tmp_path / "there" / "1"
    before = (member / "run.json").read_bytes()
    result = command(
        main,
        *WITH_CALLBACKS[:-1],
        "seed=2",
        "trainer.max_steps=8",
        f"ckpt_path={member}/checkpoints/best.ckpt",
    )
    assert result.code == 1 and "the optimizer's state" in result.err
    assert "of a run in a stack" in result.err and "its last.ckpt" in result.err
    assert (member / "run.json").read_bytes() == before


def test_a_value_that_no_run_takes_fails_its_own_job(command, tmp_path):
    folder = tmp_path / "there"
    values = "++optimizer.weight_decay=0.1,-1"
    result = command(main, "-m", *SHORT, values, f"hydra.sweep.dir={folder}")
    assert result.code == 1 and "weight_decay" in result.err
    assert "2 jobs one by one" in result.out
    assert read_run(folder / "0")["status"] == "completed"


def test_stacks_are_as_large_as_the_memory(command, tmp_path, monkeypatch):
    """Two members need about 8 MB, and a share of the free memory is used."""
    from bn_lightning.stack import memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 20e6)
    folder = tmp_path / "there"
    result = command(main, "-m", *SHORT, "seed=1,2,3,4", f"hydra.sweep.dir={folder}")
    assert result.code == 0, result.err
    assert "stacks of 2 jobs" in result.out
    assert [read_run(folder / str(k))["stack"]["size"] for k in range(4)] == [2] * 4


def test_jobs_that_share_nothing_run_one_by_one_and_say_why(command, tmp_path):
    folder = tmp_path / "there"
    result = command(
        main, "-m", *SHORT, "model.network.widths=[3],[4]", f"hydra.sweep.dir={folder}"
    )
    assert result.code == 0, result.err
    assert "2 jobs one by one: no other job" in result.out
    assert "stack" not in read_run(folder / "0")


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_size_that_no_stack_can_have_is_refused(command, size):
    result = command(main, "-m", *SHORT, f"hydra.launcher.size={size}", "seed=1,2")
    assert result.code == 1 and "hydra.launcher.size" in result.err


def test_the_job_that_stacks_leave_over_says_so(command, tmp_path):
    command_line = ("-m", *SHORT, f"hydra.sweep.dir={tmp_path / 'there'}", "seed=1,2,3")
    result = command(main, *command_line, "hydra.launcher.size=2")
    assert result.code == 0, result.err
    assert "2 jobs as one stack" in result.out
    assert "1 job one by one: stacks of 2 leave no other job for it" in result.out


def test_jobs_in_one_directory_are_refused(command, tmp_path):
    folder = tmp_path / "there"
    result = command(
        main, "-m", *SHORT, "seed=1,2", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=same"
    )
    assert result.code == 1 and "`hydra.sweep.subdir` to differ" in result.err
    assert not folder.exists()


@pytest.mark.parametrize("launcher", ["basic", "bn_stack"])
def test_a_multirun_does_not_write_over_another(command, tmp_path, launcher):
    folder = tmp_path / "there"
    words = ("-m", *SHORT, f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}")
    assert command(main, *words, "seed=1,2").code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = command(main, *words, "seed=3,4")
    assert result.code == 1 and "`hydra.sweep.dir` to be a directory without runs" in result.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_a_run_has_not_a_member_has_not(command, tmp_path):
    folder = tmp_path / "there"
    result = command(
        main,
        *("-m", *WITH_CALLBACKS, "seed=1,2", f"hydra.sweep.dir={folder}", "logger.csv=null"),
        *("+callbacks=early_stopping", "+callbacks.early_stopping.verbose=true"),
    )
    assert result.code == 0, result.err
    assert "2 jobs as one stack" in result.out
    assert not list(folder.rglob("metrics.csv"))


def test_an_interrupted_stack_ends_after_a_step_and_its_members_go_on(tmp_path):
    folder = tmp_path / "there"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bn_lightning.train", "-m", "+experiment=mnist_bn"),
            *("data=digits", "trainer.max_steps=100000", "trainer.val_check_interval=50"),
            *("extras.figures=false", "hydra/launcher=bn_stack", "seed=1,2"),
            f"hydra.sweep.dir={folder}",
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    files = [folder / str(k) / "metrics.csv" for k in range(2)]
    while process.poll() is None and not all(file.exists() for file in files):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    for k in range(2):
        record = read_run(folder / str(k))
        state = torch.load(folder / str(k) / "checkpoints" / "last.ckpt", weights_only=True)
        assert record["status"] == "interrupted"
        assert record["steps"] == state["global_step"] > 0


def test_members_go_on_in_a_multirun(command, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("-m", *WITH_CALLBACKS, "seed=1", "hydra/launcher=basic")
    assert command(main, *words, f"hydra.sweep.dir={first}").code == 0
    more = ("trainer.max_steps=9", f"ckpt_path={first / '0'}", f"hydra.sweep.dir={second}")
    result = command(main, *words, *more)
    assert result.code == 0, result.err
    assert read_run(second / "0")["resumed_at"] == [read_run(first / "0")["steps"]]


RATES = "optimizer.lr=1,1e-6,0.3,1e-5"
PRUNED_SWEEP = (
    "-m",
    *SHORT[:2],
    *SHORT[5:],
    "trainer.max_steps=60",
    "trainer.val_check_interval=20",
    "callbacks.activation_percentiles=null",
    RATES,
    *("hydra/sweeper=bn_optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null"),
    *("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=2"),
    "hydra.sweeper.study_name=pruned",
)


def test_a_sweep_prunes_within_a_stack(command, tmp_path):
    result = command(main, *PRUNED_SWEEP)
    assert result.code == 0, result.err
    assert result.out.count("4 jobs as one stack") == 1
    assert "2 complete (0 of them diverged), 2 pruned, 0 failed" in result.out
    directory = tmp_path / "logs" / "mnist_bn" / "sweeps" / "pruned"
    storage = open_storage(storage_url("journal", directory), 5)
    trials = optuna.load_study(study_name="pruned", storage=storage).trials
    assert len(trials) == 4
    for trial in trials:
        record = read_run(directory / str(trial.number))
        assert trial.user_attrs["seconds"] == record["seconds"]
        assert record["stack"] == {"size": 4, "index": trial.number}
        if trial.params["optimizer.lr"] >= 0.1:
            assert trial.state.name == "COMPLETE" and record["status"] == "completed"
            assert list(trial.intermediate_values) == [20, 40, 60]
        else:
            assert trial.state.name == "PRUNED" and record["status"] == "pruned"
            assert list(trial.intermediate_values) == [20] and record["steps"] == 20
            assert trial.user_attrs["pruned_at"] == 20
            assert "val/accuracy" in trial.user_attrs["prune_reason"]
            # As of a trial that was pruned in a run of its own, a report reads no other value.
            told = {"pruned_at", "prune_reason", "seconds", "directory"}
            assert trial.user_attrs.keys() == told
            log = (directory / str(trial.number) / "mnist_bn.log").read_text()
            assert "trained in a stack: pruned at step 20" in log
    again = command(main, *PRUNED_SWEEP)
    assert again.code == 0 and "4 of 4 trials done" in again.out


def test_trials_that_end_before_what_they_are_chosen_by_are_not_trained(command, monkeypatch):
    from bn_lightning.stack.training import StackTraining

    monkeypatch.delattr(StackTraining, "run")
    short = ("trainer.max_steps=10", RATES.rpartition(",")[0], "hydra.sweeper.max_retries=0")
    result = command(main, *(text for text in PRUNED_SWEEP if text != RATES), *short)
    assert result.code == 1 and "set trainer.val_check_interval=10 or less" in result.err
    assert "as one stack" not in result.out


@pytest.mark.slow
def test_an_error_after_members_have_left_spares_them(command, tmp_path, monkeypatch):
    """The others fail, and the same command repeats them alone."""
    from bn_lightning.stack.training import StackTraining

    judge = StackTraining._judge

    def fail_at_40(self, step):
        if step == 40 and not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            raise RuntimeError("asked to fail")
        return judge(self, step)

    monkeypatch.setattr(StackTraining, "_judge", fail_at_40)
    result = command(main, *PRUNED_SWEEP, "hydra.sweeper.max_retries=1")
    assert result.code == 0, result.err
    assert "2 complete (0 of them diverged), 2 pruned, 0 failed" in result.out
    directory = tmp_path / "logs" / "mnist_bn" / "sweeps" / "pruned"
    storage = open_storage(storage_url("journal", directory), 5)
    trials = optuna.load_study(study_name="pruned", storage=storage).trials
    states = [trial.state.name for trial in trials]
    assert states.count("FAIL") == 2 and states.count("PRUNED") == 2 and len(trials) == 6
    assert all(trial.state.name == "COMPLETE" for trial in trials[4:])
