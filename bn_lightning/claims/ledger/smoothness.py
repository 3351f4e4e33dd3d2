"""Whether the loss changes less along its gradient with BatchNorm, at equal relative steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import (
    geometric_mean,
    loss_and_gradients,
    of_panel,
    restored,
    weights_of,
)
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_moments

_RATES = {"relu": 0.1, "sigmoid": 1.0}
_LENGTHS = (0.001, 0.003, 0.01, 0.03)  # of a step, relative to the norm of the weights
_BATCH, _BATCHES = 256, 4
_LEAST = 1.5
_MEASURES = {
    "loss range": "range of the loss, nats",
    "gradient change": "change of the gradient\n/ its norm",
}


def _settings(budget: str) -> Mapping[str, Setting]:
    moments = {
        "quick": (200, 400, 600),
        "full": (200, 400, 600, 800, 1000, 2000, 5000),
    }[budget]
    return at_moments(_RATES, moments)


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    model = network.model()
    x, target = network.batch(_BATCHES * _BATCH)
    parts = zip(x.split(_BATCH), target.split(_BATCH), strict=True)
    found = [along_gradient(model, *part, weights_of(model.network)) for part in parts]
    means = (sum(values) / len(values) for values in zip(*found, strict=True))
    return dict(zip(_MEASURES, means, strict=True))


def along_gradient(
    model: Any, x: Tensor, target: Tensor, weights: Sequence[Tensor]
) -> tuple[float, float]:
    """Return how much loss and gradient change along the gradient of a batch, in training mode.

    The step goes from the weights W against their gradient g, as far as `_LENGTHS` times the norm
    of W. The weights are restored.

    Args:
        model: a LightningModule with `network` and `loss`.
        x: (N, ...).
        target: (N,).
        weights: of the network; the others stay.

    Returns:
        The largest loss minus the smallest, in nats, and the largest norm of the change of the
        gradient, relative to the norm of g. Both include the start.

    Source: Santurkar et al. 2018, arXiv 1805.11604, section 3.1, where steps have learning rates.
    """
    loss, gradients = loss_and_gradients(model, x, target, weights)
    losses, changes = [loss], [torch.zeros(())]
    with restored(weights) as start:
        size, slope = _norm(start), _norm(gradients)
        for length in _LENGTHS:
            with torch.no_grad():
                for weight, at, gradient in zip(weights, start, gradients, strict=True):
                    weight.copy_(at - length * size / slope * gradient)
            loss, there = loss_and_gradients(model, x, target, weights)
            losses.append(loss)
            moved = [new - old for new, old in zip(there, gradients, strict=True)]
            changes.append(_norm(moved) / slope)
    spread = torch.stack(losses)
    return float(spread.max() - spread.min()), float(torch.stack(changes).max())


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    return {
        f"{activation}, {name}": geometric_mean(
            point.measures[name] for point in of_panel(points, activation)
        )
        for activation in _RATES
        for name in _MEASURES
    }


register_claim(
    Claim(
        name="smoothness",
        sentence="BatchNorm makes the loss smoother along its gradient.",
        source="Santurkar et al. 2018, arXiv 1805.11604. Against: with BatchNorm the size of the "
        "weights is arbitrary (Arora, Li & Lyu 2018, arXiv 1812.03981), so that steps of equal "
        "length cannot be compared",
        base=("init=xavier",),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=tuple(
            Condition(
                f"{activation}, {label}",
                f"{activation}, {name}",
                "none",
                "batch",
                kind="ratio",
                least=_LEAST,
                unit="times as much without BatchNorm",
            )
            for activation in _RATES
            for name, label in (
                ("loss range", "the loss changes less"),
                ("gradient change", "the gradient changes less"),
            )
        ),
        curves=tuple(
            Curves(name, label, "training step", "log", "linear")
            for name, label in _MEASURES.items()
        ),
        not_varied="Three hidden layers of 100 units, Xavier initialization, one rate an "
        "activation (.1 with ReLUs, 1 with sigmoids), both arms at the same steps of training. "
        f"Steps along the gradient of all weights, of {_LENGTHS[0]:g} to {_LENGTHS[-1]:g} of "
        f"their norm, on {_BATCHES} batches of {_BATCH}; the numbers are geometric means over the "
        "moments.",
        would_change="Moments of equal loss instead of equal steps; steps of equal learning rate, "
        "with which the larger gradient moves further; a deeper network.",
        least_steps=50,
    )
)
