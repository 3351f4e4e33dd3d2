"""The losses of all members on a training batch."""

from typing import Any

import torch
from torch import Tensor

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.context import Placed
from bn_lightning.stack.network import StackedNetwork


def member_losses(
    network: StackedNetwork, model: Classifier, x: Placed, target: Placed, measures: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses (K,), and the accuracies (K,) if they are wanted.

    Args:
        network: of the stack.
        model: of any member, which defines the loss.
        x: inputs of the batch.
        target: targets of the batch.
        measures: whether accuracies are wanted.
    """
    network.context.calls.clear()

    def compute(_: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        if logits.dtype is torch.bfloat16:
            logits = logits.float()  # as autocast does for losses, but not inside vmap
        loss = model.loss(logits, target)
        if not measures:
            return (loss,)
        right = model.predicted_classes(logits.detach()) == target
        return loss, right.float().mean()

    losses, *accuracies = network.map(compute, network(x), target)
    return losses, accuracies[0] if measures else None
