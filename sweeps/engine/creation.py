"""Making a study, or finding the one to go on with, and seeing that it is for the same sweep."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.study import Study

from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.heartbeat import signature
from bn_lightning.sweeps.engine.names import DESCRIPTION
from bn_lightning.sweeps.engine.storage import PatientStorage

Direction = Literal["minimize", "maximize"]

# Attribute of a study: who is filling it with waiting trials.
FILLER = "sweep:filler"

# Seconds in which a new study gets its description.
DESCRIPTION_PATIENCE = 10.0

# Of what differs between two configurations.
MOST_SHOWN = 5


def filler_mark() -> str:
    """What the process that fills a study leaves in it meanwhile: its signature, and a mark."""
    return f"{signature()} {uuid.uuid4()}"


def create_study(
    storage: PatientStorage, name: str, directions: Sequence[Direction], description: dict[str, Any]
) -> bool:
    """Make the study if there is none of this name, else see that it is for the same sweep.

    Args:
        storage: where it is, or will be.
        name: of the study.
        directions: "minimize" or "maximize", one for each value.
        description: JSON of what must be the same when the sweep goes on: `space`, `overrides`, and
            `configuration`, which a study of an earlier version lacks.

    Returns:
        Whether it was made: then the caller fills it (`SweepStudy.fill_first`).

    Raises:
        SweepError: the study there has another direction, space, configuration, or other overrides.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        _check_same(optuna.load_study(study_name=name, storage=storage), directions, description)
        return False
    study.set_user_attr(FILLER, filler_mark())
    study.set_user_attr(DESCRIPTION, description)
    return True


def study_name(base: str, fresh: bool, exists: Callable[[str], bool]) -> str:
    """The name of the study to go on with or to make: `base`, `base-2`, `base-3`...

    Args:
        fresh: make a new one, whose name is not taken; else the newest one there is.
        exists: whether there is a study of this name.
    """
    newest, next_name, number = base, base, 1
    while exists(next_name):
        newest, number = next_name, number + 1
        next_name = f"{base}-{number}"
    return next_name if fresh else newest


def _check_same(study: Study, directions: Sequence[Direction], description: dict[str, Any]) -> None:
    advice = "; choose another hydra.sweeper.study_name, or hydra.sweeper.restart=fresh"
    found = [direction.name.lower() for direction in study.directions]
    if found != list(directions):
        raise SweepError(
            f"the study {study.study_name} was made to {' and '.join(found)}, and this sweep is to "
            f"{' and '.join(directions)}{advice}"
        )
    started = time.monotonic()
    while (before := study.user_attrs.get(DESCRIPTION)) is None:
        if time.monotonic() - started > DESCRIPTION_PATIENCE:
            if study.get_trials(deepcopy=False):
                raise SweepError(
                    f"the study {study.study_name} was not made by this sweeper{advice}"
                )
            # Its maker died before it could say what it was for.
            study.set_user_attr(DESCRIPTION, description)
            return
        time.sleep(0.2)
    for key, how in (
        ("space", "for another space"),
        ("overrides", "with other overrides"),
        ("configuration", "with another configuration"),
    ):
        if key in before and before[key] != description[key]:
            raise SweepError(
                f"the study {study.study_name} was made {how}: "
                f"{_difference(before[key], description[key])}; repeat the command it was begun "
                f"with{advice}"
            )


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        before, now = ([f"{k}={v}" for k, v in content.items()] for content in (before, now))
    gone = [text for text in before if text not in now]
    new = [text for text in now if text not in before]
    if not gone and not new:
        return "in another order"
    return f"it has {_few(gone) or 'nothing else'}, this command {_few(new) or 'not'}"


def _few(texts: list[str]) -> str:
    more = len(texts) - MOST_SHOWN
    return ", ".join(texts[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
