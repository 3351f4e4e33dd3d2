"""Whether BatchNorm regularizes, over sizes of batches and of the parts that are normalized."""

import math
from collections.abc import Mapping, Sequence

from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import evaluated_accuracy
from bn_lightning.claims.registry import register_claim

_EXAMPLES = 1000
_RATE = 0.05
_TESTED = (4, 32, 256)  # batch sizes of the rule
_LEARNED = 99.9  # training accuracy in percent
_LEAST, _LEAST_OF_PARTS = 1.0, 0.5  # points of the gap


def _settings(budget: str) -> Mapping[str, Setting]:
    # The quick budget is too short to learn the examples in batches of 4 with BatchNorm, so that it
    # leaves this size undecided.
    steps_of = {
        "quick": {4: 2000, 32: 2000, 256: 1000},
        "full": {4: 20_000, 8: 10_000, 16: 5000, 32: 5000, 64: 5000, 128: 5000, 256: 5000},
    }[budget]
    return {
        f"batch {size}": Setting(
            (f"data.batch_size={size}", f"trainer.max_steps={steps}"), float(size)
        )
        for size, steps in steps_of.items()
    }


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    model, data = network.model(), network.data()
    data.batch_size = _EXAMPLES  # all of them: smaller batches leave out the last ones
    training = 100 * evaluated_accuracy(model.network, data.train_dataloader())
    test = 100 * network.metrics["test/accuracy"]
    return {"training accuracy": training, "test accuracy": test, "gap": training - test}


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for point in points:
        training, where = point.measures["training accuracy"], f"batches of {point.setting.x:g}"
        # A network that has not learned its examples has a small gap for another reason.
        found[f"gap, {where}"] = point.measures["gap"] if training >= _LEARNED else math.nan
        found[f"training accuracy, {where}"] = training
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
            f"data.train_samples={_EXAMPLES}",
        ),
        arms={
            "batch": ("norm=batch",),
            "none": ("norm=none",),
            "parts of 4": ("norm=ghost", "norm.ghost_size=4"),
            "parts of 16": ("norm=ghost", "norm.ghost_size=16"),
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
                    unit="points more without",
                )
                for size in _TESTED
            ),
            *(
                Condition(
                    f"{parts} in batches of {_TESTED[-1]} regularize more than whole batches",
                    f"gap, batches of {_TESTED[-1]}",
                    "batch",
                    parts,
                    least=_LEAST_OF_PARTS,
                    unit="points",
                    is_control=True,
                )
                for parts in ("parts of 4", "parts of 16")
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
                )
                for size in _TESTED
                for arm, label in (("batch", "with"), ("none", "without"))
            ),
        ),
        curves=(
            Curves("gap", "training minus test accuracy, points", "batch size"),
            Curves("training accuracy", "training accuracy, %", "batch size"),
        ),
        not_varied=f"The same {_EXAMPLES:,} examples for all seeds, three hidden layers of 100 "
        f"ReLUs, He initialization, plain SGD with rate {_RATE:g}, no other regularization. Seeds "
        f"of a network that learned less than {_LEARNED:g}% of its examples are left out of the "
        "gap. Batches that are no larger than a part are one part.",
        would_change="More examples, with which the gap is smaller; another rate, whose noise "
        "regularizes too; weight decay or augmentation.",
        least_steps=50,
    )
)
