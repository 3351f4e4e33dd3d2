"""Whether a layer's gradient changes less with BatchNorm when the layers below it have stepped."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

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
from bn_lightning.models.normalization import batch_norm

_RATES = {"relu": 0.1, "sigmoid": 1.0}
_BATCH = 1024
_LEAST = 1.5
_HARM = 1.0  # points of test accuracy
_NOISY = "batch, then noise"


class ShiftingNoise(nn.Module):
    """Noise whose mean and variance change in each step: x of (N, C) becomes a x + b in training.

    Each step draws for each channel c a mean m_c ~ U(-.5, .5) and a scale s_c ~ U(1, 1.25), and for
    each value b ~ U(m_c - .1, m_c + .1) and a ~ N(s_c, .1²). In evaluation x is returned.

    Source: Santurkar et al. 2018, arXiv 1805.11604, section 2.2; the numbers are of this project.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mean = torch.empty_like(x[:1]).uniform_(-0.5, 0.5)
        scale = torch.empty_like(x[:1]).uniform_(1.0, 1.25)
        added = mean + torch.empty_like(x).uniform_(-0.1, 0.1)
        return (scale + 0.1 * torch.randn_like(x)) * x + added


def noisy_batch_norm(num_features: int, spatial_dims: int = 0, **options: Any) -> nn.Module:
    """Build this package's BatchNorm with noise after it; arguments: `batch_norm`."""
    return nn.Sequential(batch_norm(num_features, spatial_dims, **options), ShiftingNoise())


def _settings(budget: str) -> Mapping[str, Setting]:
    moments = {"quick": (200,), "full": (200, 400, 600, 1000, 2000, 5000)}[budget]
    return at_moments(_RATES, moments)


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    model = network.model()
    x, target = network.batch(_BATCH)
    changes = gradient_changes(model, x, target, network.config["optimizer"]["lr"])
    found = {"change": fmean(changes)}
    if network.directory is not None:
        found["test accuracy"] = 100 * network.metrics["test/accuracy"]
    return found


def gradient_changes(model: Any, x: Tensor, target: Tensor, rate: float) -> list[float]:
    """Return how much the gradient of each layer changes when the layers below it step first.

    Args:
        model: a LightningModule with `network` and `loss`; its weights are restored.
        x: (N, ...).
        target: (N,).
        rate: of the step, plain SGD.

    Returns:
        The norm of the change relative to that of the gradient, of the weights of each linear or
        convolution layer from the second on.

    Source: Santurkar et al. 2018, arXiv 1805.11604, definition 2.1.
    """
    weights = weights_of(model.network)
    _, gradients = loss_and_gradients(model, x, target, weights)
    changes = []
    with restored(weights):
        for place in range(1, len(weights)):
            with torch.no_grad():  # the layers below that one have stepped already
                weights[place - 1].sub_(gradients[place - 1], alpha=rate)
            _, (moved,) = loss_and_gradients(model, x, target, weights[place : place + 1])
            changes.append(float((moved - gradients[place]).norm() / gradients[place].norm()))
    return changes


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found = {}
    for activation in _RATES:
        there = of_panel(points, activation)
        found[f"{activation}, change"] = geometric_mean(p.measures["change"] for p in there)
        last = max(there, key=lambda point: point.setting.x)
        found[f"{activation}, test accuracy"] = last.measures["test accuracy"]
    return found


register_claim(
    Claim(
        name="covariate_shift",
        sentence="BatchNorm reduces internal covariate shift: what a layer learns depends less on "
        "the steps of the layers below it.",
        source="Ioffe & Szegedy 2015, abstract; Awais et al. 2020. Against: Santurkar et al. 2018, "
        "arXiv 1805.11604: no less shift of the gradient, and noise after BatchNorm does no harm",
        base=("init=xavier",),
        arms={
            "batch": ("norm=batch",),
            "none": ("norm=none",),
            _NOISY: (
                "norm=batch",
                "norm._target_=bn_lightning.claims.ledger.covariate_shift.noisy_batch_norm",
            ),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            *(
                Condition(
                    f"{activation}, the gradient changes less",
                    f"{activation}, change",
                    "none",
                    "batch",
                    kind="ratio",
                    least=_LEAST,
                    unit="times as much without BatchNorm",
                )
                for activation in _RATES
            ),
            *(
                Condition(
                    f"{activation}, noise after BatchNorm does no harm",
                    f"{activation}, test accuracy",
                    "batch",
                    _NOISY,
                    most=_HARM,
                    unit="points of test accuracy lost",
                    is_control=True,
                )
                for activation in _RATES
            ),
            *(
                Condition(
                    f"{activation}, with noise better than without BatchNorm",
                    f"{activation}, test accuracy",
                    _NOISY,
                    "none",
                    least=_HARM,
                    unit="points of test accuracy more",
                    is_control=True,
                )
                for activation in _RATES
            ),
        ),
        curves=(
            Curves(
                "change", "change of the gradient\n/ its norm", "training step", "log", "linear"
            ),
            Curves("test accuracy", "test accuracy, %", "training step", x_scale="linear"),
        ),
        not_varied="Three hidden layers of 100 units, Xavier initialization, one rate an "
        "activation (.1 with ReLUs, 1 with sigmoids), plain SGD; the mean over layers on one batch "
        f"of {_BATCH:,}, the geometric mean over moments of training.",
        would_change="Another measure of the shift, such as that of the distribution of a layer's "
        "inputs; other rates, as the step of the layers below is proportional to them; a deeper "
        "network.",
        least_steps=50,
        arm_labels={_NOISY: "with BatchNorm, then noise"},
    )
)
