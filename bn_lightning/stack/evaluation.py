"""Evaluate all members of a stack, or one that leaves it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from bn_lightning.data.batches import TensorBatches
from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.context import Placed, leading
from bn_lightning.stack.network import StackedNetwork

# Samples that pass the network at once: with a large batch, the activations of all members leave
# the cache of a CPU.
_SAMPLES = 250


def evaluate_stack(
    network: StackedNetwork, models: Sequence[Classifier], name: str, batches: Iterable[Any]
) -> None:
    """Add batches to the metrics of each member's evaluation, "val" or "test".

    Args:
        network: in any mode, which it keeps.
        models: of the members.
        name: of the evaluation.
        batches: of inputs and targets, on any device.
    """
    first = next(network.network.parameters())
    with _evaluating(network.network):
        for x, target in batches:
            parts = [
                leading(network(Placed(part, None)), network.size)
                for part in placed_batch(x, first).split(_SAMPLES)
            ]
            # All at once, because each copy waits for the device.
            device = _device_of_metrics(models[0], name)
            all_logits, target = torch.cat(parts, 1).to(device), target.to(device)
            for model, logits in zip(models, all_logits, strict=True):
                model.update_metrics(name, logits, target)


def evaluate_one(model: Classifier, name: str, batches: Iterable[Any]) -> None:
    """Add batches to the metrics of one member's evaluation, with its own network."""
    first = next(model.network.parameters())
    with _evaluating(model.network):
        for x, target in batches:
            device = _device_of_metrics(model, name)
            logits = model.network(placed_batch(x, first)).to(device)
            model.update_metrics(name, logits, target.to(device))


def same_evaluation(batches: Any, other: Any) -> bool:
    """Return whether evaluating either gives the same: unchanged samples in the same batches."""
    are_plain = all(
        type(part) is TensorBatches and not part.shuffle and part.transform is None
        for part in (batches, other)
    )
    return (
        are_plain
        and batches.inputs is other.inputs
        and batches.targets is other.targets
        and batches.batch_size == other.batch_size
    )


def _device_of_metrics(model: Classifier, name: str) -> torch.device:
    """Return where the metrics are: on a GPU those of a Trainer, else on the CPU, which is faster.

    The metrics of many members are many small operations.
    """
    return cast(MetricCollection, model.evaluations[name])["loss"].device


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Compute without gradients in evaluation mode, and go back to the mode there was."""
    mode = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(mode)


def placed_batch(x: Tensor, like: Tensor) -> Tensor:
    """Return inputs on the device of a parameter, and in its dtype if they are real numbers."""
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
