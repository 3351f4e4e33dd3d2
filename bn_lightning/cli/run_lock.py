"""One process in a run's directory: a lock for as long as it lives, however it ends."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override

from bn_lightning.cli.command import report
from bn_lightning.runs.atomic_write import remove_unfinished
from bn_lightning.runs.directory import LAST, RESUMED
from bn_lightning.runs.record import FILE_NAME
from bn_lightning.sweeps.engine.environment import in_trial


class RunLock(Callback):
    """Takes the directory of a run before Hydra writes into it, or ends the process (exit code 1).

    The lock is the system's, on the directory itself: it leaves no file, and is gone with the
    process that holds it. A new run wants a directory without a run, except for a trial of a sweep,
    which is tried again in its own. What a killed run had not written to the end is removed.

    The ranks that a run starts take part in its lock. A file system that cannot lock is used
    without.
    """

    _held: ClassVar[int | None] = None

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "LOCAL_RANK" in os.environ:
            return
        _release()  # of the run before, in the same process
        directory = Path(config.hydra.run.dir).absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            RunLock._held = os.open(directory, os.O_RDONLY)
            fcntl.flock(RunLock._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse(
                f"the run in {directory} is at work in another process; wait for its end, or leave "
                "ckpt_path and hydra.run.dir out to start a run beside it"
            )
        except OSError:
            return  # without a lock; if nothing can be written there, Hydra is about to say so
        is_new = config.hydra.output_subdir != RESUMED
        if is_new and (directory / FILE_NAME).exists() and not in_trial():
            _refuse(
                f"`hydra.run.dir` expected a directory without a run, got {directory}; go on with "
                "that run by ckpt_path, or choose another directory"
            )
        with contextlib.suppress(OSError):  # a file system that is read-only by now
            for folder in (directory, directory / LAST.parent):
                remove_unfinished(folder)

    @override
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        _release()


def _refuse(message: str) -> None:
    # Hydra makes a warning of any other exception of a callback.
    sys.exit(report(ValueError(message)))


def _release() -> None:
    if RunLock._held is not None:
        os.close(RunLock._held)
        RunLock._held = None


# Whoever is forked would hold the lock for as long as it outlives a killed run.
os.register_at_fork(after_in_child=_release)
