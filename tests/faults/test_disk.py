"""A disk that is full, a directory that is read-only, one that is removed."""

import os
import shutil
import subprocess
import time

import pytest
from run_process import SMALL, check_same_end, check_whole, finish, one_line_error, run, start

from bn_lightning.runs.record import read_run
from bn_lightning.train import main

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]


@pytest.fixture
def disk(tmp_path):
    """Mounts a memory disk in `tmp_path/disk`, or mounts it anew: `disk("size=1m")`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options):
        change = ["-o", f"remount,{options}"] if mounted else ["-o", options]
        command = ["mount", "-t", "tmpfs", *change, "tmpfs", str(folder)]
        if shutil.which("mount") is None:
            pytest.skip("needs the command `mount`")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_in_the_middle(tmp_path, disk, command):
    """Room for best.ckpt and last.ckpt, and none for a third that is to replace one of them."""
    arguments = (*SMALL, "trainer.max_steps=9")
    whole = run(tmp_path, *arguments)
    checkpoints = sum(path.stat().st_size for path in whole.glob("checkpoints/*.ckpt"))
    folder = disk(f"size={checkpoints // 1024 + 60}k")
    on_disk = (*arguments, f"paths.log_dir={folder}")
    _, err = finish(start(tmp_path, *on_disk), code=1)
    assert "No space left on device" in one_line_error(err)
    (directory,) = folder.glob("mnist_bn/runs/*")
    assert str(directory) in err
    check_whole(directory)
    assert (directory / "checkpoints/best.ckpt").exists()
    assert not list(directory.rglob("*.part"))
    disk("size=16m")
    result = command(main, *on_disk, "ckpt_path=last")
    assert result.code == 0, result.err
    assert result.directory == directory
    check_same_end(whole, directory)


def test_full_from_the_start(disk, command):
    folder = disk("size=16k")
    with open(folder / "filler", "wb") as file:
        file.write(b"0" * 16384)
    result = command(main, *SMALL, "trainer.max_steps=3", f"paths.log_dir={folder}")
    assert result.code == 1
    assert "No space left on device" in one_line_error(result.err)


def test_read_only(tmp_path, disk, command):
    folder = disk("size=16m")
    arguments = (*SMALL, f"paths.log_dir={folder}")
    directory = run(tmp_path, *arguments, "trainer.max_steps=3")  # a log that is open is in the way
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk("ro")
    for more in ((), ("ckpt_path=last",)):
        result = command(main, *arguments, "trainer.max_steps=5", *more)
        assert result.code == 1
        error = one_line_error(result.err)
        assert "Read-only file system" in error and str(folder) in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    disk("rw")
    assert command(main, *arguments, "trainer.max_steps=5", "ckpt_path=last").code == 0
    assert read_run(directory)["steps"] == 5


def test_directory_removed_under_the_run(tmp_path):
    process = start(tmp_path, *SMALL, "trainer.max_steps=20000")
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("logs/*/runs/*/checkpoints/last.ckpt"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    directory = found[0].parents[1]
    removed = directory.parent / "removed"
    os.rename(directory, removed)  # at once, whatever is being written into it
    shutil.rmtree(removed)
    _, err = finish(process, code=1)
    error = one_line_error(err)
    assert "No such file or directory" in error and str(directory) in error
    check_whole(directory)
