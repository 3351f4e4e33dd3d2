"""Runs of `bn_lightning.train` and `evaluate` as processes of their own, to be treated badly."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from forked import Forked

from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.metrics_csv import read_rows
from bn_lightning.runs.record import read_run

# A checkpoint after every second step, a row after every step; an epoch has 21 steps.
SMALL = (
    "+experiment=mnist_bn",
    "data=digits",
    "model.network.widths=[16]",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "~callbacks.activation_percentiles",
    "~callbacks.step_progress",
    "extras.figures=false",
)


def small_images(root: Path) -> tuple[str, ...]:
    """For a small network on images of 8x8 pixels in `root/images`, by fours."""
    return (
        "+experiment=cifar_resnet",
        "data=image_folder",
        f"data.root={root}",
        "data.name=images",
        "data.image_size=8",
        "data.batch_size=4",
    )


def start(
    folder: Path, *arguments: str, command: str = "train", **options: Any
) -> subprocess.Popen[str] | Forked:
    """Starts a command in a folder and keeps its output.

    Args:
        folder: where it runs, and leaves its logs.
        arguments: overrides.
        command: "train" or "evaluate".
        options: of `Popen`; `env` adds to this process's. Without any it is a fork, which is ready
            4 s sooner.
    """
    if not options:
        return Forked(f"bn_lightning.{command}", arguments, folder)
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", f"bn_lightning.{command}", *arguments],
        cwd=folder,
        env=env | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        **options,
    )


def finish(process: subprocess.Popen[str] | Forked, code: int = 0) -> tuple[str, str]:
    """Waits for the end of a command, which must have this exit code; returns what it printed."""
    try:
        out, err = process.communicate(timeout=200)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def run(folder: Path, *arguments: str, **options: Any) -> Path:
    """Trains to the end and returns the run's directory."""
    out, _ = finish(start(folder, *arguments, **options))
    return Path(out.strip().splitlines()[-1])


def one_line_error(err: str) -> str:
    """What a command printed on stderr, which must be one error in one line."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def check_whole(directory: Path) -> None:
    """Reads whatever lies in a run's directory under the name of something whole."""
    if (directory / "run.json").exists():
        read_run(directory)
    for path in directory.glob("checkpoints/*.ckpt"):
        load_checkpoint(path)
    path = directory / "metrics.csv"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        header, *lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        assert header[0] == "step"
        assert all(len(line) == len(header) for line in lines)
        for row in read_rows(path):
            assert all(value == "" or float(value) is not None for value in row.values())


def check_same_end(whole: Path, other: Path) -> None:
    """Two runs ended with the same bits: weights, optimiser, rows, results."""
    for name in ("last", "best"):
        states = [load_checkpoint(path / f"checkpoints/{name}.ckpt") for path in (whole, other)]
        assert states[0]["global_step"] == states[1]["global_step"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            check_equal(states[0][key], states[1][key])
    assert read_rows(whole / "metrics.csv") == read_rows(other / "metrics.csv")
    records = [read_run(path) for path in (whole, other)]
    for key in ("status", "metrics", "steps", "data", "config"):
        a, b = (record[key] for record in records)
        if key == "config":
            a, b = (
                {k: v for k, v in x.items() if k not in ("paths", "ckpt_path", "callbacks")}
                for x in (a, b)
            )
            for x in (a, b):
                x["trainer"].pop("default_root_dir")
                x["logger"] = None
        assert a == b, key


def check_equal(a: Any, b: Any) -> None:
    """Nested lists, dicts and tensors, to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            check_equal(x, y)
    else:
        assert a == b
