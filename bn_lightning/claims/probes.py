"""Measures that several claims share: of gradients, weights and accuracies."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bn_lightning.claims.design import Curves, MeasuredPoint

REACHED = 0.9
"""A network with this accuracy on the test set has trained."""


def weights_of(network: nn.Module) -> list[Tensor]:
    """Return the weights of all linear and convolution layers, in the order of the network."""
    layers = (module for module in network.modules() if isinstance(module, nn.Linear | _ConvNd))
    return [layer.weight for layer in layers]


def loss_and_gradients(
    model: Any, x: Tensor, target: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss of a batch in training mode, and its gradient for each parameter.

    Args:
        model: a LightningModule with `network` and `loss`.
        x: (N, ...).
        target: (N,).
        parameters: of the network.
    """
    loss = model.loss(model.network.train()(x), target)
    return loss.detach(), torch.autograd.grad(loss, list(parameters))


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give weights their values back at the end of the block; yield copies of these values."""
    start = [weight.detach().clone() for weight in weights]
    try:
        yield start
    finally:
        with torch.no_grad():
            for weight, at in zip(weights, start, strict=True):
                weight.copy_(at)


def growth(values: Sequence[float]) -> float:
    """Return the factor by which values grow from each to the one before, the geometric mean."""
    return (values[0] / values[-1]) ** (1 / (len(values) - 1)) if values[-1] else float("inf")


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of values that are at least 0, NaN if one is NaN."""
    return float(torch.tensor(list(values), dtype=torch.float64).log().mean().exp())


@torch.no_grad()
def evaluated_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy in evaluation mode, in [0, 1]."""
    network.eval()
    right, count = 0, 0
    for x, target in batches:
        right += int((network(x).argmax(1) == target).sum())
        count += len(target)
    return right / count


def accuracy_curves(x_label: str, x_scale: Literal["linear", "log"] = "log") -> Curves:
    """Return panels of the measure "accuracy", with a line at `REACHED`."""
    threshold = {f"has trained: {REACHED:g}": REACHED}
    return Curves("accuracy", "test accuracy", x_label, x_scale=x_scale, threshold=threshold)


def numbers_of_depth(points: Sequence[MeasuredPoint], depth: int) -> Mapping[str, float]:
    """Return what was measured of the initial network of a depth, and the largest that trains."""
    (initial,) = (p for p in points if p.setting.x == depth and not p.setting.is_trained)
    return {**initial.measures, "largest depth": largest_trained(points)}


def largest_trained(points: Sequence[MeasuredPoint]) -> float:
    """Return the largest x at which a network has trained; half the least x if none has."""
    x = [p.setting.x for p in points if "accuracy" in p.measures]
    trained = [p.setting.x for p in points if p.measures.get("accuracy", 0.0) >= REACHED]
    return max(trained, default=min(x) / 2)


def best_validated(points: Iterable[MeasuredPoint]) -> MeasuredPoint:
    """Return the point with the best "validation accuracy"."""
    return max(points, key=lambda point: point.measures["validation accuracy"])


def steps_to(accuracy: float, history: Sequence[tuple[int, float]], budget: int) -> float:
    """Return the step of the first validation that reaches an accuracy, `budget` if none does.

    Args:
        accuracy: in (0, 1].
        history: (step, accuracy) pairs.
        budget: in steps.
    """
    return float(next((step for step, value in history if value >= accuracy), budget))


def of_panel(points: Sequence[MeasuredPoint], panel: str) -> list[MeasuredPoint]:
    """Return the points whose settings are in one panel of the figure."""
    return [point for point in points if point.setting.panel == panel]
