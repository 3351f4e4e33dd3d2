"""What a claim is: a sentence, matched arms, a measure, and the rule of its verdict, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from bn_lightning.claims.measured_network import MeasuredNetwork

BUDGETS = ("quick", "full")

Overrides = tuple[str, ...]
"""Hydra overrides of `conf/train.yaml`."""


@dataclass(frozen=True)
class Setting:
    """A point at which arms of a claim are measured.

    Attributes:
        overrides: values of keys beside those of the arm, such as optimizer.lr=0.1; no option of
            a group.
        x: its place on the horizontal axis of the claim's figure.
        panel: title of its panel in the figure.
        is_trained: whether the network is trained as configured before it is measured.
        arms: names of the arms that are measured at it; () for all.
    """

    overrides: Overrides
    x: float
    panel: str = ""
    is_trained: bool = True
    arms: tuple[str, ...] = ()


class MeasuredPoint(NamedTuple):
    """What was measured of one arm and seed at one setting.

    Attributes:
        setting: the setting.
        measures: name -> value.
    """

    setting: Setting
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Condition:
    """A part of the rule of a verdict: where the 95% interval of an effect must be.

    The effect of a seed is `number` of `arm`, or its difference from that of `against`, or their
    ratio. The mean over seeds is judged by its bootstrap interval; ratios by their geometric mean.

    Attributes:
        name: where the claim is tested, such as "sigmoid": completes "holds if".
        number: key of what the claim's `numbers` returns.
        arm: the first arm.
        against: the second arm, "" for none.
        kind: of the effect; "value" without a second arm.
        least: smallest effect with which the condition holds; None for no limit.
        most: largest effect with which it holds; None for no limit.
        unit: of the effect, after its number.
        limit: key of a number that `number` cannot exceed, such as the budget in steps; seeds where
            both arms reach it say nothing and are left out. "" for none.
        is_control: whether it is reported beside the verdict and does not decide it.
        statement: what it says, in words that stand alone; "" for the name.
    """

    name: str
    number: str
    arm: str
    against: str = ""
    kind: Literal["value", "difference", "ratio"] = "difference"
    least: float | None = None
    most: float | None = None
    unit: str = ""
    limit: str = ""
    is_control: bool = False
    statement: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the condition as plain values, always with a statement."""
        return asdict(self) | {"statement": self.statement or self.name}


@dataclass(frozen=True)
class Curves:
    """Panels of a claim's figure, one for each `Setting.panel`: a curve of each arm, with a band.

    Attributes:
        measure: key of what the claim's `measure` returns, on the vertical axis.
        label: of the vertical axis.
        x_label: of the horizontal axis.
        scale: of the vertical axis.
        x_scale: of the horizontal axis.
        along: name of a curve -> measure -> x, for curves within one setting; {} for one point of a
            curve for each setting.
        threshold: name -> value of horizontal lines, such as the accuracy that a rule asks for.
    """

    measure: str
    label: str
    x_label: str
    scale: Literal["linear", "log"] = "linear"
    x_scale: Literal["linear", "log"] = "log"
    along: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    threshold: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim and its test, which are written before the test runs.

    Attributes:
        name: what one types, and the name of its file.
        sentence: the claim.
        source: who claims it, and who denies it.
        base: overrides of all arms.
        arms: name -> overrides. Arms of one seed have the same initial weights and batches.
        settings: takes a name of `BUDGETS`; returns label -> setting.
        measure: returns name -> value for a network; NaN and infinity are allowed.
        numbers: takes what was measured of one arm and seed; returns one number for each name.
        conditions: the rule.
        curves: the figure: panels for each.
        not_varied: what the test kept fixed.
        would_change: what would change the verdict.
        least_steps: budget in training steps below which the measure means nothing.
        network: class of the network that the claim is about; others are refused.
        arm_labels: arm -> its label in figures, where its name does not stand alone.
    """

    name: str
    sentence: str
    source: str
    base: Overrides
    arms: Mapping[str, Overrides]
    settings: Callable[[str], Mapping[str, Setting]]
    measure: Callable[[MeasuredNetwork], Mapping[str, float]]
    numbers: Callable[[Sequence[MeasuredPoint]], Mapping[str, float]]
    conditions: tuple[Condition, ...]
    curves: tuple[Curves, ...]
    not_varied: str
    would_change: str
    least_steps: int = 1
    network: type[nn.Module] = nn.Module
    arm_labels: Mapping[str, str] = field(default_factory=dict)

    def settings_of(self, budget: str, arm: str) -> dict[str, Setting]:
        """Return the settings of one arm, label -> setting.

        Args:
            budget: a name of `BUDGETS`.
            arm: a key of `arms`.
        """
        settings = self.settings(budget)
        return {label: s for label, s in settings.items() if arm in (s.arms or self.arms)}
