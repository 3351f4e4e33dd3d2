"""A sweep from its configuration to its end."""

import copy
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from hydra_plugins.bn_optuna._jobs import Jobs, Recorded
from omegaconf import DictConfig, OmegaConf, open_dict

from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.engine.creation import Direction, create_study, study_name
from bn_lightning.sweeps.engine.display import Display, print_summary, write_results
from bn_lightning.sweeps.engine.environment import STORAGE, STUDY, WORKER, environment
from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.names import CONFIGURATION_FILE, JOURNAL_FILE
from bn_lightning.sweeps.engine.outcome import ERROR, HOPELESS, last_line
from bn_lightning.sweeps.engine.passwords import refuse_copied_password, refuse_password
from bn_lightning.sweeps.engine.program import as_typed, run_command, shown_command
from bn_lightning.sweeps.engine.sampling import Points, make_pruner, make_sampler
from bn_lightning.sweeps.engine.space import CustomSpace, Space, flat, parse_space, to_overrides
from bn_lightning.sweeps.engine.stopping import Stopping
from bn_lightning.sweeps.engine.storage import JOURNAL, open_storage, storage_url
from bn_lightning.sweeps.engine.study import ClaimedTrial, Policy, SweepStudy, work
from bn_lightning.sweeps.engine.workers import Workers, stop_when_parent_says

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

# Seconds between two looks at a study that others work on.
LOOK = 1.0


@dataclass(frozen=True)
class Settings:
    """The keys of `conf/hydra/sweeper/_bn_optuna.yaml`, where they are explained.

    Raises:
        SweepError: one of them has a value that cannot be used.
    """

    sampler: dict[str, Any]
    pruner: dict[str, Any] | None
    params: dict[str, Any] | None
    custom_search_space: str | None
    direction: Direction | list[Direction]
    metric: str | list[str] | None
    n_trials: int | None
    n_jobs: int
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
        for direction in self.directions:
            if direction not in ("minimize", "maximize"):
                raise SweepError(f"`direction` expected minimize or maximize, got {direction}")
        if self.metrics is not None and len(self.metrics) != len(self.directions):
            raise SweepError(
                f"`metric` expected a name for each of {len(self.directions)} directions, got "
                f"{self.metrics}"
            )
        if self.restart not in ("resume", "fresh"):
            raise SweepError(f"`restart` expected resume or fresh, got {self.restart}")
        for key, value in (("n_trials", self.n_trials or 1), ("n_jobs", self.n_jobs)):
            if type(value) is not int or value < 1:
                raise SweepError(f"`{key}` expected an integer of at least 1, got {value!r}")
        if not 0 <= self.max_failure_rate <= 1:
            raise SweepError(
                f"`max_failure_rate` expected a share from 0 to 1, got {self.max_failure_rate}"
            )

    @property
    def directions(self) -> list[Direction]:
        """`direction` as a list, of one where it is one."""
        return self.direction if isinstance(self.direction, list) else [self.direction]

    @property
    def metrics(self) -> list[str] | None:
        """`metric` as a list, of one where it is one; None where the task returns numbers."""
        return [self.metric] if isinstance(self.metric, str) else self.metric


def run_sweep(
    content: dict[str, Any],
    context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    arguments: list[str],
) -> None:
    """Run a sweep, or a worker's part of it.

    Args:
        content: the sweeper's settings.
        context: Hydra's.
        task: what a trial runs.
        config: the program's whole configuration.
        arguments: the task's overrides, as typed.

    Raises:
        SweepError: it cannot begin or go on, or more trials are lost than `max_failure_rate`.
    """
    _quiet_optuna()
    _refuse_passwords(config)
    settings = Settings(**{key: _plain(value) for key, value in content.items()})
    custom = _custom_space(settings.custom_search_space)
    space = parse_space(settings.params, arguments, context.config_loader)
    if not space.distributions and custom is None:
        raise SweepError(
            "nothing to sweep: give `hydra.sweeper.params`, or a key with several values, "
            "KEY=A,B or KEY=interval(A,B)"
        )

    def suggest(trial: optuna.Trial) -> dict[str, Any]:
        return space.suggest(trial, custom, config)

    points = Points(settings.sampler, space, suggest, custom is not None, settings.n_trials)
    policy = Policy(settings.max_retries, settings.heartbeat, settings.stale_after)
    pruner = make_pruner(settings.pruner)
    is_worker = WORKER in os.environ
    place = _place_of_worker() if is_worker else _place(settings)
    with open_dict(config):
        config.hydra.sweep.dir = str(place.directory)  # where launchers look
    recorded = Recorded(task, settings.metrics, len(settings.directions))
    jobs = Jobs(context, recorded, config, space.fixed, place.directory)
    if not is_worker:
        _check_early(jobs, settings, points, suggest)

    storage = open_storage(place.url, settings.storage_patience)
    description = {
        "space": {**space.describe(), "custom_search_space": str(settings.custom_search_space)},
        "overrides": space.fixed,
        "configuration": flat(_task_configuration(config), space.distributions),
    }
    is_new = not is_worker and create_study(storage, place.study, settings.directions, description)
    study = SweepStudy(
        storage, place.study, place.directory, points, suggest, settings.sampler, pruner, policy
    )
    stopping = Stopping()
    with environment({STORAGE: place.url, STUDY: place.study}), stopping.on_signals():
        try:
            if is_worker:
                stop_when_parent_says(stopping)
                work(study, jobs.run, stopping)
            else:
                _begin(study, is_new, config)
                _run(study, jobs, settings, config, stopping)
                _end(study, settings, space, stopping)
        finally:
            study.close()


def _run(
    study: SweepStudy, jobs: Jobs, settings: Settings, config: DictConfig, stopping: Stopping
) -> None:
    launcher = config.hydra.launcher._target_
    with Display(study.name, study.ledger, study.directions) as display:
        if launcher != BASIC_LAUNCHER:
            _launch_batches(study, jobs, _batch_size(settings, config), stopping, display)
        elif settings.n_jobs == 1:
            work(study, jobs.run, stopping, display.update)
        else:
            with Workers(study, settings.n_jobs) as workers:
                while workers.look(stopping()):
                    display.update()
                    time.sleep(LOOK)
        study.refresh()
        display.update()


def _launch_batches(
    study: SweepStudy, jobs: Jobs, size: int, stopping: Stopping, display: Display
) -> None:
    while not stopping():
        batch: list[ClaimedTrial] = []
        while len(batch) < size and (claimed := study.claim()) is not None:
            batch.append(claimed)
        if not batch:
            if study.ledger.is_over():
                return
            study.tidy()
            display.update()
            time.sleep(LOOK)
            continue
        try:
            outcomes = jobs.launch(batch)
        except BaseException:
            for claimed in batch:
                study.interrupt(claimed.number)
            raise
        for claimed, outcome in zip(batch, outcomes, strict=True):
            study.finish(claimed.number, stopping.excused(outcome))
        study.refresh()
        display.update()


def _batch_size(settings: Settings, config: DictConfig) -> int:
    """How many jobs the launcher runs at once, unless `n_jobs` says it."""
    if settings.n_jobs > 1:
        return settings.n_jobs
    launcher = config.hydra.launcher
    size = launcher.get("n_jobs") or launcher.get("array_parallelism") or 1
    return int(size) if size > 0 else max(1, (os.cpu_count() or 1) + 1 + int(size))


def _begin(study: SweepStudy, is_new: bool, config: DictConfig) -> None:
    study.directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, study.directory / CONFIGURATION_FILE)
    study.keep_command(shown_command(study.storage.url))
    if is_new:
        study.fill_first()
    else:
        study.fill()
    counts = study.refresh()
    print(
        f"sweep {study.name}: {counts.settled} of {counts.total} trials done, in {study.directory}",
        flush=True,
    )


def _end(study: SweepStudy, settings: Settings, space: Space, stopping: Stopping) -> None:
    counts = study.refresh()
    best = best_trials(
        [
            trial
            for trial in study.ledger.results()
            if trial.values and trial.state.name == "COMPLETE"
        ],
        study.directions,
    )
    if best:
        write_results(study.directory, best, len(study.directions))
    commands = {
        trial.number: as_typed(run_command([*space.fixed, *to_overrides(trial.params)]))
        for trial in best
    }
    print_summary(best, counts, commands, study.directory)
    if stopping() and counts.settled < counts.total:
        print("stopped; the same command goes on", flush=True)
        sys.exit(130)
    lost = study.ledger.lost()
    if lost and len(lost) / counts.total > settings.max_failure_rate:
        trial = lost[-1]
        which = "all" if len(lost) == counts.total else str(len(lost))
        raise SweepError(
            f"{which} of {counts.total} trials failed, which is more than "
            f"max_failure_rate={settings.max_failure_rate:g} allows. Trial {trial.number}: "
            f"{last_line(trial.user_attrs.get(ERROR, ''))}. More in its attributes and in "
            f"{study.directory / str(trial.number)}; {_advice(lost)}"
        )


def _advice(lost: list[optuna.trial.FrozenTrial]) -> str:
    fresh = "once their cause is mended, hydra.sweeper.restart=fresh begins a new study"
    if all(trial.user_attrs.get(HOPELESS) for trial in lost):
        return fresh
    return f"the same command with a larger hydra.sweeper.max_retries tries them again; {fresh}"


@dataclass(frozen=True)
class Place:
    """Where a sweep is: its study's name, its directory, the address of its storage."""

    study: str
    directory: Path
    url: str


def _place_of_worker() -> Place:
    return Place(os.environ[STUDY], Path(os.environ[WORKER]), os.environ[STORAGE])


def _place(settings: Settings) -> Place:
    base = Path(settings.dir).absolute()

    def directory_of(name: str) -> Path:
        return base.with_name(base.name + name.removeprefix(settings.study_name))

    names: set[str] = set()
    if settings.storage != JOURNAL:
        shared = open_storage(storage_url(settings.storage, base), settings.storage_patience)
        names = {study.study_name for study in shared.get_all_studies()}
        shared.close()

    def exists(name: str) -> bool:
        return name in names or (
            settings.storage == JOURNAL and (directory_of(name) / JOURNAL_FILE).exists()
        )

    name = study_name(settings.study_name, settings.restart == "fresh", exists)
    return Place(name, directory_of(name), storage_url(settings.storage, directory_of(name)))


def _check_early(
    jobs: Jobs,
    settings: Settings,
    points: Points,
    suggest: Callable[[optuna.Trial], dict[str, Any]],
) -> None:
    """Build a sampler, compose a trial: what is wrong is one error now, not one of every trial."""
    if points.are_planned:
        params = (points[0] or ({}, {}))[0]
    else:
        make_sampler(settings.sampler)
        rehearsal = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        params = suggest(rehearsal.ask())
    jobs.compose(params)


def _custom_space(path: str | None) -> CustomSpace | None:
    if path is None:
        return None
    try:
        return get_method(path)
    except Exception as error:
        raise SweepError(
            f"`custom_search_space` expected a.module.function(config, trial), got {path}: {error}"
        ) from error


def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of a broken connection it shows the whole SQL, and the call is repeated anyway.
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)


def _refuse_passwords(config: DictConfig) -> None:
    settings: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    refuse_password(str(settings["storage"]))
    # In a copy, as a configuration keeps what its interpolations gave.
    refuse_copied_password(str(config.hydra.sweeper.storage), copy.deepcopy(config))


def _task_configuration(config: DictConfig) -> dict[str, Any]:
    """What the trials share, as it is written; files that change it are no overrides."""
    content: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    return {key: value for key, value in content.items() if key != "hydra"}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
