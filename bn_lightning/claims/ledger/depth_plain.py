"""Whether BatchNorm makes the gradient explode in a deep network without skip connections."""

import math
from collections.abc import Mapping
from functools import partial

import torch

from bn_lightning.claims.design import Claim, Condition, Curves, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import (
    accuracy_curves,
    growth,
    loss_and_gradients,
    numbers_of_depth,
    weights_of,
)
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_depths
from bn_lightning.models.mlp import MLP

_WIDTH, _DEPTH = 200, 40
_BATCH = 256
_MORE = 0.1  # growth a layer
_RATES = (0.01, 0.1)


def _settings(budget: str) -> Mapping[str, Setting]:
    depths, steps = {
        "quick": ((10, 40), 150),
        "full": ((5, 10, 20, 40, 100), 1000),
    }[budget]
    return at_depths(_depth_override, depths, depths, _RATES, steps)


def _depth_override(depth: int) -> str:
    return f"model.network.widths={[_WIDTH] * depth}".replace(" ", "")


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    if network.directory is not None:
        return {"accuracy": network.metrics["test/accuracy"]}
    model = network.model()
    weights = weights_of(model.network)[1:-1]
    x, target = network.batch(2 * _BATCH)
    growths = []
    for part in (slice(0, _BATCH), slice(_BATCH, None)):
        parameters = [p for p in model.network.parameters() if p.requires_grad]
        _, gradients = loss_and_gradients(model, x[part], target[part], parameters)
        of = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
        growths.append(growth([float(of[id(weight)].norm()) for weight in weights]))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=network.config["optimizer"]["lr"])
    return {"growth": growths[0], "growth after a step": growths[1]}


register_claim(
    Claim(
        name="depth_plain",
        sentence="In a plain deep ReLU network BatchNorm makes the gradient explode, by a factor "
        "of √(π/(π−1)) = 1.21 a layer, and so limits the depth that trains.",
        source="Yang et al. 2019, arXiv 1902.08129. Against: Ioffe & Szegedy 2015, section 3.3, "
        "BatchNorm prevents explosion",
        base=("model.network.activation=relu", "init=he", "optimizer.lr=0.1"),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=partial(numbers_of_depth, depth=_DEPTH),
        conditions=(
            Condition(
                "at the start",
                "growth",
                "batch",
                kind="value",
                least=1.18,
                most=1.22,
                unit="a layer",
                statement="the gradient grows as predicted with BatchNorm, at the start",
            ),
            Condition(
                "more than without, at the start",
                "growth",
                "batch",
                "none",
                least=_MORE,
                unit="more a layer",
                statement="the gradient grows faster with BatchNorm, at the start",
            ),
            Condition(
                "after one step",
                "growth after a step",
                "batch",
                "none",
                least=_MORE,
                unit="more a layer",
                statement="the gradient grows faster with BatchNorm, after one step",
            ),
            Condition(
                "the largest depth that trains without is larger",
                "largest depth",
                "none",
                "batch",
                kind="ratio",
                least=1.5,
                unit="times as deep",
                statement="the largest depth that trains is larger without BatchNorm",
            ),
        ),
        curves=(
            *(
                Curves(
                    measure,
                    f"growth of the gradient\na layer, {moment}",
                    "hidden layers",
                    threshold={"√(π/(π−1))": math.sqrt(math.pi / (math.pi - 1))},
                )
                for measure, moment in (
                    ("growth", "at the start"),
                    ("growth after a step", "after one step"),
                )
            ),
            accuracy_curves("hidden layers"),
        ),
        not_varied=f"Width {_WIDTH}, He initialization, ReLU, batches of {_BATCH} for the "
        "gradient, plain SGD with rates .01 and .1, one step of rate .1.",
        would_change="Skip connections (the claim depth_residual); an optimizer that scales each "
        "layer's gradient; an activation nearer to the identity, for which the theory predicts "
        "less growth; the training budget, for the last condition.",
        least_steps=50,
        network=MLP,
    )
)
