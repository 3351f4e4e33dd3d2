"""Whether a network with BatchNorm needs fewer steps to an accuracy."""

from collections.abc import Mapping, Sequence

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import of_panel, steps_to
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_rates

_ACTIVATIONS = ("sigmoid", "relu")
_ACCURACIES = (0.90, 0.97)
_SMALL = 0.1  # the equal rate
_LEAST = 1.5


def _settings(budget: str) -> Mapping[str, Setting]:
    rates, steps, every = {
        "quick": ((0.03, _SMALL, 0.3, 1.0, 3.0), 600, 25),
        "full": ((0.003, 0.01, 0.03, _SMALL, 0.3, 1.0, 3.0, 10.0), 5000, 50),
    }[budget]
    found: dict[str, Setting] = {}
    for activation in _ACTIVATIONS:
        overrides = (
            f"model.network.activation={activation}",
            f"trainer.val_check_interval={every}",
        )
        found |= at_rates(activation, activation, overrides, rates, steps)
    return found


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    budget = network.config["trainer"]["max_steps"]
    history = network.history("val/accuracy")
    steps = {f"steps to {a:.2f}": steps_to(a, history, budget) for a in _ACCURACIES}
    return {**steps, "budget": budget, "test accuracy": network.metrics["test/accuracy"]}


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found = {"budget": points[0].measures["budget"]}
    for activation in _ACTIVATIONS:
        there = of_panel(points, activation)
        for name in (f"steps to {a:.2f}" for a in _ACCURACIES):
            found[f"{name}, {activation}, best rate"] = min(p.measures[name] for p in there)
            found[f"{name}, {activation}, equal rate"] = next(
                p.measures[name] for p in there if p.setting.x == _SMALL
            )
    return found


register_claim(
    Claim(
        name="faster",
        sentence="BatchNorm reaches the same accuracy in fewer training steps.",
        source="Ioffe & Szegedy 2015: 14 times fewer, section 4.2.2. Against: Bjorck et al. 2018, "
        "arXiv 1806.02375, little gain at equal small learning rates",
        base=("init=xavier",),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=tuple(
            Condition(
                f"{activation}, to {accuracy:.2f}, "
                + ("each at its best rate" if rate == "best rate" else f"both at rate {_SMALL:g}"),
                f"steps to {accuracy:.2f}, {activation}, {rate}",
                "none",
                "batch",
                kind="ratio",
                least=_LEAST,
                unit="times as many steps without BatchNorm",
                limit="budget",
            )
            for activation in _ACTIVATIONS
            for accuracy in _ACCURACIES
            for rate in ("best rate", "equal rate")
        ),
        curves=tuple(
            Curves(
                f"steps to {accuracy:.2f}",
                f"steps to {accuracy:.2f},\nat most the budget",
                "learning rate",
                "log",
            )
            for accuracy in _ACCURACIES
        ),
        not_varied="Xavier initialization, batches of 60, plain SGD with a constant rate. Steps "
        "are counted to the next validation; a network that never reaches the accuracy counts "
        "with the whole budget, so a ratio is then a lower bound.",
        would_change="Time instead of steps (a step costs more with BatchNorm); an optimizer that "
        "adapts its rates; a worse initialization, which favors BatchNorm.",
        least_steps=50,
    )
)
