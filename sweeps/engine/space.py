"""Search spaces: Hydra's sweep syntax becomes Optuna's distributions, and a point its overrides.

lr=0.1,0.3,1  lr=choice(0.1,0.3,1)   one of these; a choice may be a list, a dict or a quoted text
norm=glob(*)                         one of a group's options
steps=range(100,500,100)             100, 200, 300 or 400: as in Hydra, without the end
lr=interval(0.001,1)                 a real number from 0.001 to 1
width=int(interval(8,64))            an integer from 8 to 64
lr=tag(log,interval(0.001,1))        the same on a logarithmic scale; also int(...) and range
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import Trial

from bn_lightning.sweeps.engine.errors import SweepError

Parameter = None | bool | int | float | str
CustomSpace = Callable[[DictConfig, Trial], None]


@dataclass(frozen=True)
class Space:
    """What is swept, and what every trial shares.

    Args:
        distributions: override key, as typed (`optimizer.lr`, `+extra`, `norm`), to what it may be.
            A choice that is no number, bool or null is the text of its override.
        fixed: the other overrides, as typed.
    """

    distributions: dict[str, BaseDistribution]
    fixed: list[str] = field(default_factory=list)

    def suggest(
        self, trial: Trial, custom: CustomSpace | None = None, config: DictConfig | None = None
    ) -> dict[str, Parameter]:
        """Draw a point by `trial`, and return its parameters.

        Args:
            custom: called with `config` and `trial` once the flat parameters are drawn: it may
                suggest more, depending on them.

        Raises:
            SweepError: `custom` suggests what an override already sets.
        """
        suggest(trial, self.distributions)
        if custom is not None:
            custom(config or DictConfig({}), trial)
            set_twice = {key_of(text) for text in self.fixed} & {
                key_of(name) for name in trial.params
            }
            if set_twice:
                raise SweepError(
                    f"`custom_search_space` suggests {', '.join(sorted(set_twice))}, which the "
                    "command sets already; leave one of the two out"
                )
        return trial.params

    def grid(self) -> list[dict[str, Parameter]]:
        """Every point, the last parameter changing fastest.

        Raises:
            SweepError: a parameter is continuous.
        """
        points: list[dict[str, Parameter]] = [{}]
        for name, distribution in self.distributions.items():
            values = enumerated(name, distribution)
            points = [{**point, name: value} for point in points for value in values]
        return points

    def describe(self) -> dict[str, str]:
        """The space as plain text, to tell whether a study was made for it."""
        return {name: distribution_to_json(d) for name, d in self.distributions.items()}


def parse_space(
    params: Mapping[str, Any] | None, arguments: Iterable[str], loader: ConfigLoader | None = None
) -> Space:
    """Read a search space.

    Args:
        params: key to value in the syntax of an override, from the sweeper's configuration.
        arguments: overrides of the command line; one of the same key goes before `params`.
        loader: finds the options of a group for `glob`.

    Raises:
        SweepError: an override cannot be swept.
    """
    parser = OverridesParser.create(config_loader=loader)
    texts = [f"{key}={_as_text(value)}" for key, value in (params or {}).items()]
    overrides: dict[str, Override] = {}
    try:
        for override in [*parser.parse_overrides(texts), *parser.parse_overrides(list(arguments))]:
            key = key_of(override.get_key_element())
            if key in overrides and override.is_sweep_override():
                # Where it stood in `params`, so that the order of a grid stays.
                overrides[key] = override
            else:
                overrides.pop(key, None)
                overrides[key] = override
    except HydraException as error:
        raise SweepError(str(error)) from error
    swept = [override for override in overrides.values() if override.is_sweep_override()]
    return Space(
        {override.get_key_element(): distribution_of(override) for override in swept},
        [_fixed_text(o) for o in overrides.values() if not o.is_sweep_override()],
    )


def distribution_of(override: Override) -> BaseDistribution:
    """The distribution of one sweep override.

    Raises:
        SweepError: it is empty, repeats a choice, or has limits that cannot be.
    """
    key = override.get_key_element()
    sweep = override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, IntervalSweep):
            return _interval(key, sweep, log)
        if isinstance(sweep, RangeSweep):
            return _range(key, sweep, log)
        return _choice(key, [_choice_value(element) for element in override.sweep_iterator()])
    except (ValueError, HydraException) as error:
        raise SweepError(f"`{key}`: {error}") from error


def to_overrides(params: Mapping[str, Parameter]) -> list[str]:
    """The overrides that make a run of this point."""
    return [f"{name}={value_text(value)}" for name, value in params.items()]


def value_text(value: Parameter) -> str:
    """A parameter as an override has it; text is an override's text already."""
    return value if isinstance(value, str) else str(Transformer.str(value))


def suggest(trial: Trial, distributions: Mapping[str, BaseDistribution]) -> None:
    """Draw every parameter of `distributions`."""
    for name, d in distributions.items():
        if isinstance(d, CategoricalDistribution):
            trial.suggest_categorical(name, d.choices)
        elif isinstance(d, IntDistribution):
            trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
        elif isinstance(d, FloatDistribution):
            trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)


def enumerated(name: str, distribution: BaseDistribution) -> list[Parameter]:
    """All values of a discrete distribution.

    Raises:
        SweepError: it is continuous.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
        count = int((Decimal(str(distribution.high)) - low) / step) + 1
        return [float(low + i * step) for i in range(count)]
    raise SweepError(
        f"`{name}` expected choices or a range, as a grid is finite, got an interval; list its "
        f"values, {name}=A,B, or choose another sampler, hydra/sweeper/sampler=tpe with "
        "hydra.sweeper.n_trials=N"
    )


def key_of(override: str) -> str:
    """The key of an override, without the signs that add or remove it."""
    return override.partition("=")[0].lstrip("+~")


def flat(config: Mapping[str, Any], swept: Iterable[str] = (), prefix: str = "") -> dict[str, str]:
    """Every key of a configuration with its value as JSON, without those that are swept.

    Args:
        config: plain values, interpolations as they are written.
        swept: override keys, as typed; what lies below one is left out, too.
        prefix: of all keys.
    """
    found: dict[str, str] = {}
    skipped = {key_of(name) for name in swept}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in skipped:
            continue
        if isinstance(value, Mapping) and value:
            found |= flat(value, skipped, f"{key}.")
        else:
            found[key] = json.dumps(value, default=str)
    return found


def _choice_value(element: Any) -> Parameter:
    if element is None or isinstance(element, bool | int | float):
        return element
    return str(Transformer.str(element))


def _choice(key: str, choices: list[Parameter]) -> BaseDistribution:
    if not choices:
        raise SweepError(f"`{key}` expected at least one choice, got none")
    # As Python compares, so that 1, 1.0 and true are one choice: Optuna could not tell them apart.
    repeated = next((c for i, c in enumerate(choices) if c in choices[:i]), _NOTHING)
    if repeated is not _NOTHING:
        raise SweepError(f"`{key}` expected different choices, got {repeated} twice")
    return CategoricalDistribution(choices)


_NOTHING = object()


def _interval(key: str, sweep: IntervalSweep, log: bool) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise SweepError(f"`{key}` expected finite limits, got {low} to {high}")
    if low > high:
        raise SweepError(f"`{key}` expected its lower limit first, got {low} to {high}")
    if log and low <= 0:
        raise SweepError(f"`{key}` expected limits above 0 for tag(log, ...), got {low} to {high}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _range(key: str, sweep: RangeSweep, log: bool) -> BaseDistribution:
    numbers = (sweep.start, sweep.stop, sweep.step)
    start, stop, step = (Decimal(str(number)) for number in numbers)
    if step == 0:
        raise SweepError(f"`{key}` expected a step other than 0, got {sweep.step}")
    count = math.ceil((stop - start) / step)
    if count < 1:
        raise SweepError(
            f"`{key}` expected a range that holds a number, got {sweep.start} to {sweep.stop} by "
            f"{sweep.step}"
        )
    low, high = sorted((start, start + (count - 1) * step))
    step = abs(step)
    if log and low <= 0:
        raise SweepError(f"`{key}` expected limits above 0 for tag(log, ...), got {low} to {high}")
    if log and step != 1:
        raise SweepError(f"`{key}` expected a step of 1 for tag(log, range(...)), got {step}")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), log=log, step=int(step))
    return FloatDistribution(float(low), float(high), log=log, step=None if log else float(step))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(Transformer.str(value))


def _fixed_text(override: Override) -> str:
    if override.is_delete():
        return str(override.input_line)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"
