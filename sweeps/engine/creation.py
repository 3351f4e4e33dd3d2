"""Create a study, or check that an existing study belongs to the same sweep."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import json_to_distribution
from optuna.exceptions import DuplicatedStudyError
from optuna.study import Study

from bn_lightning.sweeps.engine.heartbeat import filler_mark
from bn_lightning.sweeps.engine.space import sweep_text
from bn_lightning.sweeps.engine.storage import RetryingStorage
from bn_lightning.sweeps.engine.stored_names import DESCRIPTION, FILLER
from bn_lightning.sweeps.engine.sweep_error import SweepError

DirectionName = Literal["minimize", "maximize"]

# Seconds to wait until the process that created a study has written its description.
DESCRIPTION_PATIENCE = 10.0

# Differences between two configurations that a message lists.
MOST_SHOWN = 5


def create_study(
    storage: RetryingStorage,
    name: str,
    directions: Sequence[DirectionName],
    description: dict[str, Any],
) -> None:
    """Create a study; if the name exists, check that the study is for the same sweep.

    A new study is marked as being filled by this process; see `SweepStudy.fill`.

    Args:
        storage: the storage of the study.
        name: of the study.
        directions: one for each value of a trial.
        description: JSON of what must not change between two commands: `space`, `overrides` and
            `configuration`. Studies of an earlier version have no `configuration`.

    Raises:
        SweepError: the existing study differs in directions, space, overrides or configuration.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        _check_same(optuna.load_study(study_name=name, storage=storage), directions, description)
        return
    study.set_user_attr(FILLER, filler_mark())
    study.set_user_attr(DESCRIPTION, description)


def study_name(base: str, exists: Callable[[str], bool], *, fresh: bool) -> str:
    """Return the name of the study to resume or to create: `base`, `base-2`, `base-3`, ...

    Args:
        base: the configured name.
        exists: whether there is a study of a given name.
        fresh: return the first unused name instead of the last used one.
    """
    newest, next_name, number = base, base, 1
    while exists(next_name):
        newest, number = next_name, number + 1
        next_name = f"{base}-{number}"
    return next_name if fresh else newest


def _check_same(
    study: Study, directions: Sequence[DirectionName], description: dict[str, Any]
) -> None:
    advice = "choose another hydra.sweeper.study_name, or hydra.sweeper.restart=fresh"
    found = [direction.name.lower() for direction in study.directions]
    if found != list(directions):
        raise SweepError(
            f"expected the study {study.study_name} to {' and '.join(directions)}, got one made to "
            f"{' and '.join(found)}; {advice}"
        )
    started = time.monotonic()
    while (before := study.user_attrs.get(DESCRIPTION)) is None:
        if time.monotonic() - started > DESCRIPTION_PATIENCE:
            if study.get_trials(deepcopy=False):
                raise SweepError(
                    f"expected the study {study.study_name} to be made by this sweeper, got one "
                    f"without its description; {advice}"
                )
            # The process that created the study ended before it wrote the description.
            study.set_user_attr(DESCRIPTION, description)
            return
        time.sleep(0.2)
    for key in ("space", "overrides", "configuration"):
        if key in before and before[key] != description[key]:
            contents = before[key], description[key]
            if key == "space":
                contents = _typed(before[key]), _typed(description[key])
            raise SweepError(
                f"expected the study {study.study_name} to have the same {key}, got another: "
                f"{_difference(*contents)}; repeat the command that began "
                f"the study, {advice}"
            )


def _typed(space: dict[str, str]) -> dict[str, str]:
    """Return the values of a described space as a person types them."""
    return {
        name: sweep_text(json_to_distribution(text)) if text.startswith("{") else text
        for name, text in space.items()
    }


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        before, now = ([f"{k}={v}" for k, v in content.items()] for content in (before, now))
    removed = [text for text in before if text not in now]
    added = [text for text in now if text not in before]
    if not removed and not added:
        return "the order differs"
    return f"the study has {_few(removed)}, this command {_few(added)}"


def _few(texts: list[str]) -> str:
    more = len(texts) - MOST_SHOWN
    shown = ", ".join(texts[:MOST_SHOWN]) or "nothing else"
    return shown + (f" and {more} more" if more > 0 else "")
