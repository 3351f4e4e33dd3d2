"""The LightningModule: a network, an optimiser factory, cross-entropy and its metrics."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

Batch = Sequence[Tensor]
"""Inputs (N, ...) and targets (N,) int64 in [0, num_classes)."""


class Classifier(LightningModule):
    """Trains `network` to tell `num_classes` classes apart by cross-entropy.

    Logs `train/loss` (nats) and `train/accuracy` (of the batch) every `log_every_n_steps` steps of
    the Trainer. Each evaluation logs loss (nats), accuracy and top-5 accuracy over the whole set:
    `val/loss`, `val/accuracy`, `val/accuracy_top5` for the first validation loader, `test/...` for
    the second, so that test accuracy can be drawn against steps, and `test/...` for `test`. `step`,
    the x axis of all of them, counts the optimiser's steps. Accuracies lie in [0, 1].

    Args:
        network: maps inputs (N, ...) to logits (N, num_classes).
        optimizer: called with the parameters, returns the optimiser.
        scheduler: called with the optimiser, returns a scheduler stepped after every batch.
        num_classes: at least 2.
        channels_last: keep the network's 4d weights, and with them what its convolutions compute,
            in the memory format NHWC.
        compile: compile the network by torch.compile when it is first called; its state_dict stays.

    Raises:
        ValueError: a number of classes below 2, or a switch that is neither true nor false.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.1.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        num_classes: int = 10,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` expected at least 2, got {num_classes}")
        for name, value in (("channels_last", channels_last), ("compile", compile)):
            if type(value) is not bool:
                raise ValueError(f"`{name}` expected true or false, got {value!r}")
        super().__init__()
        if channels_last:
            # Convolutions take the format of their weights, whatever that of their input.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            network.compile()
        self.network = network
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.num_classes = num_classes
        self.evaluations = nn.ModuleDict(
            {
                name: MetricCollection(
                    {
                        # A diverged network's loss is NaN, and is reported so: NaN stays NaN. The
                        # strategy "disable" would leave it so too, but in torchmetrics 1.9 it drops
                        # the weights.
                        "loss": MeanMetric(nan_strategy=float("nan")),
                        **self.metrics(),
                    },
                    prefix=f"{name}/",
                    compute_groups=False,
                )
                for name in ("val", "test")
            }
        )

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning writes the running hook's name to its module some forty times a step, and
        # nn.Module's own __setattr__ makes that 6% of a step of a small network.
        if type(value) is str:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def setup(self, stage: str) -> None:
        """Refuses data with more classes than the network can tell apart.

        Args:
            stage: ignored.

        Raises:
            ValueError: the data module's `num_classes` is above this one's.
        """
        # The data module has been set up by now. One that does not say how many is not asked.
        classes = getattr(self.trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        if classes is not None and classes > self.num_classes:
            raise ValueError(
                f"`num_classes` expected at least the {classes} classes of the data, got"
                f" {self.num_classes}; set model.num_classes={classes}"
            )

    @override
    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N K"]:
        return self.network(x)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, target = batch
        logits = self.network(x)
        loss = self.loss(logits, target)
        # Through self.log on every step, Lightning would spend longer on the log than on the step.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every and (self.global_step + 1) % every == 0:
            accuracy = (self.predicted(logits.detach()) == target).float().mean()
            self.log_dict(
                {
                    "train/loss": loss.detach(),
                    "train/accuracy": accuracy,
                    "step": float(self.global_step + 1),
                }
            )
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx > 1:
            raise ValueError(
                "Classifier expected at most two validation loaders, validation and test, got "
                f"{dataloader_idx + 1} or more"
            )
        self._evaluate(("val", "test")[dataloader_idx], batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, "N K"]:
        return self.probabilities(self.network(batch[0]))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluations()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluations()

    @override
    def configure_optimizers(self) -> Any:
        optimizer = _made("optimizer", self.optimizer_factory, self.network.parameters())
        if self.scheduler_factory is None:
            return optimizer
        scheduler = _made("scheduler", self.scheduler_factory, optimizer)
        lr_scheduler = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler}

    def chance_metrics(self) -> dict[str, float]:
        """The metrics of a guess, the score of a run that diverged: loss ln(num_classes)."""
        guess = self.guess()
        return {f"{split}/{name}": v for split in ("val", "test") for name, v in guess.items()}

    # What another kind of classifier has in its own way.

    def loss(self, logits: Float[Tensor, "N K"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats."""
        return F.cross_entropy(logits, target)

    def predicted(self, logits: Float[Tensor, "N K"]) -> Int[Tensor, "N"]:
        """The most likely classes."""
        return logits.argmax(1)

    def probabilities(self, logits: Float[Tensor, "N K"]) -> Tensor:
        """What `predict` returns, (N, num_classes), rows that sum to 1."""
        return logits.softmax(1)

    def scores(self, logits: Float[Tensor, "N K"]) -> Tensor:
        """What `metrics` are updated with, beside the targets."""
        return logits

    def metrics(self) -> dict[str, Metric]:
        """What an evaluation measures beside the loss, anew in each call."""
        classes = self.num_classes
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "accuracy_top5": MulticlassAccuracy(
                classes, top_k=min(5, classes), average="micro", validate_args=False
            ),
        }

    def guess(self) -> dict[str, float]:
        """The loss, and each of `metrics`, of a guess among classes of equal size."""
        return {
            "loss": math.log(self.num_classes),
            "accuracy": 1 / self.num_classes,
            "accuracy_top5": min(5, self.num_classes) / self.num_classes,
        }

    def _evaluate(self, name: str, batch: Batch) -> None:
        x, target = batch
        logits = self.network(x)
        metrics = cast(MetricCollection, self.evaluations[name])
        metrics["loss"].update(self.loss(logits, target), weight=len(target))
        scores = self.scores(logits)
        for measure, metric in metrics.items(keep_base=True):
            if measure != "loss":
                metric.update(scores, target)

    def _log_evaluations(self) -> None:
        values: dict[str, Any] = {"step": float(self.global_step)}
        for module in self.evaluations.values():
            metrics = cast(MetricCollection, module)
            if metrics["loss"].update_called:
                values |= metrics.compute()
                metrics.reset()
        # Computed over all ranks already; without sync_dist Lightning would warn that it is not.
        self.log_dict(values, sync_dist=True)


def _made(name: str, factory: Callable[[Any], Any], over: Any) -> Any:
    try:
        return factory(over)
    except TypeError as error:
        raise ValueError(f"`{name}` expected arguments that it takes: {error}") from error
