"""A clock that is set back, locales and names that are not plain ASCII, few open files."""

import os
import resource
import shlex
import sys
import time

import pytest
from image_folders import write_images
from run_process import SMALL, check_same_end, finish, one_line_error, run, small_images, start

from bn_lightning.evaluate import main as evaluate
from bn_lightning.runs.record import read_run
from bn_lightning.train import main

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

ARGUMENTS = (*SMALL, "trainer.max_steps=3")


class TestClock:
    @pytest.mark.soak
    def test_last_is_the_run_after_which_the_clock_was_set_back(self, command):
        """The first run's files are of tomorrow, as the clock was wrong then."""
        before = command(main, *ARGUMENTS).directory
        tomorrow = time.time() + 86400
        for path in (before, *before.rglob("*")):
            os.utime(path, (tomorrow, tomorrow))
        now = command(main, *ARGUMENTS).directory
        result = command(main, *ARGUMENTS, "trainer.max_steps=5", "ckpt_path=last")
        assert result.directory == now
        assert read_run(now)["steps"] == 5
        earlier = f"ckpt_path={before}/checkpoints/last.ckpt"
        assert command(main, *ARGUMENTS, "trainer.max_steps=5", earlier).directory == before
        result = command(main, *ARGUMENTS, "trainer.max_steps=7", "ckpt_path=last")
        assert result.directory == before  # the one that was worked on last

    @pytest.mark.soak
    def test_a_clock_that_runs_backwards(self, tmp_path):
        """By an hour with every look at it."""
        whole = run(tmp_path, *ARGUMENTS)
        (tmp_path / "sitecustomize.py").write_text(
            "import itertools, time\n"
            "now, looks = time.time(), itertools.count()\n"
            "time.time = lambda: now - 3600 * next(looks)\n"
        )
        path = os.pathsep.join([str(tmp_path), *sys.path])
        backwards = run(tmp_path, *ARGUMENTS, "paths.log_dir=back", env={"PYTHONPATH": path})
        check_same_end(whole, backwards)
        record = read_run(backwards)
        assert 0 < record["seconds"] < 200 and record["steps_per_second"] > 0


@pytest.mark.soak
def test_a_path_that_is_no_utf_8(tmp_path):
    """Under the locale C without Python's coercion; with output as in C, then as in en_US.UTF-8."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("the file system wants names in UTF-8")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    in_c = env | {"PYTHONIOENCODING": "ascii:surrogateescape"}
    in_utf_8 = env | {"PYTHONIOENCODING": "utf-8:strict"}
    drawn = (*ARGUMENTS, "extras.figures=true", "extras.step_table=true")
    finish(start(folder, *drawn, env=in_c))
    (directory,) = tmp_path.glob("*/logs/*/runs/*")
    finish(start(folder, *drawn, "trainer.max_steps=5", "ckpt_path=last", env=in_utf_8))
    assert read_run(directory)["status"] == "completed"
    assert read_run(directory)["steps"] == 5
    assert (directory / "figures/accuracy.png").exists()


EACH_NAME = [
    "with spaces",
    "a=b",
    "a,b",
    "[a]",
    "it's",
    'say "so"',
    "a{b}",
    "back\\slash",
    "*?",
    "#%:::",
    "-dash",
    "日本 é",
]
NAMES = [
    "with spaces, a=b [a] it's",
    'say "so" a{b} back\\slash',
    "-dash *? #%::: 日本 é",
    *(pytest.param(name, marks=pytest.mark.soak) for name in EACH_NAME),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_anything_in_them(tmp_path, command, name):
    """Of the folder of runs, and of a checkpoint, that is evaluated and gone on from."""
    directory = command(main, *ARGUMENTS, override("paths.log_dir", name)).directory
    assert directory.parents[2] == tmp_path / name
    again = (*ARGUMENTS, override("paths.log_dir", name), "trainer.max_steps=5")
    assert command(main, *again, "ckpt_path=last").directory == directory
    assert read_run(directory)["steps"] == 5
    copy = tmp_path / f"{name}.ckpt"
    copy.write_bytes((directory / "checkpoints/last.ckpt").read_bytes())
    result = command(evaluate, override("ckpt_path", copy))
    assert result.code == 0, result.err
    metrics = read_run(result.directory)["metrics"]
    assert metrics == {key: read_run(directory)["metrics"][key] for key in metrics}
    result = command(main, *ARGUMENTS, override("ckpt_path", copy), "trainer.max_steps=6")
    assert result.code == 0, result.err
    inside = override("ckpt_path", directory / "checkpoints/last.ckpt")
    result = command(main, *again[:-1], inside, "trainer.max_steps=6")
    assert result.directory == directory


def override(key, value):
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted = QuotedString(str(value), Quote.double).with_quotes()
    return f"{key}={quoted}"


@pytest.mark.parametrize("name", ["a=b.ckpt", "a[1].ckpt", "a{1}.ckpt", "it's.ckpt"])
def test_what_needs_quotes_is_said(command, name):
    result = command(evaluate, f"ckpt_path={name}")
    assert result.code == 1
    error = one_line_error(result.err)
    assert "quotes" in error
    assert shlex.split(error.partition("in a shell ")[2]) == [f'ckpt_path="{name}"']


@pytest.mark.soak
def test_few_open_files(tmp_path):
    """A hundred: neither checkpoints, nor epochs of workers, nor evaluations pile them up."""
    write_images(tmp_path / "images", train=8, size=(12, 12))
    arguments = (
        *small_images(tmp_path),
        "data.num_workers=2",
        "trainer.val_check_interval=4",
        "trainer.max_steps=80",
        "extras.figures=false",
    )
    limit = (100, 100)
    directory = run(
        tmp_path,
        *arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )
    assert read_run(directory)["steps"] == 80
