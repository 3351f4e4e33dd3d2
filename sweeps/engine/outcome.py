"""How a trial ended, and the file in its directory that says so before the study knows.

A task returns a number, one number for each direction, or a mapping that has them by name. Every
number, text, bool or None of a mapping becomes an attribute of the trial.
"""

import json
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.trial import TrialState

from bn_lightning.sweeps.engine.environment import STORAGE
from bn_lightning.sweeps.engine.passwords import redacted

FILE_NAME = "outcome.json"

# Of an error's traceback: what is kept with the trial.
ERROR_LINES, ERROR_CHARACTERS = 12, 2000

# Attributes that the sweeper itself gives a trial.
DIRECTORY, SECONDS, ERROR, INTERRUPTED, HOPELESS = (
    "directory",
    "seconds",
    "error",
    "interrupted",
    "hopeless",
)
# Attribute that a task may give: its run came to its end without having learnt.
DIVERGED = "diverged"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        state: the name of an `optuna.trial.TrialState`: COMPLETE, PRUNED or FAIL.
        values: one for each direction, of a complete trial.
        attributes: the trial's user attributes: what the task returned, `seconds`, `directory`; of
            a failed one `error`, `interrupted` if it was stopped, `hopeless` if trying again is no
            use.
    """

    state: str
    values: list[float] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def trial_state(self) -> TrialState:
        """The state as Optuna has it."""
        return TrialState[self.state]

    def with_attributes(self, **attributes: Any) -> "Outcome":
        """The same outcome with more attributes, which replace those of the same name."""
        return Outcome(self.state, self.values, self.attributes | attributes)

    def write(self, directory: Path) -> None:
        """Write the outcome into the trial's directory, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{FILE_NAME}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            part.replace(directory / FILE_NAME)
        finally:
            part.unlink(missing_ok=True)


def read_outcome(directory: Path) -> Outcome | None:
    """The outcome in a trial's directory, None if there is none."""
    try:
        return Outcome(**json.loads((directory / FILE_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def outcome_of(result: Any, metrics: Sequence[str] | None, directions: int) -> Outcome:
    """The outcome of a task that came to its end.

    Args:
        result: what the task returned.
        metrics: the names of the values in a mapping, one for each direction.
        directions: how many values a trial has.
    """
    attributes = _attributes(result) if isinstance(result, Mapping) else {}
    if isinstance(result, Mapping):
        if metrics is None:
            return _unusable(
                f"`metric` expected the name of the value to sweep for, as the task returns "
                f"{_names(result)}; set hydra.sweeper.metric",
                attributes,
            )
        missing = [name for name in metrics if result.get(name) is None]
        if missing:
            return _unusable(
                f"the task was expected to return `{missing[0]}`, got {_names(result)}", attributes
            )
        values = [result[name] for name in metrics]
    else:
        values = list(result) if isinstance(result, list | tuple) else [result]
    expected = "a number" if directions == 1 else f"{directions} numbers"
    if len(values) != directions:
        return _unusable(
            f"the task was expected to return {expected}, got {len(values)}: {values}", attributes
        )
    numbers = [_number(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if number is None or math.isnan(number):
            return _unusable(
                f"the task was expected to return {expected}, got {value!r}"
                + ("; score a run that diverged, or raise an error" if number is not None else ""),
                attributes,
            )
    return Outcome("COMPLETE", [number for number in numbers if number is not None], attributes)


def outcome_of_error(error: BaseException) -> Outcome:
    """The outcome of a task that raised."""
    if isinstance(error, TrialPruned):
        return Outcome("PRUNED")
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return failed("\n".join(lines[-ERROR_LINES:]))


def failed(error: str, **attributes: Any) -> Outcome:
    """The outcome of a trial without a result."""
    error = redacted(error, os.environ.get(STORAGE, ""))
    return Outcome("FAIL", None, {ERROR: error[-ERROR_CHARACTERS:], **attributes})


def interrupted() -> Outcome:
    """The outcome of a trial that was stopped: it will be tried again, and it is no failure."""
    return failed("interrupted", **{INTERRUPTED: True})


def last_line(error: str) -> str:
    """The line of an error that says what was wrong."""
    return (error.strip().splitlines() or [""])[-1]


def _unusable(error: str, attributes: dict[str, Any]) -> Outcome:
    return failed(error, **{HOPELESS: True}, **attributes)


def _attributes(result: Mapping[Any, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name, value in result.items():
        number = None if isinstance(value, bool | int | str) else _number(value)
        if value is None or isinstance(value, bool | int | str):
            attributes[str(name)] = value
        elif number is not None:
            # JSON has neither NaN nor infinity, and databases take neither.
            attributes[str(name)] = number if math.isfinite(number) else str(number)
    return attributes


def _number(value: Any) -> float | None:
    """A number of Python, NumPy or a tensor with one element."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _names(result: Mapping[Any, Any]) -> str:
    return ", ".join(str(name) for name in result) or "an empty mapping"
