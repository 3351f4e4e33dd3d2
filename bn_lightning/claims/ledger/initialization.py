"""Whether BatchNorm makes training tolerate bad initializations, and whether LSUV does the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.claims.design import Claim, Condition, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import REACHED, accuracy_curves
from bn_lightning.claims.registry import register_claim
from bn_lightning.models.layers import activation_factory
from bn_lightning.stack.seed_batches import loaded_data

_SAMPLES = 256  # on which LSUV computes variances


class LSUVScheme:
    """Layer-sequential unit variance: each layer's output has unit variance on training inputs.

    A scheme for `models.initialization.initialize`, which calls it for each weight of a multilayer
    perceptron, in their order. Weights are drawn from N(0, std²), then divided once by the standard
    deviation of the layer's output, from the first layer to the last.

    Args:
        std: of the weights before they are scaled.
        data: configuration of the data module.
        activation: key of `models.layers.ACTIVATION_MODULES`.

    Source: Mishkin & Matas 2016, arXiv 1511.06422, algorithm 1, with Gaussian weights.
    """

    def __init__(self, std: float, data: Mapping[str, Any], activation: str) -> None:
        inputs = next(iter(loaded_data(data).train_dataloader()))[0]
        self.std = std
        self.activation = activation_factory(activation)()
        self.x = inputs[:_SAMPLES].flatten(1)

    @torch.no_grad()
    def __call__(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill a weight (O, I) in place.

        Raises:
            ValueError: it is no weight of the next layer of a multilayer perceptron.
        """
        if weight.dim() != 2 or weight.shape[1] != self.x.shape[1]:
            raise ValueError(
                f"expected `model.network` to be a multilayer perceptron for LSUV, got a weight of "
                f"shape {tuple(weight.shape)} for inputs of {self.x.shape[1]} features; use "
                "model=mlp"
            )
        nn.init.normal_(weight, 0.0, self.std, generator=generator)
        output = self.x @ weight.T
        weight /= output.std()
        self.x = self.activation(output / output.std())


def _settings(budget: str) -> Mapping[str, Setting]:
    stds, rates, steps = {
        "quick": ((0.001, 0.01, 0.1, 1.0), (0.03, 0.3, 3.0), 600),
        "full": (
            (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
            (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
            2000,
        ),
    }[budget]
    return {
        f"std {std:g}, rate {rate:g}": Setting(
            (f"init.std={std}", f"optimizer.lr={rate}", f"trainer.max_steps={steps}"),
            std,
            f"rate {rate:g}",
        )
        for rate in rates
        for std in stds
    }


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    return {"accuracy": network.metrics["test/accuracy"]}


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    trained = [point.setting for point in points if point.measures["accuracy"] >= REACHED]
    return {
        "cells": 100 * len(trained) / len(points),
        "initializations": len({setting.x for setting in trained}),
    }


register_claim(
    Claim(
        name="initialization",
        sentence="BatchNorm makes training tolerate bad initializations.",
        source="Ioffe & Szegedy 2015, abstract: be less careful about initialization. The control "
        "is LSUV, Mishkin & Matas 2016, arXiv 1511.06422: unit variance once, at the start",
        base=("model.network.activation=sigmoid",),
        arms={
            "batch": ("norm=batch", "init=normal"),
            "none": ("norm=none", "init=normal"),
            "LSUV, without BatchNorm": (
                "norm=none",
                "init=normal",
                "init._target_=bn_lightning.claims.ledger.initialization.LSUVScheme",
                "init._partial_=false",
                "+init._recursive_=false",
                "+init.data=${data}",
                "+init.activation=${model.network.activation}",
            ),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            Condition(
                "more cells of rate and deviation train",
                "cells",
                "batch",
                "none",
                least=15.0,
                unit="points of all cells",
            ),
            Condition(
                "more deviations train at some rate",
                "initializations",
                "batch",
                "none",
                least=1.0,
                unit="more deviations",
            ),
            Condition(
                "more cells than with LSUV",
                "cells",
                "batch",
                "LSUV, without BatchNorm",
                least=15.0,
                unit="points of all cells",
                is_control=True,
            ),
        ),
        curves=(accuracy_curves("standard deviation of the weights"),),
        not_varied="The paper's network of three layers of 100 sigmoids, Gaussian weights, "
        "batches of 60, plain SGD. A cell trains if it reaches a test accuracy of .90.",
        would_change="Schemes such as Xavier's, which avoid bad deviations; another range of "
        "rates, as the share of cells depends on the grid.",
        least_steps=50,
    )
)
