"""Run the task of a command: log what it warns of and why it fails, leave nothing of a refusal."""

import contextlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from bn_lightning.cli.error_line import FULL_ERROR, format_error
from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.runs.run_log import RUN_LOG, detach_file, logged_warnings
from bn_lightning.sweeps.engine.environment import in_trial

_OF_MULTIRUN = "multirun.yaml"


def run_task(task: Callable[[], Any]) -> Any:
    """Return what a task returns; log its warnings and its error.

    A task refuses if it raises an error whose line says what to do, before it has trained a step or
    written a result. Then its directory is removed, if this command created it.
    """
    with logged_warnings():
        try:
            return task()
        except Exception as error:
            if is_pruned(error):
                raise
            line = format_error(error)
            is_refusal = FULL_ERROR not in line
            text = "" if is_refusal else "\n" + "".join(traceback.format_exception(error)).rstrip()
            RUN_LOG.error("%s%s", line, text)
            if is_refusal and not in_trial():
                with contextlib.suppress(OSError):  # the error may be the disk's
                    _remove_refused(Path(HydraConfig.get().runtime.output_dir))
            raise
        finally:
            detach_file()


def is_pruned(error: Exception) -> bool:
    """Return whether an error is the pruner's, which ended this trial of a sweep."""
    if not in_trial():
        return False
    from optuna import TrialPruned

    return isinstance(error, TrialPruned)


class NewDirectories(Callback):
    """Remembers what is there before Hydra creates the directories of a run or a multirun."""

    # The first directory on the path that the command creates; what its directory held before.
    _first: ClassVar[Path | None] = None
    _directory: ClassVar[Path | None] = None
    _before: ClassVar[frozenset[Path]] = frozenset()

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # Hydra raises it next, here it warns
            _remember(Path(config.hydra.run.dir))

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _remember(Path(config.hydra.sweep.dir))

    @classmethod
    def has_created(cls, path: Path) -> bool:
        """Return whether this command created a path."""
        if cls._first is not None and path.is_relative_to(cls._first):
            return True
        # A job of a multirun in a directory that was there.
        directory = cls._directory
        if directory is None or path == directory or not path.is_relative_to(directory):
            return False
        return directory / path.relative_to(directory).parts[0] not in cls._before


def _remember(directory: Path) -> None:
    directory = directory.absolute()
    NewDirectories._first = NewDirectories._directory = None
    if "LOCAL_RANK" in os.environ:
        return  # the first rank has created it
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    NewDirectories._first = new[-1] if new else None
    NewDirectories._directory = directory
    NewDirectories._before = frozenset() if new else frozenset(directory.iterdir())


def remove_empty_multirun() -> None:
    """Remove the directory of a multirun that this command created and whose jobs all refused."""
    directory = NewDirectories._directory
    if directory is None or not NewDirectories.has_created(directory) or not directory.is_dir():
        return
    if [path.name for path in directory.iterdir()] == [_OF_MULTIRUN]:
        (directory / _OF_MULTIRUN).unlink()
        _remove_empty(directory)


def _remove_refused(directory: Path) -> None:
    if _has_trained(directory):
        return
    made = [path for path in directory.iterdir() if NewDirectories.has_created(path)]
    if all(path.name.startswith(".hydra") or path.suffix == ".log" for path in made) or (
        directory / RUN_FILE in made
    ):
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _remove_empty(directory)


def _remove_empty(directory: Path) -> None:
    """Remove a directory and those above it, as long as they are empty and of this command."""
    for path in (directory, *directory.parents):
        if not NewDirectories.has_created(path):
            return
        try:
            path.rmdir()
        except OSError:
            return


def _has_trained(directory: Path) -> bool:
    """Return whether a directory holds a run that trained a step, or did not fail."""
    if not (directory / RUN_FILE).exists():
        return False
    record = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    return record["status"] != "failed" or bool(record.get("steps"))
