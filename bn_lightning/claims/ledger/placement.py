"""Whether BatchNorm belongs before the activation, and needs its scale there."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import best_validated, of_panel
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_rates
from bn_lightning.models.normalization import batch_norm

_ACTIVATIONS = ("sigmoid", "relu")
_LEAST = 0.2  # points of test accuracy
_BEFORE = ("norm=batch", "model.network.norm_position=before")


def unscaled_batch_norm(num_features: int, spatial_dims: int = 0, **options: Any) -> nn.Module:
    """Build this package's BatchNorm with a scale that stays 1; arguments: `batch_norm`."""
    layer = batch_norm(num_features, spatial_dims, **options)
    layer.weight.requires_grad_(False)
    return layer


def _settings(budget: str) -> Mapping[str, Setting]:
    rates, steps = {
        "quick": ((0.1, 0.3, 1.0, 3.0), 600),
        "full": ((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 2000),
    }[budget]
    found: dict[str, Setting] = {}
    for activation in _ACTIVATIONS:
        overrides = (f"model.network.activation={activation}",)
        found |= at_rates(activation, activation, overrides, rates, steps)
    return found


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    return {
        "validation accuracy": 100 * network.metrics["val/accuracy"],
        "test accuracy": 100 * network.metrics["test/accuracy"],
    }


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found = {}
    for activation in _ACTIVATIONS:
        there = of_panel(points, activation)
        found[activation] = best_validated(there).measures["test accuracy"]
    return found


register_claim(
    Claim(
        name="placement",
        sentence="BatchNorm belongs before the activation, not after it.",
        source="Ioffe & Szegedy 2015, section 3.2. Against: tutorials that place it after the "
        "activation",
        base=("init=xavier",),
        arms={
            "before": _BEFORE,
            "after": ("norm=batch", "model.network.norm_position=after"),
            "before, without scale": (
                *_BEFORE,
                "norm._target_=bn_lightning.claims.ledger.placement.unscaled_batch_norm",
            ),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            *(
                Condition(
                    activation,
                    activation,
                    "before",
                    "after",
                    least=_LEAST,
                    unit="points of test accuracy more",
                )
                for activation in _ACTIVATIONS
            ),
            *(
                Condition(
                    f"{activation}, the scale may be left out",
                    activation,
                    "before",
                    "before, without scale",
                    least=-_LEAST,
                    most=_LEAST,
                    unit="points of test accuracy more",
                    is_control=True,
                )
                for activation in _ACTIVATIONS
            ),
        ),
        curves=(Curves("test accuracy", "test accuracy, %", "learning rate"),),
        not_varied="Three hidden layers of 100 units, Xavier initialization, batches of 60, plain "
        "SGD. Each arm is tested at the rate with the best validation accuracy.",
        would_change="A deeper network; convolutions; the budget, as the arms come nearer to one "
        "another the longer they train.",
        least_steps=50,
        arm_labels={
            "before": "BatchNorm before the activation",
            "after": "BatchNorm after the activation",
            "before, without scale": "before, without its scale",
        },
    )
)
