"""Data that change between the start of a run and its resumption."""

import os
from pathlib import Path

import pytest
from image_folders import write_images
from run_process import one_line_error, small_images

from bn_lightning.evaluate import main as evaluate
from bn_lightning.runs.record import read_run
from bn_lightning.train import main

pytestmark = [
    pytest.mark.slow,
    # Lightning 2.6 calls what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:expected the data of the checkpoint"),
]

TABLE = (
    "+experiment=placement",
    "data.path=table.csv",
    "data.features=[a,b]",
    "data.target=c",
    "data.batch_size=8",
    "scheduler=null",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "~callbacks.activation_percentiles",
    "extras.figures=false",
    "extras.batch_norms=false",
)


def write_table(folder, rows=100, change=""):
    lines = [f"{i % 7},{i % 11},{i % 2}" for i in range(rows)]
    if change:
        lines[5] = change
    (folder / "table.csv").write_text("\n".join(["a,b,c", *lines]) + "\n")


def test_a_changed_table(tmp_path, command):
    write_table(tmp_path)
    long = (*TABLE, "trainer.max_steps=12")
    whole = command(main, *long, "paths.log_dir=whole").directory
    directory = command(main, *long, "trainer.max_steps=5").directory
    last = directory / "checkpoints/last.ckpt"
    kept = last.read_bytes()
    before = {path: path.read_bytes() for path in (last, *directory.glob("*.[cj]s*"))}
    assert len(before) == 3  # run.json and metrics.csv

    for options in ({"change": "6,6,1"}, {"rows": 101}):
        write_table(tmp_path, **options)
        refused = command(main, *long, "ckpt_path=last")
        assert refused.code == 1
        error = one_line_error(refused.err)
        assert "expected the data of the checkpoint" in error
        assert "table.csv" in error and "resume.allow_changed_data=true" in error
        for path, content in before.items():
            assert path.read_bytes() == content
        assert command(evaluate, f"ckpt_path={last}").code == 0  # on whatever data

        copy = tmp_path / f"rows{options.get('rows')}.ckpt"
        copy.write_bytes(kept)  # a run of its own, with the changed data
        with pytest.warns(UserWarning, match="table.csv.*allow_changed_data"):
            allowed = command(main, *long, f"ckpt_path={copy}", "resume.allow_changed_data=true")
        assert allowed.code == 0, allowed.err
        assert read_run(allowed.directory)["steps"] == 12
        os.remove(allowed.directory / "checkpoints/last.ckpt")

    write_table(tmp_path)
    assert command(main, *long, "ckpt_path=last").code == 0
    record = read_run(directory)
    assert record["status"] == "completed" and record["resumed_at"] == [5]
    assert read_run(whole)["metrics"] == record["metrics"]


def test_a_changed_image(tmp_path, command):
    """By names and sizes: a file of another size, and one more, are noticed."""
    folder = write_images(tmp_path / "images", train=8, size=(12, 12))
    arguments = (
        *small_images(tmp_path),
        "data.eval_batch_size=4",
        "data.num_workers=0",
        "trainer.val_check_interval=2",
        "extras.figures=false",
        "~callbacks.activation_percentiles",
    )
    command(main, *arguments, "trainer.max_steps=2")
    image = sorted((folder / "train/cat").iterdir())[0]
    image.write_bytes(image.read_bytes() + b"0")
    result = command(main, *arguments, "trainer.max_steps=4", "ckpt_path=last")
    assert result.code == 1
    assert "got another train" in one_line_error(result.err)


def test_a_schedule_over_all_steps_lets_a_run_have_more(command):
    """It stays the one the run began with."""
    arguments = (*TABLE[:1], *TABLE[6:], "trainer.val_check_interval=3")
    directory = command(main, *arguments, "trainer.max_steps=6").directory
    result = command(main, *arguments, "trainer.max_steps=9", "ckpt_path=last")
    assert result.code == 0, result.err
    assert "scheduler stays as the run began with it" in result.out
    record = read_run(directory)
    assert record["steps"] == 9 and record["config"]["scheduler"]["T_max"] == 6
    third = command(main, *arguments, "trainer.max_steps=10", "ckpt_path=last")
    assert third.code == 0, third.err
    assert read_run(directory)["config"]["scheduler"]["T_max"] == 6
    copied = Path("copied.ckpt")
    copied.write_bytes((directory / "checkpoints/last.ckpt").read_bytes())
    again = command(main, *arguments, "trainer.max_steps=12", f"ckpt_path={copied}")
    assert again.code == 0, again.err
    config = read_run(again.directory)["config"]
    assert config["scheduler"]["T_max"] == config["model"]["scheduler"]["T_max"] == 6
    changed = command(
        main, *arguments, "trainer.max_steps=14", "ckpt_path=last", "scheduler.T_max=7"
    )
    assert changed.code == 1
    assert "another model, scheduler" in changed.err


def test_a_mistyped_data_root(tmp_path, command):
    wrong = (f"data.root={tmp_path}/no/such/folder", "data.download=false")
    result = command(main, "+experiment=mnist_bn", "trainer.max_steps=2", *wrong)
    assert result.code == 1
    error = one_line_error(result.err)
    assert "`data.root`" in error and "no/such/folder" in error
