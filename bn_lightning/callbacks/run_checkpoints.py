"""Keeps `best.ckpt` and `last.ckpt`: from the latter a run goes on as if it had never stopped."""

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from bn_lightning.callbacks.steps import step_is_over, validation_follows
from bn_lightning.plugins.checkpoint_io import AtomicCheckpointIO
from bn_lightning.runs.atomic_write import UNFINISHED
from bn_lightning.runs.checkpoint import METRICS_KEY
from bn_lightning.runs.directory import make_newest
from bn_lightning.runs.interruption import Interrupted, handle_signals
from bn_lightning.runs.record import logged_numbers


class RunCheckpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric, and `last.ckpt` for going on.

    `last.ckpt` is written after every validation, when training ends, and when interrupted: while
    training, SIGINT and SIGTERM wait for the end of the optimiser's step, and of the validation
    that follows it, so that the checkpoint holds a moment from which the run continues bit for bit;
    then `bn_lightning.runs.interruption.Interrupted` is raised. A second signal raises it at once.

    Checkpoints are written by `AtomicCheckpointIO`, unless the Trainer was given another than
    Lightning's. `last.ckpt` is put in place when everything is logged that belongs to its step, and
    holds the metrics so far: a process killed at any moment loses no row and no metric.

    Args:
        dirpath: the folder, made when the first checkpoint is written.
        monitor: name of the logged metric that chooses the best.
        mode: "max" if more of it is better, "min" if less is.
    """

    # Where the program has an answer of its own to SIGINT and SIGTERM, this is False.
    handles_signals = True

    def __init__(self, dirpath: str | Path, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            # Lightning counts an epoch twice that is resumed from its end.
            save_on_train_epoch_end=False,
        )
        self.last_path = Path(dirpath) / "last.ckpt"
        self._waiting_path = Path(dirpath) / f".last.ckpt{UNFINISHED}"
        self._is_waiting = False
        self._last_step_saved = -1
        self._signum: int | None = None
        self._stopped_by: int | None = None  # what ends the run once last.ckpt is in place
        self._handlers = ExitStack()

    @property
    @override
    def state_key(self) -> str:
        # ModelCheckpoint spells all its settings out, for each hook of each step.
        return "RunCheckpoints"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning removes what a better one replaces, wherever a stranger's checkpoint says it is.
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

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signum = None
        self._is_waiting = False
        # Here and not earlier: just before, Lightning puts a handler of its own in front of others.
        if self.handles_signals and threading.current_thread() is threading.main_thread():
            self._handlers.enter_context(handle_signals(self._note))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        self._end_waiting(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._stopped_by = self._agreed_signal(trainer)
        wanted = self._stopped_by is not None or trainer.global_step == trainer.max_steps
        if wanted and step_is_over(trainer) and not validation_follows(trainer):
            # From this moment the run can go on, but Lightning logs the step after this hook.
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
                trainer.save_checkpoint(self._waiting_path)
            self._is_waiting = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last(trainer, self._agreed_signal(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._handlers.close()
        self._end_waiting(trainer)
        signum = self._agreed_signal(trainer)
        if signum is not None or self._last_step_saved != trainer.global_step:
            self._save_last(trainer, signum)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._handlers.close()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            raise Interrupted(signum)
        self._signum = signum

    def _agreed_signal(self, trainer: Trainer) -> int | None:
        """The signal, the same on every rank: writing a checkpoint is a collective act."""
        if trainer.world_size == 1:
            return self._signum
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]  # 0 for no logs
        if trainer.global_step % every:
            return None
        return trainer.strategy.broadcast(self._signum)

    def _save_last(self, trainer: Trainer, signum: int | None) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            trainer.save_checkpoint(self.last_path)
        self._saved(trainer, signum)

    def _end_waiting(self, trainer: Trainer) -> None:
        if self._is_waiting:
            self._is_waiting = False
            if trainer.is_global_zero and self._waiting_path.exists():
                os.replace(self._waiting_path, self.last_path)
            self._saved(trainer, self._stopped_by)

    def _saved(self, trainer: Trainer, signum: int | None) -> None:
        if trainer.is_global_zero and self.last_path.exists():
            make_newest(self.last_path)
        self._last_step_saved = trainer.global_step
        if signum is not None:
            raise Interrupted(signum)
