"""The LightningModule that trains a classifier and measures it."""

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
    """Trains `network` to classify inputs, with cross-entropy.

    Logs, with the optimizer step as the x axis `step`:
        `train/loss` (nats), `train/accuracy` (in [0, 1]): of one batch, every `log_every_n_steps`
            steps of the Trainer.
        `val/loss` (nats), `val/accuracy`, `val/accuracy_top5` (in [0, 1]): of the whole validation
            set, at each validation.
        `test/loss`, `test/accuracy`, `test/accuracy_top5`: of the whole test set, in `test`, and at
            each validation if there is a second validation loader.

    Args:
        network: maps inputs (N, ...) to logits (N, num_classes).
        optimizer: takes the parameters and returns the optimizer.
        scheduler: takes the optimizer and returns a scheduler, stepped after every batch.
        num_classes: number of classes, at least 2.
        channels_last: whether to store the network's 4D weights in the memory format NHWC, which
            its convolutions then compute in.
        compile: whether to compile the network with torch.compile at its first call. The keys of
            the state_dict do not change.

    Raises:
        ValueError: If `num_classes` is below 2, or `channels_last` or `compile` is not a bool; in
            training or evaluation, if the network has not as many outputs.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.1.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        num_classes: int = 10,
        *,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"expected `num_classes` to be at least 2, got {num_classes}")
        for name, value in (("channels_last", channels_last), ("compile", compile)):
            if type(value) is not bool:
                raise ValueError(f"expected `{name}` to be true or false, got {value!r}")
        super().__init__()
        if channels_last:
            # A convolution computes in the memory format of its weights, not of its input.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            _compile(network)
        self.network = network
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.num_classes = num_classes
        self.evaluations = nn.ModuleDict(
            {
                name: MetricCollection(
                    {
                        # Keeps NaN, the loss of a diverged network. The strategy "disable" would
                        # keep it too, but ignores the weights in torchmetrics 1.9.
                        "loss": MeanMetric(nan_strategy=float("nan")),
                        **self.make_metrics(),
                    },
                    prefix=f"{name}/",
                    compute_groups=False,
                )
                for name in ("val", "test")
            }
        )

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets the name of the current hook about forty times per step. With nn.Module's
        # __setattr__ that takes 6% of a step of a small network.
        if type(value) is str:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def setup(self, stage: str) -> None:
        self.check_classes(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_classes(self, datamodule: Any) -> None:
        """Raise a ValueError if the data module's `num_classes` is above this module's."""
        classes = getattr(datamodule, "num_classes", None)
        if classes is not None and classes > self.num_classes:
            raise ValueError(
                f"expected `num_classes` to be at least {classes}, the number of classes of the"
                f" data, got {self.num_classes}; set model.num_classes={classes}"
            )

    @override
    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N K"]:
        return self.network(x)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, target = batch
        logits = self.network(x)
        loss = self.loss(logits, target)
        # Calling self.log on every step would take longer than the step itself.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every and (self.global_step + 1) % every == 0:
            accuracy = (self.predicted_classes(logits.detach()) == target).float().mean()
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
        self._evaluate(evaluation_name(dataloader_idx), batch)

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
        optimizer = _call_factory("optimizer", self.optimizer_factory, self.network.parameters())
        if self.scheduler_factory is None:
            return optimizer
        scheduler = _call_factory("scheduler", self.scheduler_factory, optimizer)
        lr_scheduler = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler}

    def chance_metrics(self) -> dict[str, float]:
        """Return the metrics of random guessing, which stand in for those of a diverged run."""
        chance = self.chance_level()
        return {f"{split}/{name}": v for split in ("val", "test") for name, v in chance.items()}

    def update_metrics(self, name: str, logits: Tensor, target: Int[Tensor, "N"]) -> None:
        """Add a batch to the metrics of an evaluation, "val" or "test"."""
        metrics = cast(MetricCollection, self.evaluations[name])
        metrics["loss"].update(self.loss(logits, target), weight=len(target))
        inputs = self.metric_inputs(logits)
        for metric_name, metric in metrics.items(keep_base=True):
            if metric_name != "loss":
                metric.update(inputs, target)

    def take_metrics(self) -> dict[str, Any]:
        """Return the metrics of the evaluations since the last call, and reset them."""
        values: dict[str, Any] = {}
        for module in self.evaluations.values():
            metrics = cast(MetricCollection, module)
            if metrics["loss"].update_called:
                values |= metrics.compute()
                with torch.inference_mode(False):  # a fit after a validation writes to the states
                    metrics.reset()
        return values

    # Subclasses for other kinds of classification override the methods below.

    def loss(self, logits: Float[Tensor, "N K"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy in nats."""
        if logits.dim() < 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"expected `network` to return logits of shape (N, {self.num_classes}), as"
                f" `num_classes` says, got {tuple(logits.shape)}; set model.num_classes to the"
                " number of outputs"
            )
        return F.cross_entropy(logits, target)

    def predicted_classes(self, logits: Float[Tensor, "N K"]) -> Int[Tensor, "N"]:
        """Return the most likely class of each sample."""
        return logits.argmax(1)

    def probabilities(self, logits: Float[Tensor, "N K"]) -> Tensor:
        """Return class probabilities (N, num_classes), the output of `predict`."""
        return logits.softmax(1)

    def metric_inputs(self, logits: Float[Tensor, "N K"]) -> Tensor:
        """Return what the metrics are updated with, together with the targets."""
        return logits

    def make_metrics(self) -> dict[str, Metric]:
        """Return new metrics, which an evaluation computes besides the loss."""
        classes = self.num_classes
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "accuracy_top5": MulticlassAccuracy(
                classes, top_k=min(5, classes), average="micro", validate_args=False
            ),
        }

    def chance_level(self) -> dict[str, float]:
        """Return the loss and metrics of random guessing among classes of equal size."""
        return {
            "loss": math.log(self.num_classes),
            "accuracy": 1 / self.num_classes,
            "accuracy_top5": min(5, self.num_classes) / self.num_classes,
        }

    def _evaluate(self, name: str, batch: Batch) -> None:
        x, target = batch
        self.update_metrics(name, self.network(x), target)

    def _log_evaluations(self) -> None:
        values = {"step": float(self.global_step), **self.take_metrics()}
        # torchmetrics has reduced the values over all ranks; sync_dist only avoids a warning.
        self.log_dict(values, sync_dist=True)


def evaluation_name(dataloader_idx: int) -> str:
    """Return the name, "val" or "test", of the evaluation on a validation loader.

    Raises:
        ValueError: `dataloader_idx` is above 1.
    """
    if dataloader_idx > 1:
        raise ValueError(
            "expected `val_dataloaders` to be at most two, validation and test, got "
            f"{dataloader_idx + 1} or more"
        )
    return ("val", "test")[dataloader_idx]


def _compile(network: nn.Module) -> None:
    """Compile a network at its first call."""
    if not network.forward.__module__.startswith("torch."):
        return network.compile()

    def call(*args: Any, **kwargs: Any) -> Any:
        return network._call_impl(*args, **kwargs)

    # torch.compile skips code of torch.nn: of nn.Sequential, `compile()` compiles nothing (2.13).
    network._compiled_call_impl = torch.compile(call)


def _call_factory(name: str, factory: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return factory(argument)
    except TypeError as error:
        raise ValueError(f"expected `{name}` to have arguments that it takes: {error}") from error
