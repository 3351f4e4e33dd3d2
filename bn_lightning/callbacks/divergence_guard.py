"""Ends a run whose loss is no longer a number, and remembers at which step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class DivergenceGuard(Callback):
    """Stops training when the loss is NaN or infinite: the run has diverged, which is a result.

    `diverged_at` is the step at which it was seen, None while the loss is finite. On the CPU every
    step is looked at; on an accelerator or several ranks a look waits, so it is every
    `every_n_steps`.

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
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return  # a step that was skipped, or one that optimises by hand
        waits = trainer.world_size > 1 or not loss.is_cpu
        if waits and trainer.global_step % self.every_n_steps:
            return
        diverged = not math.isfinite(loss.item())
        if diverged:
            _refuse_bad_inputs(batch, trainer.global_step)
        if trainer.world_size > 1:
            diverged = trainer.strategy.reduce_boolean_decision(diverged, all=False)
        if diverged:
            self.diverged_at = trainer.global_step
            trainer.should_stop = True


def _refuse_bad_inputs(batch: Any, step: int) -> None:
    values = batch.values() if isinstance(batch, Mapping) else batch
    for x in (
        values if isinstance(values, Iterable) and not isinstance(values, Tensor) else [values]
    ):
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(
                f"the training batch of step {step} expected finite inputs, got "
                f"{int((~torch.isfinite(x)).sum())} that are NaN or infinite; clean the data"
            )
