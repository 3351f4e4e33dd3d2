"""The callback."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm


class GradientNorm(Callback):
    """Logs `gradient_norm`, the Euclidean norm of the gradient of all parameters."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Log it, before the step uses the gradient."""
        gradients: list[Tensor] = [p.grad for p in pl_module.parameters() if p.grad is not None]
        pl_module.log("gradient_norm", get_total_norm(gradients))
