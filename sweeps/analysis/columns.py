"""Which parameters of a study are the learning rate, the initialisation, the arm and the seed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan

from bn_lightning.sweeps.analysis.tolerance import Trial
from bn_lightning.sweeps.analysis.trials import Cell, Row, Table, is_diverged

AS_CONFIGURED = "as configured"
"""The name of what a study does not vary."""

_SPLITS = ("test", "val")


class NoGrid(ValueError):
    """The study varies something else than learning rates, initialisations, arms and seeds."""


@dataclass(frozen=True)
class Roles:
    """Parameters by the part they play, empty where the study has none.

    Args:
        lr: the learning rate.
        init: name or standard deviation of the initial weights.
        arm: what tells the networks apart that are compared; several are put together.
        seed: of weights and batches.
    """

    lr: str = ""
    init: str = ""
    arm: tuple[str, ...] = ()
    seed: str = ""

    @classmethod
    def of(cls, table: Table, given: "Roles | None" = None) -> "Roles":
        """The roles of a table's parameters, by their names.

        A learning rate is called `lr` or `learning_rate`, an initialisation `init` or `init.`
        something, an arm `norm`, a seed `seed`, each behind any prefix (`optimizer.lr`).

        Args:
            given: takes the place of what the names say.

        Raises:
            ValueError: `given` names what is no parameter.
            NoGrid: no learning rate, two parameters for one role, or others that vary as well.
        """
        given = given or cls()
        names = list(dict.fromkeys(name for row in table.rows for name in row.params))
        for option, chosen in asdict(given).items():
            for name in [chosen] if isinstance(chosen, str) else chosen:
                if name and name not in names:
                    raise ValueError(
                        f"`--{option}` expected one of the study's parameters, "
                        f"{', '.join(names) or 'of which it has none'}, got {name}"
                    )
        taken = {given.lr, given.init, given.seed, *given.arm}
        free = [name for name in names if name not in taken]
        roles = cls(
            given.lr or _one("--lr", [n for n in free if _last(n) in ("lr", "learning_rate")]),
            given.init or _one("--init", [n for n in free if _words(n)[0] == "init"]),
            given.arm or tuple(n for n in free if _last(n) == "norm"),
            given.seed or _one("--seed", [n for n in free if _last(n) == "seed"]),
        )
        if not roles.lr:
            raise NoGrid("it varies no learning rate")
        used = {roles.lr, roles.init, roles.seed, *roles.arm}
        others = [name for name in names if name not in used and _varies(table.rows, name)]
        if others:
            raise NoGrid(f"it also varies {', '.join(others)}")
        return roles


@dataclass(frozen=True)
class Scored:
    """The complete trials of a study as trials of a grid.

    Args:
        trials: one for each place.
        numbers: number in the study -> trial.
        metric: what their accuracy is, "test/accuracy" for instance.
        repeated: how many more there were for a place that had one; the first counts.
    """

    trials: tuple[Trial, ...]
    numbers: Mapping[int, Trial]
    metric: str
    repeated: int


def scored(table: Table, roles: Roles) -> Scored:
    """Turn the complete trials of a table into trials of a grid.

    Accuracy and loss are those on the test set, else on the validation set, else accuracy is the
    value that the study maximised.

    Raises:
        NoGrid: a value that is no accuracy in [0, 1], or a learning rate that is no number above 0.
    """
    complete = [row for row in table.rows if row.is_complete]
    split = next(
        (s for s in _SPLITS if all(_number(row, f"{s}/accuracy") is not None for row in complete)),
        None,
    )
    metric = f"{split}/accuracy" if split else "value"
    taken: set[tuple[str, Cell, float, int]] = set()
    numbers = {}
    for row in complete:
        trial = _trial(row, roles, split)
        place = (trial.arm, trial.init, trial.lr, trial.seed)
        if place not in taken:
            taken.add(place)
            numbers[row.number] = trial
    return Scored(tuple(numbers.values()), numbers, metric, len(complete) - len(numbers))


def arm_of(row: Row, roles: Roles) -> str:
    """The arm of a trial, in any state."""
    return ", ".join(_name(row.params.get(name)) for name in roles.arm) or AS_CONFIGURED


def _trial(row: Row, roles: Roles, split: str | None) -> Trial:
    accuracy = _number(row, f"{split}/accuracy") if split else row.values[0]
    if accuracy is None or not 0 <= accuracy <= 1:
        raise NoGrid(f"trial {row.number} has no accuracy in [0, 1], but {accuracy}")
    loss = _number(row, f"{split}/loss") if split else None
    lr = row.params.get(roles.lr)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0 or not isfinite(lr):
        raise NoGrid(f"trial {row.number} has a learning rate that is no number above 0: {lr}")
    init = row.params.get(roles.init) if roles.init else AS_CONFIGURED
    seed = row.params.get(roles.seed, 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise NoGrid(f"trial {row.number} has a seed that is no integer: {seed}")
    return Trial(
        arm_of(row, roles),
        float(init) if isinstance(init, int | float) else _name(init),
        float(lr),
        seed,
        float(accuracy),
        nan if loss is None else loss,
        is_diverged(row),
    )


def _number(row: Row, name: str) -> float | None:
    """A number among the attributes; where JSON has none for it, its sweeper wrote "nan"."""
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


def _varies(rows: Iterable[Row], name: str) -> bool:
    return len(Counter(row.params.get(name) for row in rows)) > 1
