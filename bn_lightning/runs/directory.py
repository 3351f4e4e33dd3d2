"""Choose the directory of a run: a new one, or the one that `ckpt_path` resumes."""

import os
from collections.abc import Sequence
from pathlib import Path

RUN_FILE = "run.json"
LAST = Path("checkpoints", "last.ckpt")
BEST = Path("checkpoints", "best.ckpt")
RESUMED = ".hydra-resumed"

_NAMED = {"last": LAST, "best": BEST}
_RUNS = ("*/runs/*", "*/multiruns/*/*", "*/sweeps/*/*")  # in the folder of all tasks


def run_directory(ckpt_path: str | None, runs: str, time: str) -> str:
    """Return the directory of a run, for `hydra.run.dir`.

    Args:
        ckpt_path: None for a new run; "last" or "best" for the newest run in `runs` that has a
            last.ckpt or best.ckpt; the path of a run; or the path of a checkpoint, whose run is
            resumed in its own directory. A checkpoint outside the directory of a run starts a new
            run.
        runs: the folder of all runs of a task.
        time: the name of a new run's directory.

    Raises:
        ValueError: `ckpt_path` is "last" or "best" and no run in `runs` has such a checkpoint.
    """
    if ckpt_path is None:
        return str(Path(runs) / time)
    if ckpt_path not in _NAMED:
        return str(run_of(ckpt_path) or Path(runs) / time)
    advice = "leave ckpt_path out to start a run, or give the path of a checkpoint"
    return str(_newest(ckpt_path, Path(runs), ("*",), advice).parent.parent)


def resumed_checkpoint(ckpt_path: str, directory: Path) -> Path:
    """Return the checkpoint that a run in `directory` starts from.

    Args:
        ckpt_path: as for `run_directory`, not None. The path of a run stands for its last.ckpt.
        directory: from `run_directory`.
    """
    if ckpt_path in _NAMED:
        return directory / _NAMED[ckpt_path]
    return Path(ckpt_path, LAST) if Path(ckpt_path, RUN_FILE).exists() else Path(ckpt_path)


def trained_checkpoint(ckpt_path: str, logs: str) -> str:
    """Return the path of the checkpoint that a command reads.

    Args:
        ckpt_path: "best" or "last" for that of the newest run of any task in `logs` that has one,
            the jobs of multiruns and sweeps included; the path of a run for its best.ckpt, or its
            last.ckpt if it has no other; or the path of a checkpoint.
        logs: the folder of all tasks.

    Raises:
        ValueError: `ckpt_path` is "best" or "last" and no run in `logs` has such a checkpoint.
    """
    if ckpt_path in _NAMED:
        return str(_newest(ckpt_path, Path(logs), _RUNS, "give the path of a checkpoint"))
    found = [Path(ckpt_path, name) for name in (BEST, LAST) if Path(ckpt_path, name).exists()]
    return str(found[0]) if found else ckpt_path


def _newest(name: str, folder: Path, runs: Sequence[str], advice: str) -> Path:
    """Return the newest checkpoint of this name in the runs that match one of the patterns."""
    paths = [path for run in runs for path in folder.glob(f"{run}/{_NAMED[name]}")]
    found = [(path.stat().st_mtime, path) for path in paths]
    if not found:
        if name == "best" and any(path for run in runs for path in folder.glob(f"{run}/{LAST}")):
            advice = "use ckpt_path=last, as no run has been validated"
        raise ValueError(
            f"expected `ckpt_path={name}` to find a run with a {_NAMED[name]} in "
            f"{folder.absolute()}, got none; {advice}"
        )
    return max(found)[1]


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
    is_resumed = ckpt_path is not None and (ckpt_path in _NAMED or run_of(ckpt_path) is not None)
    return RESUMED if is_resumed else ".hydra"


def run_of(ckpt_path: str) -> Path | None:
    """Return the directory of the run that a checkpoint belongs to, None if there is none.

    Args:
        ckpt_path: of a checkpoint, or of the run itself.
    """
    path = Path(ckpt_path).absolute()
    return next((run for run in (path, path.parent.parent) if (run / RUN_FILE).exists()), None)
