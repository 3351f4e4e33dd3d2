"""The number of steps to reach an accuracy, the paper's measure of training speed."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class StepsToAccuracy(Callback):
    """Logs the step of the first validation whose accuracy is at least `threshold`.

    Logs, at the end of every training epoch after the threshold is reached:
        `val/steps_to_72.2`: optimizer steps, for threshold 0.722 and a `monitor` that starts with
            `val/`. Its resolution is the interval between validations.

    Args:
        threshold: accuracy to reach, in (0, 1].
        monitor: name of the logged accuracy, e.g. `val/accuracy`.

    Raises:
        ValueError: If `threshold` is out of range; after a validation, if `monitor` is not logged.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Figure 3, with Inception's best accuracy, 72.2%.
    """

    def __init__(self, threshold: float, monitor: str) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"expected `threshold` to be in (0, 1], got {threshold}")
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
                "expected `monitor` to be one of "
                f"{', '.join(trainer.callback_metrics) or 'no metrics'}, got {self.monitor!r}"
            )
        if accuracy >= self.threshold:
            self.reached_at = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reached_at is not None:
            # The value is the same on all ranks; sync_dist only avoids a warning.
            pl_module.log(self.name, float(self.reached_at), sync_dist=True)
