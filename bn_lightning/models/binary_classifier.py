"""The LightningModule for two classes and one logit: accuracy and AUROC."""

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
    """Trains `network` to tell class 1 from class 0, with binary cross-entropy on one logit.

        P(class 1) = sigmoid(logit)

    Logs what `Classifier` logs, but instead of top-5 accuracy `val/auroc` and `test/auroc` (in
    [0, 1]): the area under the ROC curve, which is the probability that a sample of class 1 gets a
    larger logit than a sample of class 0. Accuracy predicts class 1 above a probability of 0.5.

    Args:
        network: maps inputs (N, ...) to logits (N, 1).
        optimizer: takes the parameters and returns the optimizer.
        scheduler: takes the optimizer and returns a scheduler, stepped after every batch.

    Raises:
        ValueError: In training or evaluation, if the network does not have exactly one output.
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
        """Return the mean binary cross-entropy in nats."""
        if logits.shape[1:] != (1,):
            raise ValueError(
                f"expected `network` to return logits of shape (N, 1), got {tuple(logits.shape)}"
            )
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))

    @override
    def predicted_classes(self, logits: Float[Tensor, "N 1"]) -> Int[Tensor, "N"]:
        return (logits[:, 0] > 0).long()

    @override
    def probabilities(self, logits: Float[Tensor, "N 1"]) -> Float[Tensor, "N 2"]:
        return torch.cat([-logits, logits], dim=1).sigmoid()

    @override
    def metric_inputs(self, logits: Float[Tensor, "N 1"]) -> Float[Tensor, "N"]:
        # torchmetrics would take logits that all lie in [0, 1] for probabilities.
        return logits[:, 0].sigmoid()

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {
            "accuracy": BinaryAccuracy(validate_args=False),
            "auroc": BinaryAUROC(validate_args=False),
        }

    @override
    def chance_level(self) -> dict[str, float]:
        """Return the loss and metrics of tossing a coin, whatever the sizes of the classes."""
        return {"loss": math.log(2), "accuracy": 0.5, "auroc": 0.5}
