"""Which parameters of a study are the learning rate, the initialization, the arm and the seed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite, nan

from bn_lightning.sweeps.analysis.arms import AS_CONFIGURED
from bn_lightning.sweeps.analysis.provenance import SEED
from bn_lightning.sweeps.analysis.tolerance import GridTrial
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable, is_diverged

UNKNOWN = "unknown"
"""The seed of a trial if neither the study nor its run says it."""

_SPLITS = ("test", "val")


class NoGrid(ValueError):
    """The study varies more than learning rate, initialization, arm and seed."""


@dataclass(frozen=True)
class Columns:
    """The parameters that span a grid, empty for what the study does not vary.

    Attributes:
        lr: the learning rate.
        init: name or standard deviation of the initial weights.
        arm: the parameters that tell the compared networks apart.
        seed: the seed of weights and batches.
    """

    lr: str = ""
    init: str = ""
    arm: tuple[str, ...] = ()
    seed: str = ""

    @classmethod
    def of(cls, table: TrialTable, given: "Columns | None" = None) -> "Columns":
        """Return the columns of a table, recognized by the names of its parameters.

        A learning rate is named `lr` or `learning_rate`, an initialization `init` or `init.*`, an
        arm `norm`, a seed `seed`, each with any prefix (`optimizer.lr`).

        Args:
            table: the trials.
            given: columns that override what the names say.

        Raises:
            ValueError: `given` names something that is not a parameter.
            NoGrid: there is no learning rate, there are two parameters for one column, or other
                parameters vary too.
        """
        columns = cls.named(table, given)
        if not columns.lr:
            raise NoGrid("it varies no learning rate")
        names = dict.fromkeys(name for row in table.rows for name in row.params)
        used = {columns.lr, columns.init, columns.seed, *columns.arm}
        others = [name for name in names if name not in used and _varies(table.rows, name)]
        if others:
            raise NoGrid(f"it also varies {', '.join(others)}")
        return columns

    @classmethod
    def named(cls, table: TrialTable, given: "Columns | None" = None) -> "Columns":
        """Return the columns of a table as `of` does, whatever else the study varies.

        Raises:
            ValueError: `given` names something that is not a parameter.
            NoGrid: there are two parameters for one column.
        """
        given = given or cls()
        names = list(dict.fromkeys(name for row in table.rows for name in row.params))
        for option, chosen in asdict(given).items():
            for name in [chosen] if isinstance(chosen, str) else chosen:
                if name and name not in names:
                    raise ValueError(
                        f"expected `--{option}` to be one of the study's parameters, "
                        f"{', '.join(names) or 'but it has none'}, got {name}"
                    )
        taken = {given.lr, given.init, given.seed, *given.arm}
        free = [name for name in names if name not in taken]
        return cls(
            given.lr or _one("--lr", [n for n in free if _last(n) in ("lr", "learning_rate")]),
            given.init or _one("--init", [n for n in free if _words(n)[0] == "init"]),
            given.arm or tuple(n for n in free if _last(n) == "norm"),
            given.seed or _one("--seed", [n for n in free if _last(n) == "seed"]),
        )

    def arm_of(self, row: TrialRow) -> str:
        """Return the name of a trial's arm."""
        return ", ".join(_name(row.params.get(name)) for name in self.arm) or AS_CONFIGURED


@dataclass(frozen=True)
class GridTrials:
    """The complete trials of a study as trials of a grid.

    Attributes:
        numbers: number in the study -> trial, one for each place of the grid.
        metric: the metric that is their accuracy, "test/accuracy" for instance, or that a study
            without an accuracy optimized.
        repeated: number of further trials of these places, which are ignored.
    """

    numbers: Mapping[int, GridTrial]
    metric: str
    repeated: int


def grid_trials(table: TrialTable, columns: Columns) -> GridTrials:
    """Return the complete trials of a table as trials of a grid.

    Accuracy and loss are those on the test set, otherwise those on the validation set, otherwise
    accuracy is the value that the study maximized, if its name says so. If the study does not vary
    the seed, it is that of the trials' runs.

    Raises:
        NoGrid: a value is not an accuracy in [0, 1], or a learning rate is not a number above 0.
    """
    complete = table.complete
    split = split_of(complete)
    metric = f"{split}/accuracy" if split else table.value_names[0]
    if not has_accuracy(table):
        raise NoGrid(f"its metric, {metric}, is no accuracy")
    found = _grid_trials(table, columns, metric, split)
    for number, trial in found.numbers.items():
        if not 0 <= trial.accuracy <= 1:
            raise NoGrid(f"trial {number} has no accuracy in [0, 1], but {trial.accuracy}")
    return found


def metric_trials(table: TrialTable, columns: Columns) -> GridTrials:
    """Return the complete trials of a table as `grid_trials` does, with its value as their result.

    Args:
        table: of one direction; its value may be any metric.
        columns: of the table.

    Raises:
        NoGrid: a learning rate is not a number above 0.
    """
    return _grid_trials(table, columns, table.value_names[0], None)


def has_accuracy(table: TrialTable) -> bool:
    """Return whether the complete trials have an accuracy: logged, or by name what is maximized."""
    if split_of(table.complete):
        return True
    words = re.split("[^a-z]+", table.value_names[0].lower())
    return table.directions == ("maximize",) and ("accuracy" in words or "acc" in words)


def _grid_trials(table: TrialTable, columns: Columns, metric: str, split: str | None) -> GridTrials:
    complete = table.complete
    has_seed = bool(columns.seed) or all(type(row.attributes.get(SEED)) is int for row in complete)
    taken: set[tuple[str, str | float, float, int | str]] = set()
    numbers = {}
    for row in complete:
        trial = _grid_trial(row, columns, split)
        if not has_seed:
            trial = replace(trial, seed=UNKNOWN)
        place = (trial.arm, trial.init, trial.lr, trial.seed)
        if place not in taken:
            taken.add(place)
            numbers[row.number] = trial
    return GridTrials(numbers, metric, len(complete) - len(numbers))


def split_of(rows: Iterable[TrialRow]) -> str | None:
    """Return "test" or else "val" if all complete trials have an accuracy on it, otherwise None."""
    rows = list(rows)
    return next(
        (s for s in _SPLITS if all(_number(row, f"{s}/accuracy") is not None for row in rows)),
        None,
    )


def accuracy_of(row: TrialRow, split: str | None) -> float | None:
    """Return the accuracy of a complete trial: on a split, or its value for None."""
    return _number(row, f"{split}/accuracy") if split else row.values[0]


def _grid_trial(row: TrialRow, columns: Columns, split: str | None) -> GridTrial:
    accuracy = accuracy_of(row, split)
    loss = _number(row, f"{split}/loss") if split else None
    lr = row.params.get(columns.lr)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0 or not isfinite(lr):
        raise NoGrid(f"trial {row.number} has a learning rate that is no number above 0: {lr}")
    init = row.params.get(columns.init) if columns.init else AS_CONFIGURED
    seed = row.params.get(columns.seed) if columns.seed else row.attributes.get(SEED)
    if columns.seed and type(seed) is not int:
        raise NoGrid(f"trial {row.number} has a seed that is no integer: {seed}")
    return GridTrial(
        arm=columns.arm_of(row),
        init=float(init) if isinstance(init, int | float) else _name(init),
        lr=float(lr),
        seed=seed if type(seed) is int else UNKNOWN,
        accuracy=nan if accuracy is None else accuracy,
        loss=nan if loss is None else loss,
        diverged=is_diverged(row),
    )


def _number(row: TrialRow, name: str) -> float | None:
    """Return an attribute as a number; a sweeper stores NaN as the text "nan"."""
    value = row.attributes.get(name)
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except ValueError:
        return None


def _name(value: Cell) -> str:
    return "none" if value is None else str(value)


def _words(name: str) -> list[str]:
    return name.lstrip("+").split(".")


def _last(name: str) -> str:
    return _words(name)[-1].rpartition("/")[2]


def _one(option: str, names: list[str]) -> str:
    if len(names) > 1:
        raise NoGrid(f"it varies {' and '.join(names)}; name one by {option}")
    return names[0] if names else ""


def _varies(rows: Iterable[TrialRow], name: str) -> bool:
    return len({row.params.get(name) for row in rows}) > 1
