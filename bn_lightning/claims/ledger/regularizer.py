"""Whether BatchNorm regularizes, over sizes of batches and of the parts that are normalized."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import evaluated_accuracy
from bn_lightning.claims.registry import register_claim
from bn_lightning.models.classifier import Batch, Classifier

_EXAMPLES = 1000
_RATE = 0.05
_TESTED = (4, 32, 256)  # batch sizes of the rule
_WHOLE = _TESTED[-1]  # of the batches that are normalized in parts
_PARTS = (4, 16)  # sizes of the rule
_POPULATION = 32  # size of the batches whose statistics are those of all examples
_LEARNED = 99.9  # training accuracy in percent
_LEAST, _LEAST_OF_NOISE = 1.0, 0.5  # points of the gap
_IN_PARTS, _OF_ALL = f"batches of {_WHOLE} in parts", "statistics of all examples"


class PopulationClassifier(Classifier):
    """Trains on a part of each batch, whose other samples count for BatchNorm's statistics alone.

    With all samples of the training set in each batch, the statistics are those of the population,
    and the gradient also goes through them.

    Args:
        network: as for `Classifier`.
        part: number of samples in the loss, the first of the batch.
        options: those of `Classifier`.
    """

    def __init__(self, network: Any, part: int, **options: Any) -> None:
        super().__init__(network, **options)
        self.part = part

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, target = batch
        return self.loss(self.network(x)[: self.part], target[: self.part])


def _settings(budget: str) -> Mapping[str, Setting]:
    # The quick budget is too short to learn the examples in batches of 4 with BatchNorm, so that it
    # leaves this size undecided.
    steps_of, parts = {
        "quick": ({4: 2000, 32: 1200, 256: 1000}, _PARTS),
        "full": (
            {4: 40_000, 8: 20_000, 16: 10_000, 32: 3000, 64: 2000, 128: 2000, 256: 2000},
            (*_PARTS, 8, 32, 64, 128),
        ),
    }[budget]

    def setting(size: int, x: int, arms: tuple[str, ...], *overrides: str) -> Setting:
        steps = f"trainer.max_steps={steps_of[size]}"
        return Setting((*overrides, steps), float(x), arms=arms)

    whole = {
        f"batch {size}": setting(size, size, ("batch", "none"), f"data.batch_size={size}")
        for size in steps_of
    }
    in_parts = {
        f"batch {_WHOLE}, parts of {size}": setting(
            _WHOLE, size, (_IN_PARTS,), f"data.batch_size={_WHOLE}", f"norm.ghost_size={size}"
        )
        for size in parts
    }
    all_of_them = (f"data.batch_size={_EXAMPLES}", f"model.part={_POPULATION}")
    population = setting(_POPULATION, _POPULATION, (_OF_ALL,), *all_of_them)
    return {**whole, **in_parts, f"batch {_POPULATION} of all": population}


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    model, data = network.model(), network.data()
    data.batch_size = _EXAMPLES  # all of them: smaller batches leave out the last ones
    training = 100 * evaluated_accuracy(model.network, data.train_dataloader())
    test = 100 * network.metrics["test/accuracy"]
    return {"training accuracy": training, "test accuracy": test, "gap": training - test}


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for point in points:
        training, size = point.measures["training accuracy"], f"{point.setting.x:g}"
        # A network that has not learned its examples has a small gap for another reason.
        gap = point.measures["gap"] if training >= _LEARNED else math.nan
        is_part = point.setting.arms == (_IN_PARTS,)
        found[f"gap, {'parts' if is_part else 'batches'} of {size}"] = gap
        found[f"training accuracy, batches of {size}"] = training
        if size == f"{_WHOLE}":  # what the parts are compared with
            found |= {f"gap, parts of {part}": gap for part in _PARTS}
    return found


register_claim(
    Claim(
        name="regularizer",
        sentence="BatchNorm regularizes: the gap between training and test accuracy is smaller.",
        source="Ioffe & Szegedy 2015, section 3.4; Luo et al. 2018, arXiv 1809.00846: by the "
        "noise of the batch's statistics, so that it fades with the size of the batch",
        base=(
            "model.network.activation=relu",
            "init=he",
            f"optimizer.lr={_RATE}",
            "scheduler={_target_: torch.optim.lr_scheduler.LinearLR, _partial_: true, "
            "start_factor: 1.0, end_factor: 0.0, total_iters: '${trainer.max_steps}'}",
            f"data.train_samples={_EXAMPLES}",
        ),
        arms={
            "batch": ("norm=batch",),
            "none": ("norm=none",),
            _IN_PARTS: ("norm=ghost",),
            _OF_ALL: (
                "norm=batch",
                f"model._target_={__name__}.{PopulationClassifier.__name__}",
                "+model.part=1",
            ),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            *(
                Condition(
                    f"batches of {size}",
                    f"gap, batches of {size}",
                    "none",
                    "batch",
                    least=_LEAST,
                    unit="points more without BatchNorm",
                )
                for size in _TESTED
            ),
            *(
                Condition(
                    f"parts of {size} in batches of {_WHOLE} regularize more than whole batches",
                    f"gap, parts of {size}",
                    "batch",
                    _IN_PARTS,
                    least=_LEAST_OF_NOISE,
                    unit="points",
                    is_control=True,
                )
                for size in _PARTS
            ),
            Condition(
                f"statistics of all examples regularize less, batches of {_POPULATION}",
                f"gap, batches of {_POPULATION}",
                _OF_ALL,
                "batch",
                least=_LEAST_OF_NOISE,
                unit="points",
                is_control=True,
            ),
            *(
                Condition(
                    f"training accuracy, batches of {size}, {label}",
                    f"training accuracy, batches of {size}",
                    arm,
                    kind="value",
                    least=_LEARNED,
                    unit="%",
                    is_control=True,
                    statement=f"training accuracy {label} BatchNorm, batches of {size}",
                )
                for size in _TESTED
                for arm, label in (("batch", "with"), ("none", "without"))
            ),
        ),
        curves=(
            Curves("gap", "training minus\ntest accuracy, points", "size of a batch, or of a part"),
            Curves(
                "training accuracy",
                "training accuracy, %",
                "size of a batch, or of a part",
                threshold={f"has learned: {_LEARNED:g}%": _LEARNED},
            ),
        ),
        not_varied=f"The same {_EXAMPLES:,} examples for all seeds, three hidden layers of 100 "
        f"ReLUs, He initialization, plain SGD whose rate falls from {_RATE:g} to 0, no other "
        f"regularization. Seeds of a network that learned less than {_LEARNED:g}% of its examples "
        "are left out of the gap; with the quick budget these are all with BatchNorm in batches of "
        f"4. Statistics of all examples, with the gradient through them, have a loss of "
        f"{_POPULATION} of them in each step.",
        would_change="More examples, with which the gap is smaller; another rate, whose noise "
        "regularizes too; weight decay or augmentation.",
        least_steps=50,
        arm_labels={arm: f"with BatchNorm, {arm}" for arm in (_IN_PARTS, _OF_ALL)},
    )
)
