"""The classifier of two classes by one logit: binary cross-entropy, accuracy and AUROC."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC
from typing_extensions import override

from bn_lightning.models.classifier import Classifier


class BinaryClassifier(Classifier):
    """Trains `network` to tell class 1 from class 0 by the binary cross-entropy of one logit.

        P(class 1) = sigmoid(logit)

    Logs what `Classifier` does, with the area under the ROC curve, `val/auroc` and `test/auroc`, in
    the place of top-5 accuracy: the probability that a sample of class 1 gets a larger logit than
    one of class 0. Accuracy counts a probability above .5 as class 1.

    Args:
        network: maps inputs (N, ...) to logits (N, 1).
        optimizer: called with the parameters, returns the optimiser.
        scheduler: called with the optimiser, returns a scheduler stepped after every batch.

    Raises:
        ValueError: in training or evaluation, a network with other than one output.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(network, optimizer, scheduler, num_classes=2)

    @override
    def loss(self, logits: Float[Tensor, "N 1"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """The mean binary cross-entropy, in nats."""
        if logits.shape[1:] != (1,):
            raise ValueError(
                f"`network` expected to give one logit for each sample, got {tuple(logits.shape)}"
            )
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))

    @override
    def predicted(self, logits: Float[Tensor, "N 1"]) -> Int[Tensor, "N"]:
        return (logits[:, 0] > 0).long()

    @override
    def probabilities(self, logits: Float[Tensor, "N 1"]) -> Float[Tensor, "N 2"]:
        return torch.cat([-logits, logits], dim=1).sigmoid()

    @override
    def scores(self, logits: Float[Tensor, "N 1"]) -> Float[Tensor, "N"]:
        # Probabilities: torchmetrics takes logits that all lie in [0, 1] for such.
        return logits[:, 0].sigmoid()

    @override
    def metrics(self) -> dict[str, Metric]:
        return {
            "accuracy": BinaryAccuracy(validate_args=False),
            "auroc": BinaryAUROC(validate_args=False),
        }

    @override
    def guess(self) -> dict[str, float]:
        """The loss, and each of `metrics`, of a coin, whatever the classes' shares."""
        return {"loss": math.log(2), "accuracy": 0.5, "auroc": 0.5}
