"""Choose the directory of a run: a new one, or the one that `ckpt_path` resumes."""

import os
from pathlib import Path

RUN_FILE = "run.json"
LAST = Path("checkpoints", "last.ckpt")
RESUMED = ".hydra-resumed"


def run_directory(ckpt_path: str | None, runs: str, time: str) -> str:
    """Return the directory of a run, for `hydra.run.dir`.

    Args:
        ckpt_path: None for a new run; "last" for the newest run in `runs` that has a last.ckpt; or
            the path of a checkpoint, whose run is resumed in its own directory. A checkpoint
            outside the directory of a run starts a new run.
        runs: the folder of all runs of a task.
        time: the name of a new run's directory.

    Raises:
        ValueError: `ckpt_path` is "last" and no run in `runs` has a last.ckpt.
    """
    if ckpt_path is None:
        return str(Path(runs) / time)
    if ckpt_path != "last":
        return str(run_of(ckpt_path) or Path(runs) / time)
    found = [(path.stat().st_mtime, path) for path in Path(runs).glob(f"*/{LAST}")]
    if not found:
        raise ValueError(
            f"expected `ckpt_path=last` to find a run with a {LAST} in {Path(runs).absolute()}, "
            "got none; leave ckpt_path out to start a run, or give the path of a checkpoint"
        )
    return str(max(found)[1].parent.parent)


def sweep_directory(sweeper: str, study: str | None, folder: str, time: str) -> str:
    """Return the directory of a multirun, for `hydra.sweep.dir`.

    Args:
        sweeper: the class of Hydra's sweeper. This project's resumes a sweep in its own directory,
            so that the same command must find it again.
        study: the name of the study of a sweep.
        folder: of the task.
        time: the name of the directory of another multirun.
    """
    is_sweep = sweeper.startswith("hydra_plugins.bn_optuna.")
    return str(Path(folder, "sweeps", str(study)) if is_sweep else Path(folder, "multiruns", time))


def make_newest(last: Path) -> None:
    """Give a new last.ckpt a later modification time than those of all runs beside its own.

    The times differ already, unless the clock was set back.
    """
    if last.parts[-2:] != LAST.parts:
        return
    times = {path: path.stat().st_mtime_ns for path in last.parents[2].glob(f"*/{LAST}")}
    own = times.pop(last, 0)
    newest = max(times.values(), default=0)
    if own <= newest:
        later = newest + 1_000_000  # ns, because file systems round
        os.utime(last, ns=(later, later))


def hydra_directory(ckpt_path: str | None) -> str:
    """Return the `hydra.output_subdir` of a run: a resumed run keeps the `.hydra` of its start."""
    is_resumed = ckpt_path is not None and (ckpt_path == "last" or run_of(ckpt_path) is not None)
    return RESUMED if is_resumed else ".hydra"


def run_of(ckpt_path: str) -> Path | None:
    """Return the directory of the run that a checkpoint belongs to, None if there is none."""
    run = Path(ckpt_path).absolute().parent.parent
    return run if (run / RUN_FILE).exists() else None
