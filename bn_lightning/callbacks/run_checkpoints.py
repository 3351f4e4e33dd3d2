"""Writes `best.ckpt`, and `last.ckpt`, from which a run resumes bit for bit."""

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from bn_lightning.callbacks.training_loop import is_last_batch_of_step, validation_follows
from bn_lightning.plugins.checkpoint_io import AtomicCheckpointIO
from bn_lightning.runs.atomic_write import UNFINISHED
from bn_lightning.runs.checkpoint import METRICS_KEY, SECONDS_KEY
from bn_lightning.runs.directory import make_newest
from bn_lightning.runs.interruption import Interrupted, LateInterrupt, handle_signals
from bn_lightning.runs.record import logged_numbers


class RunCheckpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric, and `last.ckpt` to resume from.

    `last.ckpt` is written after every validation, at the end of training, and when the run is
    interrupted. During training SIGINT and SIGTERM take effect after the current optimizer step and
    the validation that follows it, so that the run resumes from the checkpoint bit for bit; then
    `bn_lightning.runs.interruption.Interrupted` is raised. A second signal raises it at once.

    Checkpoints also hold the seconds of training so far, those before the run was resumed included.

    `last.ckpt` gets its name only after everything of its step is logged, and has all metrics so
    far, so a process that is killed at any time loses no row and no metric. Checkpoints are written
    by `AtomicCheckpointIO`, unless the Trainer has a checkpoint plugin other than Lightning's.

    Args:
        dirpath: folder, created with the first checkpoint.
        monitor: name of the logged metric that chooses the best checkpoint.
        mode: "max" if higher values are better, "min" if lower values are.
    """

    # False if the program handles SIGINT and SIGTERM itself.
    handles_signals = True

    def __init__(self, dirpath: str | Path, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            # Otherwise Lightning counts an epoch twice when it resumes from the epoch's end.
            save_on_train_epoch_end=False,
        )
        self.last_path = Path(dirpath) / "last.ckpt"
        self._pending_path = Path(dirpath) / f".last.ckpt{UNFINISHED}"
        self._is_pending = False
        self._last_step_saved = -1
        self._interrupt = LateInterrupt()
        self._pending_signum: int | None = None  # raised once last.ckpt is in place
        self._handlers = ExitStack()
        self._started = time.perf_counter()
        self._seconds_before: float | None = 0.0  # None if the checkpoint resumed from lacks them

    @property
    @override
    def state_key(self) -> str:
        # ModelCheckpoint's key formats all its settings, in each hook of each step.
        return "RunCheckpoints"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            self._started, self._seconds_before = time.perf_counter(), 0.0

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            self._seconds_before = checkpoint.get(SECONDS_KEY)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning deletes the files that these paths name, so paths of another run are ignored.
        own = {os.path.join(str(self.dirpath), "best.ckpt"), ""}
        named = {*state_dict["best_k_models"], state_dict["kth_best_model_path"]}
        if state_dict.get("dirpath") == self.dirpath and named <= own:
            super().load_state_dict(state_dict)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[METRICS_KEY] = logged_numbers(trainer.callback_metrics)
        if self._seconds_before is not None:
            seconds = time.perf_counter() - self._started
            checkpoint[SECONDS_KEY] = self._seconds_before + seconds

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._interrupt = LateInterrupt()
        self._is_pending = False
        # Not earlier, because Lightning installs its own handlers just before this hook.
        if self.handles_signals and threading.current_thread() is threading.main_thread():
            self._handlers.enter_context(handle_signals(self._interrupt))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        self._complete_pending(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._pending_signum = self._agreed_signal(trainer)
        wanted = self._pending_signum is not None or trainer.global_step == trainer.max_steps
        if wanted and is_last_batch_of_step(trainer) and not validation_follows(trainer):
            # The state is complete here, but Lightning logs the step only after this hook.
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
                trainer.save_checkpoint(self._pending_path)
            self._is_pending = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last(trainer, self._agreed_signal(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._handlers.close()
        self._complete_pending(trainer)
        signum = self._agreed_signal(trainer)
        if signum is not None or self._last_step_saved != trainer.global_step:
            self._save_last(trainer, signum)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._handlers.close()

    def _agreed_signal(self, trainer: Trainer) -> int | None:
        """Return the signal, the same on every rank, because saving is a collective operation."""
        if trainer.world_size == 1:
            return self._interrupt.signum
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]  # 0 for no logs
        if trainer.global_step % every:
            return None
        return trainer.strategy.broadcast(self._interrupt.signum)

    def _save_last(self, trainer: Trainer, signum: int | None) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            trainer.save_checkpoint(self.last_path)
        self._finish_save(trainer, signum)

    def _complete_pending(self, trainer: Trainer) -> None:
        if self._is_pending:
            self._is_pending = False
            if trainer.is_global_zero and self._pending_path.exists():
                os.replace(self._pending_path, self.last_path)
            self._finish_save(trainer, self._pending_signum)

    def _finish_save(self, trainer: Trainer, signum: int | None) -> None:
        if trainer.is_global_zero and self.last_path.exists():
            make_newest(self.last_path)
        self._last_step_saved = trainer.global_step
        if signum is not None:
            raise Interrupted(signum)
