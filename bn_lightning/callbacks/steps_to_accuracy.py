"""After how many steps a validation accuracy was first reached: the paper's measure of speed."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class StepsToAccuracy(Callback):
    """Notes the step of the first validation whose accuracy is at least `threshold`.

    Logs at the end of every training epoch, and of training, once it was reached:
        `val/steps_to_72.2`: optimiser steps, for a `threshold` of .722 and a `monitor` that begins
        with `val/`. It is known to within the steps from one validation to the next.

    Never reached, it is not logged.

    Args:
        threshold: share of correct answers, in (0, 1].
        monitor: name of the logged accuracy, as `val/accuracy`.

    Raises:
        ValueError: a threshold out of range; after a validation, an accuracy that nobody logged.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 3, with Inception's best, 72.2%.
    """

    def __init__(self, threshold: float, monitor: str) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` expected a number in (0, 1], got {threshold}")
        self.threshold = threshold
        self.monitor = monitor
        split = monitor.rpartition("/")[0]
        self.name = f"{split}/steps_to_{100 * threshold:.6g}".removeprefix("/")
        self.reached_at: int | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reached_at": self.reached_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached_at = state_dict["reached_at"]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.reached_at is not None:
            return
        accuracy = trainer.callback_metrics.get(self.monitor)
        if accuracy is None:
            raise ValueError(
                f"`monitor` expected one of {', '.join(trainer.callback_metrics) or 'no metric'}, "
                f"got {self.monitor!r}"
            )
        if accuracy >= self.threshold:
            self.reached_at = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reached_at is not None:
            # Of one value on all ranks; without sync_dist Lightning would warn that it is not.
            pl_module.log(self.name, float(self.reached_at), sync_dist=True)
