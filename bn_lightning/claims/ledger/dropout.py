"""Whether BatchNorm makes dropout superfluous, and whether the two do harm together."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.callbacks.running_statistics import batch_norms
from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.registry import register_claim
from bn_lightning.models.classifier import Classifier
from bn_lightning.models.layers import ConvLayer, HiddenLayer

_EXAMPLES = 1000
_TESTED = 60  # the batch size of the rule
_LEAST = 0.25  # points of test accuracy
_SHIFT = 1.1  # variance in training over that in evaluation
_NAME = "bn_lightning.claims.ledger.dropout.classifier_with_dropout"


def classifier_with_dropout(
    network: nn.Module, dropout: float, after_all: bool, **options: Any
) -> Classifier:
    """Build a classifier whose network has dropout after the activations of its hidden layers.

    Args:
        network: of `HiddenLayer` and `ConvLayer`; changed in place.
        dropout: probability in [0, 1] of zeroing an activation in training.
        after_all: whether the last hidden layer alone gets dropout, after all BatchNorms; else each
            hidden layer does, and the BatchNorms after it see its noise.
        options: those of `Classifier`.

    Raises:
        ValueError: the network has no such layer, or an argument is out of range.
    """
    layers = [m for m in network.modules() if isinstance(m, HiddenLayer | ConvLayer)]
    if not layers:
        raise ValueError(
            f"expected `model.network` to have hidden layers of bn_lightning.models.layers, got "
            f"{type(network).__name__} without one; use model=mlp or model=cnn"
        )
    for layer in layers[-1 if after_all else 0 :]:
        layer.add_module("dropout", nn.Dropout(dropout))
    return Classifier(network, **options)


def _settings(budget: str) -> Mapping[str, Setting]:
    sizes, steps = {"quick": ((_TESTED,), 1500), "full": ((16, _TESTED, 500), 5000)}[budget]
    return {
        f"batch {size}": Setting(
            (f"data.batch_size={size}", f"trainer.max_steps={steps}"), float(size)
        )
        for size in sizes
    }


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    found = {"test accuracy": 100 * network.metrics["test/accuracy"]}
    model, data = network.model(), network.data()
    data.batch_size = _EXAMPLES
    x, _ = next(iter(data.train_dataloader()))
    shifts = variance_shifts(model.network, x)
    return found | {f"variance shift, layer {k}": shift for k, shift in enumerate(shifts, 1)}


@torch.no_grad()
def variance_shifts(network: nn.Module, x: Tensor) -> list[float]:
    """Return how much larger the variance of each BatchNorm's input is in training mode.

    Args:
        network: its running statistics change.
        x: inputs (N, ...), the same in both modes.

    Returns:
        The mean over channels of the variance in training mode, over that in evaluation mode, for
        each BatchNorm; 1 without dropout before it and with exact running statistics.

    Source: Li et al. 2019, arXiv 1801.05134, the variance shift.
    """
    variances: dict[bool, list[Tensor]] = {}
    for training in (False, True):
        seen = variances.setdefault(training, [])
        handles = [
            layer.register_forward_pre_hook(lambda _, given, to=seen: to.append(given[0].var(0)))
            for layer in batch_norms(network).values()
        ]
        torch.manual_seed(0)
        network.train(training)(x)
        for handle in handles:
            handle.remove()
    pairs = zip(variances[True], variances[False], strict=True)
    return [float(training.mean() / evaluation.mean()) for training, evaluation in pairs]


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    (measures,) = (point.measures for point in points if point.setting.x == _TESTED)
    found = {"test accuracy": measures["test accuracy"]}
    # The first BatchNorm comes before all dropout.
    shifts = [value for name, value in measures.items() if name.startswith("variance shift")][1:]
    return found | ({"variance shift": fmean(shifts)} if shifts else {})


def _with(dropout: float, *, after_all: bool = False) -> tuple[str, ...]:
    return (
        f"model._target_={_NAME}",
        f"+model.dropout={dropout}",
        f"+model.after_all={str(after_all).lower()}",
    )


register_claim(
    Claim(
        name="dropout",
        sentence="BatchNorm replaces dropout.",
        source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1. Li et al. 2019, arXiv 1801.05134: "
        "the two together are worse, unless dropout comes after all BatchNorms",
        base=("model.network.activation=relu", "init=he", f"data.train_samples={_EXAMPLES}"),
        arms={
            "batch": ("norm=batch", *_with(0.0)),
            "none": ("norm=none", *_with(0.0)),
            "dropout": ("norm=none", *_with(0.5)),
            "both": ("norm=batch", *_with(0.5)),
            "both, dropout after all": ("norm=batch", *_with(0.5, after_all=True)),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            Condition(
                "dropout alone is no better than BatchNorm alone",
                "test accuracy",
                "dropout",
                "batch",
                most=_LEAST,
                unit="points of test accuracy more",
            ),
            Condition(
                "dropout adds nothing to BatchNorm",
                "test accuracy",
                "both",
                "batch",
                most=_LEAST,
                unit="points of test accuracy more",
            ),
            Condition(
                "dropout after all BatchNorms adds nothing",
                "test accuracy",
                "both, dropout after all",
                "batch",
                most=_LEAST,
                unit="points of test accuracy more",
            ),
            Condition(
                "dropout is of use without BatchNorm",
                "test accuracy",
                "dropout",
                "none",
                least=_LEAST,
                unit="points of test accuracy more",
                is_control=True,
            ),
            Condition(
                "the two together are worse than BatchNorm alone",
                "test accuracy",
                "batch",
                "both",
                least=_LEAST,
                unit="points of test accuracy more",
                is_control=True,
            ),
            Condition(
                "dropout before a BatchNorm shifts the variance of its input",
                "variance shift",
                "both",
                "both, dropout after all",
                kind="ratio",
                least=_SHIFT,
                unit="times the variance in training",
                is_control=True,
            ),
        ),
        curves=(Curves("test accuracy", "test accuracy, %", "batch size"),),
        not_varied=f"The same {_EXAMPLES:,} examples for all seeds, three hidden layers of 100 "
        "ReLUs, He initialization, plain SGD with rate .1, dropout with probability .5 after "
        f"activations. The rule is that of batches of {_TESTED}.",
        would_change="More examples; a smaller probability; a deeper network, in which variance "
        "shifts add up; convolutions.",
        least_steps=50,
        arm_labels={
            "none": "neither",
            "batch": "BatchNorm",
            "both": "BatchNorm and dropout",
            "both, dropout after all": "BatchNorm, and dropout after all of them",
        },
    )
)
