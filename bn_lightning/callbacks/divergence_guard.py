"""Ends a run whose loss is no longer a number, or far above a guess's, and remembers the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from bn_lightning.callbacks.steps import step_is_over


class DivergenceGuard(Callback):
    """Stops training when the loss is no number or stays too high: a divergence, which is a result.

    It has diverged when the loss is NaN or infinite, or, where `max_loss` is given, above it at
    every look over `patience` steps. `diverged_at` is the step at which that was seen, None before.
    On the CPU every step is looked at; on an accelerator or several ranks a look waits, so it is
    every `every_n_steps`. One rank that has diverged ends the run on all of them. Where gradients
    accumulate, each batch of a step that is looked at counts.

    Args:
        every_n_steps: optimiser steps from one look to the next, where a look waits.
        max_loss: in the unit of the loss; for a classifier a multiple of ln(number of classes), the
            loss of a guess in nats. None for no such limit.
        patience: optimiser steps for which the loss may stay above `max_loss`, at least 1.

    Raises:
        ValueError: an argument out of range; in training, a batch that itself holds NaN or
            infinity: the data are wrong, not the run.
    """

    def __init__(
        self, every_n_steps: int, max_loss: float | None = None, patience: int = 100
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"`{name}` expected a positive integer, got {value}")
        if max_loss is not None and not math.isfinite(max_loss):
            raise ValueError(f"`max_loss` expected a finite number or None, got {max_loss}")
        self.every_n_steps = every_n_steps
        self.max_loss = math.inf if max_loss is None else max_loss
        self.patience = patience
        self.diverged_at: int | None = None
        self._above_since: int | None = None  # the step before the first with so high a loss

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"diverged_at": self.diverged_at, "above_since": self._above_since}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.diverged_at = state_dict["diverged_at"]
        self._above_since = state_dict.get("above_since")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and self.diverged_at is not None:
            trainer.should_stop = True  # it was killed after that, and has come to its end

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return  # a step that was skipped, or one that optimises by hand
        waits = trainer.world_size > 1 or not loss.is_cpu
        # The step that the batch belongs to, which may have more batches to come.
        step = trainer.global_step + (not step_is_over(trainer))
        if waits and step % self.every_n_steps:
            return
        # Lightning has divided the loss by the batches of a step.
        value = loss.item() * trainer.accumulate_grad_batches
        diverged = not math.isfinite(value)
        if diverged:
            _refuse_bad_inputs(batch, step)
        elif value <= self.max_loss:
            self._above_since = None
        else:
            if self._above_since is None:
                self._above_since = step - 1
            diverged = trainer.global_step - self._above_since >= self.patience
        if trainer.world_size > 1:
            diverged = trainer.strategy.reduce_boolean_decision(diverged, all=False)
        if diverged:
            self.diverged_at = step
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
