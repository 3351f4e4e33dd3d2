"""Whether BatchNorm loses accuracy with small batches, and what regains it."""

from collections.abc import Mapping, Sequence

from bn_lightning.callbacks.running_statistics import average_statistics, batch_norms
from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import best_validated, evaluated_accuracy, of_panel
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_rates

_SMALL, _LARGE = (2, 4, 8), 64
_CONTROLLED = _SMALL[0]  # with frozen statistics, and as the size of parts of large batches
_PRECISE = 2048  # training inputs
_LEAST = 1.0  # points of test accuracy
_FROZEN, _IN_PARTS = "frozen for the second half", f"batches of {_LARGE} in parts"


def _settings(budget: str) -> Mapping[str, Setting]:
    sizes, rates, steps = {
        "quick": ((*_SMALL, _LARGE), (0.01, 0.03, 0.1), 1000),
        "full": ((*_SMALL, 16, 32, _LARGE), (0.003, 0.01, 0.03, 0.1, 0.3), 4000),
    }[budget]
    found: dict[str, Setting] = {}

    def add(label: str, panel: str, *overrides: str, arms: tuple[str, ...]) -> None:
        found.update(at_rates(label, panel, overrides, rates, steps, arms))

    for size in sizes:
        batch = f"data.batch_size={size}"
        add(f"batch {size}", f"batches of {size}", batch, arms=("batch", "none"))
    small = f"batches of {_CONTROLLED}"
    add(
        f"batch {_CONTROLLED}, frozen",
        small,
        f"data.batch_size={_CONTROLLED}",
        f"callbacks.freeze_batch_norm.from_step={steps // 2}",
        arms=(_FROZEN,),
    )
    add(f"parts of {_CONTROLLED}", small, f"data.batch_size={_LARGE}", arms=(_IN_PARTS,))
    return found


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    found = {
        "validation accuracy": 100 * network.metrics["val/accuracy"],
        "test accuracy": 100 * network.metrics["test/accuracy"],
    }
    model, data = network.model(), network.data()
    layers = batch_norms(model.network)
    if layers:
        # In batches of one size for all arms, as the variance of two samples is a poor estimate.
        data.batch_size = _LARGE
        inputs = (x for x, _ in data.train_dataloader())
        average_statistics(
            model.network,
            list(layers.values()),
            inputs,
            num_samples=_PRECISE,
            modes=dict.fromkeys(model.network.modules(), True),
        )
        precise = evaluated_accuracy(model.network, data.test_dataloader())
        found["test accuracy, precise"] = 100 * precise
    return found


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    panels = {point.setting.panel for point in points}
    best = {panel: best_validated(of_panel(points, panel)).measures for panel in panels}
    small = best[f"batches of {_CONTROLLED}"]["test accuracy"]
    found = {f"test accuracy, batches of {_CONTROLLED}": small, "parts": small}
    if f"batches of {_LARGE}" not in best:
        return found
    large = best[f"batches of {_LARGE}"]["test accuracy"]
    found["parts"] = large  # what the parts are compared with
    for size in _SMALL:
        measures = best[f"batches of {size}"]
        accuracy = measures["test accuracy"]
        found[f"lost, batches of {size}"] = large - accuracy
        precise = measures.get("test accuracy, precise", accuracy)
        found[f"precise, batches of {size}"] = precise - accuracy
    return found


register_claim(
    Claim(
        name="small_batches",
        sentence="BatchNorm needs large batches: with small ones it loses accuracy.",
        source="Wu & He 2018, arXiv 1803.08494. Precise statistics: Wu & Johnson 2021, arXiv "
        "2105.07576",
        base=("model.network.activation=relu", "init=he"),
        arms={
            "batch": ("norm=batch",),
            "none": ("norm=none",),
            _FROZEN: ("norm=batch", "callbacks=[default,freeze_batch_norm]"),
            _IN_PARTS: ("norm=ghost", f"norm.ghost_size={_CONTROLLED}"),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            *(
                Condition(
                    f"batches of {size}",
                    f"lost, batches of {size}",
                    "batch",
                    "none",
                    least=_LEAST,
                    unit=f"points more lost against batches of {_LARGE} than without BatchNorm",
                )
                for size in _SMALL
            ),
            *(
                Condition(
                    f"precise statistics are better, batches of {size}",
                    f"precise, batches of {size}",
                    "batch",
                    kind="value",
                    least=_LEAST,
                    unit="points of test accuracy",
                    is_control=True,
                )
                for size in _SMALL
            ),
            Condition(
                f"statistics that are frozen for the second half are better, batches of "
                f"{_CONTROLLED}",
                f"test accuracy, batches of {_CONTROLLED}",
                _FROZEN,
                "batch",
                least=_LEAST,
                unit="points of test accuracy",
                is_control=True,
            ),
            Condition(
                f"batches of {_LARGE} in parts of {_CONTROLLED} lose too",
                "parts",
                "batch",
                _IN_PARTS,
                least=_LEAST,
                unit=f"points lost against whole batches of {_LARGE}",
                is_control=True,
            ),
        ),
        curves=(Curves("test accuracy", "test accuracy, %", "learning rate"),),
        not_varied="Three hidden layers of 100 ReLUs, He initialization, plain SGD, equal steps "
        "whatever the size of the batch, running averages with momentum .1. Each arm is tested at "
        "the rate with the best validation accuracy. Frozen statistics, and parts of large "
        f"batches, are those of batches of {_CONTROLLED} alone.",
        would_change="Equal examples instead of equal steps, which gives small batches more steps; "
        "convolutions, whose statistics are of many pixels.",
        least_steps=50,
        arm_labels={
            _FROZEN: f"with BatchNorm, {_FROZEN}",
            _IN_PARTS: f"with BatchNorm, {_IN_PARTS} of {_CONTROLLED}",
        },
    )
)
