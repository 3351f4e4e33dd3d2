"""Whether the best learning rate stays where it is when a network with BatchNorm gets wider."""

import math
from collections.abc import Mapping, Sequence

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import of_panel
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_rates
from bn_lightning.models.mlp import MLP

_LAYERS = 3
_MOST, _LEAST = 0.5, 0.25  # decades


def _settings(budget: str) -> Mapping[str, Setting]:
    widths, rates, steps = {
        "quick": ((25, 100, 400), (0.03, 0.1, 0.3, 1.0, 3.0), 100),
        "full": (
            (25, 50, 100, 200, 400),
            (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
            400,
        ),
    }[budget]
    found: dict[str, Setting] = {}
    for width in widths:
        overrides = (f"model.network.widths={[width] * _LAYERS}".replace(" ", ""),)
        found |= at_rates(f"width {width}", f"width {width}", overrides, rates, steps)
    return found


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    return {"validation loss": network.metrics["val/loss"]}


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate with the least loss, from the parabola through it and its neighbors.

    The parabola is one of log(loss) against log(rate). A best rate at an end is returned as it is.

    Args:
        losses: rate -> loss, above 0.
    """
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda place: losses[rates[place]])
    if best in (0, len(rates) - 1):
        return rates[best]
    near = rates[best - 1 : best + 2]
    (a, b, c), (x, y, z) = ([math.log(n) for n in ns] for ns in (near, [losses[r] for r in near]))
    above, below = (b - a) * (y - z), (b - c) * (y - x)
    if above == below or not math.isfinite(above - below):  # equal losses, or an infinite one
        return rates[best]
    return math.exp(b - 0.5 * ((b - a) * above - (b - c) * below) / (above - below))


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    best = [
        best_rate({p.setting.x: p.measures["validation loss"] for p in of_panel(points, panel)})
        for panel in dict.fromkeys(point.setting.panel for point in points)
    ]
    return {"decades": math.log10(max(best) / min(best))}


register_claim(
    Claim(
        name="rate_transfer",
        sentence="With BatchNorm the best learning rate does not depend on the width.",
        source="Ioffe & Szegedy 2015, section 3.3, and Arora, Li & Lyu 2018, arXiv 1812.03981: "
        "the scale of the weights does not matter. Without: Yang et al. 2022, arXiv 2203.03466, "
        "the best rate falls with the width",
        base=("model.network.activation=relu", "init=he"),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            Condition(
                "the best rate stays, with",
                "decades",
                "batch",
                kind="value",
                most=_MOST,
                unit="decades from the lowest to the highest best rate",
                statement="the best rate stays with BatchNorm",
            ),
            Condition(
                "it moves more without",
                "decades",
                "none",
                "batch",
                least=_LEAST,
                unit="decades more",
                statement="the best rate moves more without BatchNorm",
            ),
        ),
        curves=(Curves("validation loss", "validation loss, nats", "learning rate", "log"),),
        not_varied=f"{_LAYERS} hidden layers of equal width, ReLU, He initialization, batches of "
        "60, plain SGD with a constant rate. The best rate has the least validation loss at the "
        "end, between the rates of the grid by a parabola, never outside them.",
        would_change="A longer budget, for which lower rates are best; a parametrization that "
        "scales rates with the width, such as muP; a wider range of widths.",
        least_steps=50,
        network=MLP,
    )
)
