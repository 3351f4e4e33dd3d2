"""Writes the start of training and each validation into the log of a run."""

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from bn_lightning.callbacks.training_loop import planned_steps
from bn_lightning.runs.record import data_sentence, logged_numbers
from bn_lightning.runs.run_log import RUN_LOG


class RunLogLines(Callback):
    """Logs the data, the device, the step that training starts at, and each validation's metrics.

    Accuracies are in [0, 1], losses in nats.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        data = data_sentence({"data": getattr(datamodule, "info", None)})  # checked by InfoCheck
        RUN_LOG.info("data: %s", data or type(datamodule).__qualname__)
        planned = planned_steps(trainer)
        RUN_LOG.info(
            "training starts at step %s of %s, on %s in %d process%s",
            f"{trainer.global_step:,}",
            "unlimited steps" if planned is None else f"{planned:,}",
            trainer.strategy.root_device,
            trainer.world_size,
            "es" * (trainer.world_size > 1),
        )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        numbers = logged_numbers(trainer.callback_metrics)
        values = [f"{name} {x:.4f}" for name, x in numbers.items() if name.startswith("val/")]
        RUN_LOG.info("step %s: %s", f"{trainer.global_step:,}", ", ".join(values) or "validated")
