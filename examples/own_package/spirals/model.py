"""The LightningModule."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


class SpiralModel(LightningModule):
    """Trains a network with label smoothing.

    The names of the metrics matter: checkpoints and sweeps look at `val/accuracy`, reports at
    `test/accuracy`.

    Args:
        network: maps points (N, 2) to logits (N, 2).
        optimizer: takes the parameters and returns the optimizer.
        smoothing: share of the label that goes to both classes alike, in [0, 1).
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        smoothing: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer_factory = optimizer
        self.smoothing = smoothing

    def forward(self, x: Tensor) -> Tensor:
        """Map points (N, 2) to logits (N, 2)."""
        return self.network(x)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss in nats. bn-landscape calls it, too."""
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, target = batch
        loss = self.loss(self.network(x), target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log what the validation set is measured by."""
        self._measure("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log what the test set is measured by."""
        self._measure("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the probability of each spiral, (N, 2)."""
        return self.network(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that the configuration chose."""
        return self.optimizer_factory(self.parameters())

    def chance_metrics(self) -> dict[str, float]:
        """Return the metrics of guessing, which a run that diverged gets; optional."""
        return {"val/accuracy": 0.5, "test/accuracy": 0.5}

    def _measure(self, name: str, batch: list[Tensor]) -> None:
        x, target = batch
        logits = self.network(x)
        accuracy = (logits.argmax(1) == target).float().mean()
        self.log_dict({f"{name}/loss": self.loss(logits, target), f"{name}/accuracy": accuracy})
