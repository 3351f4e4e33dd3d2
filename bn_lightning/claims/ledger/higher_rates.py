"""Whether BatchNorm raises the largest learning rate that trains, at a good initialization."""

from collections.abc import Mapping, Sequence

from bn_lightning.claims.design import Claim, Condition, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import accuracy_curves, largest_trained, of_panel
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_rates

_BATCHES = (8, 60, 500)
_LEAST = 2.0


def _settings(budget: str) -> Mapping[str, Setting]:
    rates, steps = {
        "quick": ((0.1, 0.3, 1.0, 3.0, 10.0), 300),
        "full": ((0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0), 2000),
    }[budget]
    found: dict[str, Setting] = {}
    for size in _BATCHES:
        overrides = (f"data.batch_size={size}",)
        found |= at_rates(f"batch {size}", f"batches of {size}", overrides, rates, steps)
    return found


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    return {"accuracy": network.metrics["test/accuracy"]}


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    return {
        f"largest rate, batches of {size}": largest_trained(of_panel(points, f"batches of {size}"))
        for size in _BATCHES
    }


register_claim(
    Claim(
        name="higher_rates",
        sentence="BatchNorm allows higher learning rates.",
        source="Ioffe & Szegedy 2015, section 3.3; Bjorck et al. 2018, arXiv 1806.02375. Against: "
        "De & Smith 2020, arXiv 2002.10444, little at small batches",
        base=("init=he", "model.network.activation=relu"),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=tuple(
            Condition(
                f"batches of {size}",
                f"largest rate, batches of {size}",
                "batch",
                "none",
                kind="ratio",
                least=_LEAST,
                unit="times the largest rate without BatchNorm",
            )
            for size in _BATCHES
        ),
        curves=(accuracy_curves("learning rate"),),
        not_varied="He initialization, which suits the network without BatchNorm, ReLU, plain SGD "
        "with a constant rate. A rate trains if it reaches a test accuracy of .90.",
        would_change="A worse initialization, where the network without BatchNorm trains at fewer "
        "rates (the claim initialization); warm-up or clipping, which allow higher rates without "
        "BatchNorm too.",
        least_steps=50,
    )
)
