"""Lock the directory of a run or multirun for as long as its process lives, however it ends."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from bn_lightning.runs.atomic_write import remove_unfinished
from bn_lightning.runs.directory import LAST, RESUMED, RUN_FILE
from bn_lightning.sweeps.engine.environment import in_trial


class RunRefusedError(BaseException):
    """A run cannot have its directory.

    Not an `Exception`, because Hydra turns those of a callback into warnings.
    """


class RunLock(Callback):
    """Lock the directory of a run before Hydra writes there, or raise a `RunRefusedError`.

    The system holds the lock on the directory itself: it leaves no file and ends with the process.
    A new run needs a directory without a run, and a multirun one without runs, except a sweep's,
    whose trials are tried again in their own. Half-written files of a killed run are removed.

    The ranks that a run starts share its lock. On a file system without locks, runs go unlocked.
    """

    _held: ClassVar[int | None] = None

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "LOCAL_RANK" in os.environ:
            return
        try:
            directory = Path(config.hydra.run.dir).absolute()
        except OmegaConfBaseException:
            return  # Hydra raises it next, and would make a warning of it here
        if not _lock(directory):
            raise RunRefusedError(
                f"expected `hydra.run.dir` to be free, got {directory}, where a run is at work in "
                "another process; wait for its end, or leave ckpt_path and hydra.run.dir out to "
                "start a run beside it"
            )
        if RunLock._held is None:
            return  # where nothing can be written, Hydra raises next
        is_new = config.hydra.output_subdir != RESUMED
        if is_new and (directory / RUN_FILE).exists() and not in_trial():
            raise RunRefusedError(
                f"expected `hydra.run.dir` to be a directory without a run, got {directory}; "
                "resume that run by ckpt_path, or choose another directory"
            )
        with contextlib.suppress(OSError):  # the file system may be read-only
            for folder in (directory, directory / LAST.parent):
                remove_unfinished(folder)

    @override
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        _release()

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if str(config.hydra.sweeper._target_).startswith("hydra_plugins.bn_optuna."):
            return  # goes on with a study, and locks it
        directory = Path(config.hydra.sweep.dir).absolute()
        is_used = any(directory.glob(f"**/{RUN_FILE}"))
        if is_used or not _lock(directory):
            raise RunRefusedError(
                f"expected `hydra.sweep.dir` to be a directory without runs, got {directory}; "
                "choose another one, or leave hydra.sweep.dir out"
            )

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _release()


def _lock(directory: Path) -> bool:
    """Lock a directory, in place of the one before; return whether no other process has it."""
    _release()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        RunLock._held = os.open(directory, os.O_RDONLY)
        fcntl.flock(RunLock._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no lock
    return True


def _release() -> None:
    if RunLock._held is not None:
        os.close(RunLock._held)
        RunLock._held = None


# A forked process would hold the lock after its run was killed.
os.register_at_fork(after_in_child=_release)
