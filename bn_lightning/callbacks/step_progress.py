"""A progress bar over all training steps."""

import math

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

DISPLAYED_METRICS = {"loss": "train/loss", "accuracy": "train/accuracy", "val": "val/accuracy"}


class StepProgress(ProgressBar):
    """One Rich progress bar for the whole training; nothing without a terminal.

    Shows the last logged values of `train/loss` (nats), `train/accuracy` and `val/accuracy` (in
    [0, 1]), and the mean number of steps per second since the start.

    Args:
        refresh_every_n_steps: steps between two updates of the bar, at least 1.

    Raises:
        ValueError: If `refresh_every_n_steps` is below 1.
    """

    def __init__(self, refresh_every_n_steps: int) -> None:
        super().__init__()
        if refresh_every_n_steps < 1:
            raise ValueError(
                "expected `refresh_every_n_steps` to be a positive integer, got "
                f"{refresh_every_n_steps}"
            )
        self.refresh_every_n_steps = refresh_every_n_steps
        self._enabled = True
        self._progress: Progress | None = None

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        console = Console(stderr=True)
        if not (self._enabled and console.is_terminal):
            return
        self._progress = Progress(
            BarColumn(bar_width=10),  # so that the line fits 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        steps = trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else steps
        self._task = self._progress.add_task("", total=total, numbers="")
        self._first_step = trainer.global_step
        self._progress.update(self._task, completed=self._first_step)
        self._progress.start()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step % self.refresh_every_n_steps == 0:
            self._refresh(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _refresh(self, trainer: Trainer) -> None:
        if self._progress is None:
            return
        elapsed = self._progress.tasks[0].elapsed
        numbers = []
        for label, name in DISPLAYED_METRICS.items():
            if name in trainer.callback_metrics:
                numbers.append(f"{label} {trainer.callback_metrics[name]:.3f}")
        if elapsed:
            numbers.append(f"{(trainer.global_step - self._first_step) / elapsed:.0f} steps/s")
        self._progress.update(self._task, completed=trainer.global_step, numbers=" ".join(numbers))

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
