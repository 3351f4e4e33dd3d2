"""The losses of all members on a training batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.context import Placed, leading
from bn_lightning.stack.network import StackedNetwork

_IGNORED = -100  # target that torch's mean of cross-entropies leaves out


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

    def loss(_: Any, logits: Tensor, target: Tensor) -> Tensor:
        return model.loss(logits, target)

    def accuracy(_: Any, logits: Tensor, target: Tensor) -> Tensor:
        return (model.predicted_classes(logits) == target).float().mean()

    network.context.calls.clear()
    logits = network(x)
    if logits.value.dtype is torch.bfloat16:
        logits = Placed(logits.value.float(), logits.dim)  # as autocast does for losses
    if _is_plain(model, logits, target):
        losses = _cross_entropies(logits, target, network.size)
    else:
        losses = network.map(loss, logits, target)
    if not measures:
        return losses, None
    return losses, network.map(accuracy, Placed(logits.value.detach(), logits.dim), target)


def _is_plain(model: Classifier, logits: Placed, target: Placed) -> bool:
    """Return whether the loss is torch's cross-entropy of classes, on a CPU."""
    return (
        getattr(model.loss, "__func__", None) is Classifier.loss
        and logits.value.is_cpu
        and logits.value.dim() == 3
        and logits.value.shape[2] == model.num_classes
        and not target.value.is_floating_point()  # probabilities of the classes
    )


def _cross_entropies(logits: Placed, target: Placed, size: int) -> Tensor:
    """Return the mean cross-entropy of each member.

    On a CPU torch computes a softmax of few classes in a twentieth of the time if another dimension
    is the last one.
    """
    logits_NCK = leading(logits, size).permute(1, 2, 0)
    target_NK = leading(target, size).t()
    losses = F.cross_entropy(logits_NCK, target_NK, ignore_index=_IGNORED, reduction="none")
    return losses.sum(0) / (target_NK != _IGNORED).sum(0)
