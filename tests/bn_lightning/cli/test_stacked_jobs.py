"""`hydra/launcher=bn_stack`, by the command that people type."""

import pytest

from bn_lightning.runs.record import read_run
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


def test_a_member_is_not_resumed_and_stays_as_it_was(command, tmp_path):
    given = [text for text in SHORT if text != "callbacks=none"]
    command(main, "-m", *given, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'there'}")
    member = tmp_path / "there" / "1"
    before = (member / "run.json").read_bytes()
    result = command(
        main,
        *given[:-1],
        "seed=2",
        "trainer.max_steps=8",
        f"ckpt_path={member}/checkpoints/last.ckpt",
    )
    assert result.code == 1 and "the optimizer's state" in result.err
    assert "of a run in a stack" in result.err
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
