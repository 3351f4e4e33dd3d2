"""Find the checkpoint that a command reads."""

from pathlib import Path
from typing import Any

from bn_lightning.runs.directory import BEST, trained_checkpoint

_SWEEPS = "sweeps"  # the folder of a task's sweeps


def checkpoint_path(config: Any) -> str:
    """Return the path of the checkpoint that `ckpt_path` names; print it if the name is another.

    `best` is that of the newest run that has one (`trained_checkpoint`). If that run is a trial of
    a sweep, it is that of the sweep's best trial.

    Args:
        config: with `ckpt_path` and `paths.log_dir`.

    Raises:
        ValueError: there is no such run, or the sweep has no single best trial.
    """
    path, what = trained_checkpoint(config.ckpt_path, config.paths.log_dir), ""
    if config.ckpt_path == "best":
        sweep = Path(path).parents[2]
        if sweep.parent.name == _SWEEPS:
            path, what = _of_best_trial(sweep)
    if path != config.ckpt_path:
        print(f"checkpoint: {path}{what}")
    return path


def _of_best_trial(sweep: Path) -> tuple[str, str]:
    """Return the path of the best trial's best.ckpt, and what to say of it."""
    # Here, as Optuna takes a second to import.
    from bn_lightning.sweeps.analysis.sources import read_sweep
    from bn_lightning.sweeps.engine.best import best_trials

    try:
        _, table = read_sweep(str(sweep), None)
    except ValueError as error:
        raise _refusal(sweep, f"no study in its directory: {error}") from error
    best = best_trials(table.complete, table.optuna_directions)
    if len(best) != 1:
        numbers = ", ".join(str(row.number) for row in best)
        raise _refusal(sweep, f"trials {numbers}" if best else "none that is complete")
    (row,) = best
    path = sweep / str(row.attributes.get("directory", row.number)) / BEST
    if not path.exists():
        raise _refusal(sweep, f"trial {row.number} without {path}")
    (name, *_), (value, *_) = table.value_names, row.values
    return str(path), f", of trial {row.number}, the best of its sweep: {name} {value:.4g}"


def _refusal(sweep: Path, found: str) -> ValueError:
    return ValueError(
        f"expected `ckpt_path=best` to find one best trial of {sweep}, the sweep with the newest "
        f"best.ckpt, got {found}; give the path of a run or of a checkpoint"
    )
