"""Search spaces: from the syntax of Hydra's sweeps to Optuna's distributions, and back.

lr=0.1,0.3,1  lr=choice(0.1,0.3,1)   one of these; a choice may be a list, a dict or a quoted string
norm=glob(*)                         one of the options of a group
steps=range(100,500,100)             100, 200, 300 or 400: without the end, as in Hydra
lr=interval(0.001,1)                 a real number from 0.001 to 1
width=int(interval(8,64))            an integer from 8 to 64
lr=tag(log,interval(0.001,1))        the same on a logarithmic scale; also for int(...) and range
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import Trial

from bn_lightning.sweeps.engine.sweep_error import SweepError

Parameter = None | bool | int | float | str


@dataclass(frozen=True)
class Space:
    """The search space of a sweep, and the overrides that all trials share.

    Attributes:
        distributions: from the key of an override, as typed (`optimizer.lr`, `+extra`, `norm`), to
            its distribution. Choices other than numbers, bools and null are the text of an
            override.
        fixed: the other overrides, as typed.
        custom: suggests more parameters, which may depend on those that `distributions` gave.
    """

    distributions: dict[str, BaseDistribution]
    fixed: tuple[str, ...] = ()
    custom: Callable[[Trial], None] | None = None

    def suggest(self, trial: Trial) -> dict[str, Parameter]:
        """Let a trial draw all parameters, and return them.

        Raises:
            SweepError: `custom` suggests a parameter that a fixed override sets.
        """
        for name, d in self.distributions.items():
            if isinstance(d, CategoricalDistribution):
                trial.suggest_categorical(name, d.choices)
            elif isinstance(d, IntDistribution):
                trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
            elif isinstance(d, FloatDistribution):
                trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        if self.custom is not None:
            self.custom(trial)
            both = set(map(key_of, self.fixed)) & set(map(key_of, trial.params))
            if both:
                raise SweepError(
                    f"expected `custom_search_space` to suggest other keys than the command sets, "
                    f"got {', '.join(sorted(both))}; leave them out of one of the two"
                )
        return trial.params

    def grid(self) -> list[dict[str, Parameter]]:
        """Return all points; the last parameter changes fastest.

        Raises:
            SweepError: a parameter is continuous.
        """
        points: list[dict[str, Parameter]] = [{}]
        for name, distribution in self.distributions.items():
            values = _values(name, distribution)
            points = [{**point, name: value} for point in points for value in values]
        return points

    def describe(self) -> dict[str, str]:
        """Return each distribution as JSON, to compare spaces."""
        return {name: distribution_to_json(d) for name, d in self.distributions.items()}


def parse_space(
    params: Mapping[str, Any] | None,
    overrides: Iterable[str],
    loader: ConfigLoader | None = None,
    custom: Callable[[Trial], None] | None = None,
) -> Space:
    """Parse a search space.

    Args:
        params: from key to value in the syntax of overrides: the sweeper's configuration.
        overrides: of the command line; they replace `params` of the same key.
        loader: finds the options of a group for `glob`.
        custom: see `Space`.

    Raises:
        SweepError: an override cannot be parsed or swept.
    """
    parser = OverridesParser.create(config_loader=loader)
    texts = [f"{key}={value_text(value)}" for key, value in (params or {}).items()]
    parsed: dict[str, Override] = {}
    try:
        for override in [*parser.parse_overrides(texts), *parser.parse_overrides(list(overrides))]:
            key = key_of(override.get_key_element())
            if not override.is_sweep_override():
                parsed.pop(key, None)
            # A sweep keeps its place in `params`, and so the order of a grid.
            parsed[key] = override
    except HydraException as error:
        raise SweepError(str(error)) from error
    swept = [override for override in parsed.values() if override.is_sweep_override()]
    return Space(
        {override.get_key_element(): _distribution(override) for override in swept},
        tuple(_fixed_text(o) for o in parsed.values() if not o.is_sweep_override()),
        custom,
    )


def to_overrides(params: Mapping[str, Parameter]) -> list[str]:
    """Return the overrides of a run at this point."""
    return [f"{name}={value_text(value)}" for name, value in params.items()]


def value_text(value: Any) -> str:
    """Return a value as the text of an override; a string is such a text already."""
    return value if isinstance(value, str) else str(Transformer.str(value))


def sweep_text(distribution: BaseDistribution) -> str:
    """Return a distribution in the syntax in which a person types it."""
    if isinstance(distribution, CategoricalDistribution):
        texts = ",".join(map(value_text, distribution.choices))
        return texts if len(distribution.choices) > 1 else f"choice({texts})"
    if not isinstance(distribution, IntDistribution | FloatDistribution):
        return str(distribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    is_integer = isinstance(distribution, IntDistribution)
    if step is None or (is_integer and step == 1):
        text = f"int(interval({low},{high}))" if is_integer else f"interval({low},{high})"
    else:
        text = f"range({low},{Decimal(str(high)) + Decimal(str(step))},{step})"
    return f"tag(log,{text})" if distribution.log else text


def key_of(override: str) -> str:
    """Return the key of an override without the signs that add or delete it."""
    return override.partition("=")[0].lstrip("+~")


def flat(config: Mapping[str, Any], swept: Iterable[str] = (), prefix: str = "") -> dict[str, str]:
    """Return every dotted key of a configuration with its value as JSON, except the swept ones.

    Args:
        config: plain values, with interpolations unresolved.
        swept: keys of overrides, as typed; keys below them are left out, too.
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


def _values(name: str, distribution: BaseDistribution) -> list[Parameter]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
        count = int((Decimal(str(distribution.high)) - low) / step) + 1
        return [float(low + i * step) for i in range(count)]
    raise SweepError(
        f"expected `{name}` to be choices or a range for a grid, got an interval; list its values, "
        f"{name}=A,B, or choose another sampler, hydra/sweeper/sampler=tpe with "
        "hydra.sweeper.n_trials=N"
    )


def _distribution(override: Override) -> BaseDistribution:
    key = override.get_key_element()
    sweep = override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, IntervalSweep):
            return _interval(key, sweep, log)
        if isinstance(sweep, RangeSweep):
            return _range(key, sweep, log)
        return _choice(key, list(override.sweep_iterator()))
    except (ValueError, HydraException) as error:
        if isinstance(error, SweepError):
            raise
        raise SweepError(f"expected `{key}` to be a valid sweep, got: {error}") from error


def _choice(key: str, elements: list[Any]) -> BaseDistribution:
    choices: list[Parameter] = []
    for element in elements:
        is_plain = element is None or isinstance(element, bool | int | float)
        choice = element if is_plain else str(Transformer.str(element))
        if choice in choices:  # also 1, 1.0 and true, which Optuna cannot distinguish
            raise SweepError(f"expected `{key}` to be different choices, got {choice} twice")
        choices.append(choice)
    if not choices:
        raise SweepError(f"expected `{key}` to be at least one choice, got none")
    return CategoricalDistribution(choices)


def _interval(key: str, sweep: IntervalSweep, log: bool) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise SweepError(f"expected `{key}` to have finite limits, got {low} to {high}")
    if low > high:
        raise SweepError(f"expected `{key}` to have its lower limit first, got {low} to {high}")
    _check_log(key, low, high, log)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _range(key: str, sweep: RangeSweep, log: bool) -> BaseDistribution:
    numbers = (sweep.start, sweep.stop, sweep.step)
    start, stop, step = (Decimal(str(number)) for number in numbers)
    if step == 0:
        raise SweepError(f"expected `{key}` to have a step other than 0, got {sweep.step}")
    count = math.ceil((stop - start) / step)
    if count < 1:
        raise SweepError(
            f"expected `{key}` to be a range with at least one number, got {sweep.start} to "
            f"{sweep.stop} by {sweep.step}"
        )
    low, high = sorted((start, start + (count - 1) * step))
    step = abs(step)
    _check_log(key, low, high, log)
    if log and step != 1:
        raise SweepError(f"expected `{key}` to have a step of 1 for tag(log, ...), got {step}")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), log=log, step=int(step))
    return FloatDistribution(float(low), float(high), log=log, step=None if log else float(step))


def _check_log(key: str, low: float | Decimal, high: float | Decimal, log: bool) -> None:
    if log and low <= 0:
        raise SweepError(
            f"expected `{key}` to have limits above 0 for tag(log, ...), got {low} to {high}"
        )


def _fixed_text(override: Override) -> str:
    if override.is_delete():
        return str(override.input_line)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"
