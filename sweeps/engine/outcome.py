"""How a trial ended, and the file in which a trial records that before its study does.

A task returns a number, one number for each direction, or a mapping that contains them by name.
Each number, string, bool or None of a mapping becomes a user attribute of the trial.
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

from bn_lightning.sweeps.engine.environment import STORAGE_VARIABLE
from bn_lightning.sweeps.engine.passwords import redacted
from bn_lightning.sweeps.engine.stored_names import ERROR, HOPELESS, INTERRUPTED, OUTCOME_FILE

# The part of a traceback that is stored with the trial.
ERROR_LINES, ERROR_CHARACTERS = 12, 2000


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: name of an `optuna.trial.TrialState`: COMPLETE, PRUNED or FAIL.
        values: one for each direction if the trial is complete, else None.
        attributes: user attributes of the trial: those that the task returned, and those that
            `stored_names` lists.
    """

    state: str
    values: list[float] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def trial_state(self) -> TrialState:
        """The state as Optuna's enum."""
        return TrialState[self.state]

    def write(self, directory: Path) -> None:
        """Write the outcome into the directory of the trial, atomically."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{OUTCOME_FILE}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            part.replace(directory / OUTCOME_FILE)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def read_outcome(directory: Path) -> Outcome | None:
    """Return the outcome in the directory of a trial; None if there is none."""
    try:
        return Outcome(**json.loads((directory / OUTCOME_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def outcome_of(result: Any, metrics: Sequence[str] | None, n_directions: int) -> Outcome:
    """Return the outcome of a task that did not raise.

    Args:
        result: what the task returned.
        metrics: keys of the values in a mapping, one for each direction.
        n_directions: how many values a trial has.
    """
    attributes: dict[str, Any] = {}
    if isinstance(result, Mapping):
        attributes = _attributes(result)
        returned = ", ".join(map(str, result)) or "an empty mapping"
        if metrics is None:
            return _unusable(
                f"expected `metric` to name the value to optimize, got null for a task that "
                f"returns {returned}; set hydra.sweeper.metric",
                attributes,
            )
        missing = [name for name in metrics if result.get(name) is None]
        if missing:
            return _unusable(
                f"expected the task to return `{missing[0]}`, got {returned}; set "
                "hydra.sweeper.metric to one of them",
                attributes,
            )
        values = [result[name] for name in metrics]
    else:
        values = list(result) if isinstance(result, list | tuple) else [result]
    expected = "a number" if n_directions == 1 else f"{n_directions} numbers"
    if len(values) != n_directions:
        return _unusable(
            f"expected the task to return {expected}, got {len(values)}: {values}; set "
            "hydra.sweeper.direction to one direction for each",
            attributes,
        )
    numbers: list[float] = []
    for value in values:
        number = _number(value)
        if number is None or math.isnan(number):
            return _unusable(
                f"expected the task to return {expected}, got {value!r}; "
                "return a score for a run that diverged, or raise an error",
                attributes,
            )
        numbers.append(number)
    return Outcome("COMPLETE", numbers, attributes)


class PrunedInBatch(TrialPruned):
    """Raised by the task of a trial that was pruned while it trained together with others.

    Attributes:
        attributes: user attributes of the trial.
    """

    def __init__(self, reason: str, attributes: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.attributes = attributes


def outcome_of_error(error: BaseException) -> Outcome:
    """Return the outcome of a task that raised."""
    if isinstance(error, TrialPruned):
        return Outcome("PRUNED", None, _attributes(getattr(error, "attributes", {})))
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return failed("\n".join(lines[-ERROR_LINES:]))


def failed(error: str, **attributes: Any) -> Outcome:
    """Return the outcome of a trial without a result; the storage's password is redacted."""
    error = redacted(error, os.environ.get(STORAGE_VARIABLE, ""))
    return Outcome("FAIL", None, {ERROR: error[-ERROR_CHARACTERS:], **attributes})


def interrupted() -> Outcome:
    """Return the outcome of a trial that was stopped; it is repeated and not counted as failed."""
    return failed("interrupted", **{INTERRUPTED: True})


def last_line(error: str) -> str:
    """Return the last line of an error, which states what is wrong."""
    return (error.strip().splitlines() or [""])[-1]


def _unusable(error: str, attributes: dict[str, Any]) -> Outcome:
    return failed(error, **{HOPELESS: True}, **attributes)


def _attributes(result: Mapping[Any, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name, value in result.items():
        if value is None or isinstance(value, bool | int | str):
            attributes[str(name)] = value
        elif (number := _number(value)) is not None:
            # Neither JSON nor databases can store NaN and infinity.
            attributes[str(name)] = number if math.isfinite(number) else str(number)
    return attributes


def _number(value: Any) -> float | None:
    """Return a number of Python or NumPy, or the element of a tensor, as a float."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
