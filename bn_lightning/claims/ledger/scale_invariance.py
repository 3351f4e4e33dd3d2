"""Whether a network with BatchNorm ignores the size of its weights, and tolerates their rates."""

import math
from collections.abc import Mapping, Sequence

import torch

from bn_lightning.callbacks.running_statistics import batch_norms
from bn_lightning.claims.design import Claim, Condition, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import (
    REACHED,
    accuracy_curves,
    evaluated_accuracy,
    loss_and_gradients,
    weights_of,
)
from bn_lightning.claims.registry import register_claim

_BATCH = 256
_FACTORS = (0.1, 10.0)
_NO_EPS = 1e-30
_REST = 0.1  # rate of all other parameters


def _settings(budget: str) -> Mapping[str, Setting]:
    steps, a_decade = {"quick": (600, 1), "full": (1000, 2)}[budget]
    powers = [power / a_decade for power in range(-4 * a_decade, 4 * a_decade + 1)]
    return {
        f"rate {10**power:.3g}": Setting(
            (f"optimizer.lr={10**power:.6g}", f"trainer.max_steps={steps}"), 10**power, "", False
        )
        for power in powers
    }


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    return {**_changes(network), "accuracy": _accuracy(network)}


def _changes(network: MeasuredNetwork) -> Mapping[str, float]:
    """Return how far loss(aW) is from loss(W), and a grad(aW) from grad(W), in fp64 and eps 0."""
    x, target = network.batch(_BATCH)
    model = network.model().double()
    for layer in batch_norms(model.network).values():
        layer.eps = _NO_EPS
    weights = weights_of(model.network)[:-1]
    loss, gradients = loss_and_gradients(model, x.double(), target, weights)
    changes: dict[str, float] = {"loss change": 0.0, "gradient change": 0.0}
    for factor in _FACTORS:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(factor)
        scaled_loss, scaled = loss_and_gradients(model, x.double(), target, weights)
        of_gradient = max(
            float((factor * s - g).norm() / g.norm())
            for s, g in zip(scaled, gradients, strict=True)
        )
        of_loss = float((scaled_loss - loss).abs() / loss)
        changes["loss change"] = max(changes["loss change"], of_loss)
        changes["gradient change"] = max(changes["gradient change"], of_gradient)
        with torch.no_grad():
            for weight in weights:
                weight.div_(factor)
    return changes


def _accuracy(network: MeasuredNetwork) -> float:
    """Return the test accuracy after SGD with a rate of its own for the weights before the last."""
    model = network.model()
    weights = {id(weight): weight for weight in weights_of(model.network)[:-1]}
    rest = [p for p in model.network.parameters() if id(p) not in weights]
    rate = network.config["optimizer"]["lr"]
    groups = [{"params": list(weights.values()), "lr": rate}, {"params": rest, "lr": _REST}]
    optimizer = torch.optim.SGD(groups)
    model.network.train()
    for x, target in network.batches(network.config["trainer"]["max_steps"]):
        loss = model.loss(model.network(x), target)
        if not math.isfinite(loss.item()):
            return 0.0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluated_accuracy(model.network, network.data().test_dataloader())


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    rates = sorted(point.setting.x for point in points)
    step = math.log10(rates[-1] / rates[0]) / (len(rates) - 1)
    return {
        "loss change": max(point.measures["loss change"] for point in points),
        "gradient change": max(point.measures["gradient change"] for point in points),
        "decades": step * sum(point.measures["accuracy"] >= REACHED for point in points),
    }


register_claim(
    Claim(
        name="scale_invariance",
        sentence="BatchNorm makes the size of the weights before it irrelevant to the loss, and "
        "so training tolerates almost any learning rate of these weights.",
        source="Ioffe & Szegedy 2015, section 3.3; Arora, Li & Lyu 2018, arXiv 1812.03981. "
        "Against: the other parameters still need a rate that suits them",
        base=("model.network.activation=relu", "init=he"),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            Condition(
                "loss(aW) = loss(W)", "loss change", "batch", kind="value", most=1e-9, unit="of it"
            ),
            Condition(
                "grad(aW) = grad(W)/a",
                "gradient change",
                "batch",
                kind="value",
                most=1e-6,
                unit="of it",
            ),
            Condition(
                "rates of the weights that train, with",
                "decades",
                "batch",
                kind="value",
                least=5.0,
                unit="decades",
                statement="rates of the weights that train with BatchNorm span many decades",
            ),
            Condition(
                "rates of the weights that train, without",
                "decades",
                "none",
                kind="value",
                most=2.0,
                unit="decades",
                statement="rates of the weights that train without BatchNorm span few decades",
            ),
            Condition(
                "loss(aW) is another without",
                "loss change",
                "none",
                kind="value",
                least=0.01,
                unit="of it",
                is_control=True,
                statement="loss(aW) differs from loss(W) without BatchNorm",
            ),
        ),
        curves=(accuracy_curves("learning rate of the weights"),),
        not_varied="One network, plain SGD without weight decay, rate .1 of the other parameters. "
        "The equations are tested in fp64 without eps, and eps breaks them for weights so small "
        "that a channel's variance is near it.",
        would_change="Weight decay makes the effective rate depend on the rate again. A rate of "
        "the other parameters at which neither network trains leaves nothing to compare.",
        least_steps=1,
    )
)
