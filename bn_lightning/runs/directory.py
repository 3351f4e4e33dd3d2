"""Where a run lies: a new directory, or that of the run which `ckpt_path` resumes."""

import os
from pathlib import Path

LAST = Path("checkpoints", "last.ckpt")
RESUMED = ".hydra-resumed"


def run_directory(ckpt_path: str | None, runs: str, time: str) -> str:
    """The directory of a run, for `hydra.run.dir`.

    Args:
        ckpt_path: None for a new run, "last" for the newest run in `runs` that has a last.ckpt, or
            the path of a checkpoint, whose run goes on in its own directory; a checkpoint that lies
            in no run's directory starts a new one.
        runs: the folder of all runs of a task.
        time: name of a new run's directory.

    Raises:
        ValueError: "last", and no run in `runs` has a last.ckpt.
    """
    if ckpt_path is None:
        return str(Path(runs) / time)
    if ckpt_path != "last":
        return str(run_of(ckpt_path) or Path(runs) / time)
    found = [(path.stat().st_mtime, path) for path in Path(runs).glob(f"*/{LAST}")]
    if not found:
        raise ValueError(
            f"`ckpt_path=last` expected a run with a {LAST} in {Path(runs).absolute()}, got none; "
            "leave ckpt_path out to start a run, or give a checkpoint's path"
        )
    return str(max(found)[1].parent.parent)


def make_newest(last: Path) -> None:
    """Give a last.ckpt that was just written a time after those of all runs beside its own.

    They are in order already, unless the clock was set back.
    """
    if last.parts[-2:] != LAST.parts:
        return
    times = {path: path.stat().st_mtime_ns for path in last.parents[2].glob(f"*/{LAST}")}
    own = times.pop(last, 0)
    newest = max(times.values(), default=0)
    if own <= newest:
        later = newest + 1_000_000  # ns: file systems round
        os.utime(last, ns=(later, later))


def hydra_directory(ckpt_path: str | None) -> str:
    """For `hydra.output_subdir`: a resumed run keeps the `.hydra` it began with."""
    is_resumed = ckpt_path is not None and (ckpt_path == "last" or run_of(ckpt_path) is not None)
    return RESUMED if is_resumed else ".hydra"


def run_of(ckpt_path: str) -> Path | None:
    """The directory of the run that a checkpoint's path lies in, None if in none."""
    run = Path(ckpt_path).absolute().parent.parent
    return run if (run / "run.json").exists() else None
