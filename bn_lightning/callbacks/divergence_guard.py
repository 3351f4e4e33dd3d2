"""Ends a run whose loss is no longer a number, and remembers at which step."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class DivergenceGuard(Callback):
    """Stops training when the loss is NaN or infinite: the run has diverged, which is a result.

    `diverged_at` is the step at which it was seen, None while the loss is finite. On the CPU every
    step is looked at; on an accelerator, where a look waits for the device, every `every_n_steps`.

    Raises:
        ValueError: the batch itself holds NaN or infinity: the data are wrong, not the run.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` expected a positive integer, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.diverged_at: int | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"diverged_at": self.diverged_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.diverged_at = state_dict["diverged_at"]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        if not loss.is_cpu and trainer.global_step % self.every_n_steps:
            return
        if math.isfinite(loss.item()):
            return
        for x in batch:
            if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
                raise ValueError(
                    f"the training batch of step {trainer.global_step} expected finite inputs, got "
                    f"{int((~torch.isfinite(x)).sum())} that are NaN or infinite; clean the data"
                )
        self.diverged_at = trainer.global_step
        trainer.should_stop = True
