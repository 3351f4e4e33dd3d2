"""The settings of the sweeper, checked, and where a sweep is stored."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import get_method
from omegaconf import DictConfig
from optuna import Trial

from bn_lightning.sweeps.engine.creation import DirectionName, study_name
from bn_lightning.sweeps.engine.environment import (
    STORAGE_VARIABLE,
    STUDY_VARIABLE,
    WORKER_VARIABLE,
)
from bn_lightning.sweeps.engine.storage import JOURNAL, open_storage, storage_url
from bn_lightning.sweeps.engine.stored_names import JOURNAL_FILE
from bn_lightning.sweeps.engine.sweep_error import SweepError


class Location(NamedTuple):
    """Where a sweep is: the name of its study, its directory, the URL of its storage."""

    study: str
    directory: Path
    url: str


_SECONDS = int | float, "a number of seconds"
# Of values that are used as they are: their type, and how an error calls it.
_TYPES: dict[str, tuple[Any, str]] = {
    "sampler": (dict, "an option of hydra/sweeper/sampler"),
    "pruner": (dict | None, "an option of hydra/sweeper/pruner"),
    "params": (dict | None, "a mapping from keys to values"),
    "metric": (str | list | None, "a name, a list of names or null"),
    "isolate": (int, "true or false"),
    "storage": (str, "journal or a URL"),
    "study_name": (str, "a text, with a number in quotes"),
    "dir": (str, "a path"),
    "max_retries": (int, "an integer"),
    "heartbeat": _SECONDS,
    "stale_after": _SECONDS,
    "storage_patience": _SECONDS,
}


@dataclass(frozen=True)
class Settings:
    """The keys of `conf/hydra/sweeper/_bn_optuna.yaml`, which explains them.

    Raises:
        SweepError: a value cannot be used.
    """

    sampler: dict[str, Any]
    pruner: dict[str, Any] | None
    params: dict[str, Any] | None
    custom_search_space: str | None
    check: str | None
    direction: DirectionName | list[DirectionName]
    metric: str | list[str] | None
    n_trials: int | None
    n_jobs: int
    devices_per_job: int | None
    isolate: bool
    storage: str
    study_name: str
    dir: str
    restart: str
    max_failure_rate: float
    max_retries: int
    heartbeat: float
    stale_after: float
    storage_patience: float

    def __post_init__(self) -> None:
        for key, (types, words) in _TYPES.items():
            value = getattr(self, key)
            if not isinstance(value, types):
                raise SweepError(f"expected `{key}` to be {words}, got {value!r}")
        for direction in self.directions:
            if direction not in ("minimize", "maximize"):
                raise SweepError(
                    f"expected `direction` to be minimize or maximize, got {direction}"
                )
        if self.metrics is not None and len(self.metrics) != len(self.directions):
            raise SweepError(
                f"expected `metric` to have a name for each of {len(self.directions)} directions, "
                f"got {self.metrics}"
            )
        if self.restart not in ("resume", "fresh"):
            raise SweepError(f"expected `restart` to be resume or fresh, got {self.restart}")
        for key, value in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
            if key == "n_trials" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise SweepError(f"expected `{key}` to be an integer of at least 1, got {value!r}")
        devices = self.devices_per_job
        if devices is not None and (type(devices) is not int or devices < 0):
            raise SweepError(
                f"expected `devices_per_job` to be null or an integer of at least 0, got "
                f"{devices!r}"
            )
        if (
            not isinstance(self.max_failure_rate, int | float)
            or not 0 <= self.max_failure_rate <= 1
        ):
            raise SweepError(
                f"expected `max_failure_rate` to be from 0 to 1, got {self.max_failure_rate}"
            )

    @property
    def directions(self) -> list[DirectionName]:
        """`direction` as a list."""
        return self.direction if isinstance(self.direction, list) else [self.direction]

    @property
    def metrics(self) -> list[str] | None:
        """`metric` as a list; None if the task returns numbers."""
        return [self.metric] if isinstance(self.metric, str) else self.metric

    def custom(self, config: DictConfig) -> Callable[[Trial], None] | None:
        """Return the function that `custom_search_space` names, bound to the configuration.

        Raises:
            SweepError: there is no such function.
        """
        function = _function("custom_search_space", self.custom_search_space, "config, trial")
        return None if function is None else partial(function, config)

    def check_of_trial(self) -> Callable[[dict[str, Any]], object] | None:
        """Return the function that `check` names.

        Raises:
            SweepError: there is no such function.
        """
        return _function("check", self.check, "config")

    def location(self) -> Location:
        """Return where the sweep is to be created or resumed; in a worker, where it is.

        Raises:
            SweepError: the storage cannot be used.
        """
        if WORKER_VARIABLE in os.environ:
            name, directory, url = (
                os.environ[key] for key in (STUDY_VARIABLE, WORKER_VARIABLE, STORAGE_VARIABLE)
            )
            return Location(name, Path(directory), url)
        base = Path(self.dir).absolute()
        names: set[str] = set()
        if self.storage != JOURNAL:
            shared = open_storage(storage_url(self.storage, base), self.storage_patience)
            names = {study.study_name for study in shared.get_all_studies()}
            shared.close()

        def directory_of(name: str) -> Path:
            return base.with_name(base.name + name.removeprefix(self.study_name))

        def exists(name: str) -> bool:
            if self.storage == JOURNAL:
                return (directory_of(name) / JOURNAL_FILE).exists()
            return name in names

        name = study_name(self.study_name, exists, fresh=self.restart == "fresh")
        return Location(name, directory_of(name), storage_url(self.storage, directory_of(name)))


def _function(key: str, path: str | None, arguments: str) -> Callable[..., Any] | None:
    """Return the function that a setting names by its dotted path, None without one."""
    if path is None:
        return None
    try:
        return get_method(path)
    except Exception as error:
        raise SweepError(
            f"expected `{key}` to be a.module.function({arguments}), got {path}: {error}"
        ) from error
