"""Stops a run whose loss is NaN, infinite or too high, and records the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from bn_lightning.callbacks.training_loop import is_last_batch_of_step


class DivergenceGuard(Callback):
    """Stops training when it diverges: the loss is NaN or infinite, or stays above `max_loss`.

    `diverged_at` is the step at which the divergence was detected, None before. If gradients
    accumulate, the callback checks each batch of a step. If one rank diverges, all ranks stop.

    Args:
        every_n_steps: optimizer steps between two checks on an accelerator or with several ranks,
            where a check has to synchronize. One process on the CPU checks every step.
        max_loss: limit in the unit of the loss; None for no limit. A classifier that guesses has
            the loss ln(number of classes) nats.
        patience: number of optimizer steps for which the loss has to stay above `max_loss` at every
            check, at least 1.

    Raises:
        ValueError: If an argument is out of range; in training, if the batch itself has NaN or
            infinite values, because then the data are wrong.
    """

    def __init__(
        self, every_n_steps: int, max_loss: float | None = None, patience: int = 100
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"expected `{name}` to be a positive integer, got {value}")
        if max_loss is not None and not math.isfinite(max_loss):
            raise ValueError(f"expected `max_loss` to be a finite number or None, got {max_loss}")
        self.every_n_steps = every_n_steps
        self.max_loss = math.inf if max_loss is None else max_loss
        self.patience = patience
        self.diverged_at: int | None = None
        self._above_since: int | None = None  # the step before the loss rose above it

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
            trainer.should_stop = True  # the run that wrote the checkpoint had diverged

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return  # a skipped step, or manual optimization
        synchronizes = trainer.world_size > 1 or not loss.is_cpu
        # The step of this batch: global_step only counts completed steps.
        step = trainer.global_step + (not is_last_batch_of_step(trainer))
        if synchronizes and step % self.every_n_steps:
            return
        # Lightning divides the loss by the number of accumulated batches.
        value = loss.item() * trainer.accumulate_grad_batches
        diverged = not math.isfinite(value)
        if diverged:
            check_finite_batch(batch, step)
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


def check_finite_batch(batch: Any, step: int) -> None:
    """Raise an error if a training batch has NaN or infinite values.

    Args:
        batch: a tensor, or a sequence or mapping of tensors and other values.
        step: number of the optimizer step, for the message.

    Raises:
        ValueError: It has.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        values = [values]
    for x in values:
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(
                f"expected the training batch of step {step} to have finite inputs, got "
                f"{int((~torch.isfinite(x)).sum())} NaN or infinite values; clean the data"
            )
