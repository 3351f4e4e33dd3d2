"""Run a sweep, from its configuration to its summary."""

import copy
import logging
import math
import os
import sys
import time
from typing import Any

import optuna
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.bn_optuna._settings import Location, Settings
from hydra_plugins.bn_optuna._trial_runner import RecordedTask, TrialRunner
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial

from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.engine.creation import create_study
from bn_lightning.sweeps.engine.devices import sharing_notice, worker_devices
from bn_lightning.sweeps.engine.display import Display, print_sweep_summary, write_results
from bn_lightning.sweeps.engine.environment import (
    STORAGE_VARIABLE,
    STUDY_VARIABLE,
    WORKER_VARIABLE,
    environment_variables,
)
from bn_lightning.sweeps.engine.outcome import last_line
from bn_lightning.sweeps.engine.passwords import refuse_copied_password, refuse_password
from bn_lightning.sweeps.engine.processes import as_typed, run_command, shown_command
from bn_lightning.sweeps.engine.sampling import SamplingPlan, make_pruner
from bn_lightning.sweeps.engine.space import flat, parse_space, to_overrides
from bn_lightning.sweeps.engine.stop_request import StopRequest
from bn_lightning.sweeps.engine.storage import open_storage
from bn_lightning.sweeps.engine.stored_names import (
    CONFIGURATION_FILE,
    DIRECTORY,
    ERROR,
    HOPELESS,
)
from bn_lightning.sweeps.engine.study import FailurePolicy, SweepStudy
from bn_lightning.sweeps.engine.sweep_error import SweepError
from bn_lightning.sweeps.engine.workers import Workers, run_trials, stop_with_parent

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
STACK_LAUNCHER = "hydra_plugins.bn_optuna.StackLauncher"
OWN_LAUNCHERS = (BASIC_LAUNCHER, STACK_LAUNCHER)  # which run in the sweeper's own processes

# Seconds between two checks of a study whose trials run in other processes.
CHECK_INTERVAL = 1.0
# More trials of a sweep would fail as these did.
FIRST_FAILURES = 10


def run_sweep(
    content: dict[str, Any],
    context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    arguments: list[str],
) -> Location:
    """Run a sweep, or a worker's part of it, and return where the sweep is stored.

    Args:
        content: the sweeper's settings.
        context: Hydra's.
        task: what a trial runs.
        config: the configuration of the program.
        arguments: the overrides of the task, as typed.

    Raises:
        SweepError: the sweep cannot begin or be resumed, or too many trials failed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of a broken connection it logs the whole SQL, and the call is repeated anyway.
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
    _refuse_passwords(config)
    settings = Settings(**{key: _plain(value) for key, value in content.items()})
    space = parse_space(settings.params, arguments, context.config_loader, settings.custom(config))
    if not space.distributions and space.custom is None:
        raise SweepError(
            "expected `hydra.sweeper.params` or an override with several values, got nothing to "
            "sweep; give KEY=A,B or KEY=interval(A,B)"
        )
    plan = SamplingPlan(settings.sampler, space, settings.n_trials)
    policy = FailurePolicy(
        settings.max_retries,
        settings.heartbeat,
        settings.stale_after,
        first_failures=FIRST_FAILURES if settings.max_failure_rate < 1 else None,
    )
    pruner = make_pruner(settings.pruner)
    if plan.following is not None and not isinstance(pruner, NopPruner):
        raise SweepError(
            "expected no pruner for a sampler whose rounds follow from the results of all trials, "
            f"got {type(pruner).__name__}; choose hydra/sweeper/pruner=none"
        )
    place = settings.location()
    with open_dict(config):
        config.hydra.sweep.dir = str(place.directory)  # where launchers look
    recorded = RecordedTask(task, settings.metrics, len(settings.directions))
    runner = TrialRunner(context, recorded, config, space.fixed, place.directory)
    name_trial = None if _are_numbered(config) else runner.subdirectory
    is_worker = WORKER_VARIABLE in os.environ
    variables_of_workers: list[dict[str, str]] = []
    if not is_worker:
        if _has_workers(config):
            variables_of_workers = worker_devices(
                settings.n_jobs, settings.devices_per_job, os.environ
            )
        _check_first_trial(runner, plan, settings)

    storage = open_storage(place.url, settings.storage_patience)
    if not is_worker:
        description = {
            "space": {
                **space.describe(),
                **plan.describe(),
                "custom_search_space": str(settings.custom_search_space),
            },
            "overrides": list(space.fixed),
            "configuration": flat(_task_configuration(config), space.distributions),
        }
        create_study(storage, place.study, settings.directions, description)
    study = SweepStudy(storage, place.study, place.directory, plan, pruner, policy, name_trial)
    stop = StopRequest()
    variables = {STORAGE_VARIABLE: place.url, STUDY_VARIABLE: place.study}
    with environment_variables(variables), stop.on_signals():
        try:
            if is_worker:
                stop_with_parent(stop)
                run = runner.launch if _stacks(config) else runner.run
                run_trials(study, run, stop, batch_size=_batch_size(config, study))
            else:
                _begin(study, config)
                if notice := sharing_notice(variables_of_workers):
                    print(notice, flush=True)
                _run(study, runner, config, stop, variables_of_workers)
                _end(study, plan, settings.max_failure_rate, stop)
        finally:
            study.close()
    return place


def _run(
    study: SweepStudy,
    runner: TrialRunner,
    config: DictConfig,
    stop: StopRequest,
    variables_of_workers: list[dict[str, str]],
) -> None:
    with Display(study.name, study.slots, study.directions) as display:
        if variables_of_workers:
            with Workers(study, variables_of_workers) as workers:
                while workers.check(stop):
                    display.update()
                    time.sleep(CHECK_INTERVAL)
        elif _stacks(config) or config.hydra.launcher._target_ not in OWN_LAUNCHERS:
            size = _batch_size(config, study)
            run_trials(study, runner.launch, stop, display.update, batch_size=size)
        else:
            run_trials(study, runner.run, stop, display.update)
        study.refresh()
        display.update()


def _has_workers(config: DictConfig) -> bool:
    """Return whether trials run in worker processes of this sweeper."""
    is_own = config.hydra.launcher._target_ in OWN_LAUNCHERS
    return is_own and config.hydra.sweeper.n_jobs > 1


def _stacks(config: DictConfig) -> bool:
    """Return whether each process of the sweep launches batches of trials itself."""
    is_stack = config.hydra.launcher._target_ == STACK_LAUNCHER
    return is_stack and not config.hydra.sweeper.isolate


def _batch_size(config: DictConfig, study: SweepStudy) -> int:
    """Return how many jobs a launcher gets at once: what its configuration says, or `n_jobs`."""
    if _stacks(config):
        # So that all workers get as many, in as few batches as possible.
        counts = study.refresh()
        share = max(1, math.ceil((counts.total - counts.settled) / config.hydra.sweeper.n_jobs))
        return math.ceil(share / math.ceil(share / config.hydra.launcher.batch))
    if config.hydra.launcher._target_ in OWN_LAUNCHERS:
        return 1
    if config.hydra.sweeper.n_jobs > 1:
        return int(config.hydra.sweeper.n_jobs)
    launcher = config.hydra.launcher
    size = int(launcher.get("n_jobs") or launcher.get("array_parallelism") or 1)
    # As in joblib, -1 is all cores, -2 all but one.
    return size if size > 0 else max(1, (os.cpu_count() or 1) + 1 + size)


def _begin(study: SweepStudy, config: DictConfig) -> None:
    study.directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, study.directory / CONFIGURATION_FILE)
    study.record_command(shown_command(study.storage.url))
    study.fill()
    counts = study.refresh()
    print(
        f"sweep {study.name}: {counts.settled} of {counts.total} trials done, in {study.directory}",
        flush=True,
    )


def _end(study: SweepStudy, plan: SamplingPlan, max_failure_rate: float, stop: StopRequest) -> None:
    counts = study.refresh()
    complete = [trial for trial in study.slots.results() if trial.state.name == "COMPLETE"]
    best = best_trials(complete, study.directions)
    if best:
        write_results(study.directory, best, len(study.directions))
    commands = {
        trial.number: as_typed(run_command([*plan.space.fixed, *to_overrides(trial.params)]))
        for trial in best
    }
    failed, lost = study.slots.failed(), study.slots.failed(lost=True)
    print_sweep_summary(best, counts, len(failed) - len(lost), commands, study.directory)
    if study.is_given_up():
        raise SweepError(
            f"expected one of the first {counts.failures} trials to have a result, got only "
            f"failures; {_last_failure(failed, lost)}"
        )
    if stop.is_set() and counts.settled < counts.total:
        print("stopped; the same command resumes the sweep", flush=True)
        sys.exit(130)
    if lost and len(lost) / counts.total > max_failure_rate:
        raise SweepError(
            f"expected at most a share of `max_failure_rate`={max_failure_rate:g} of the trials to "
            f"fail, got {len(lost)} of {counts.total}; {_last_failure(lost, lost)}"
        )


def _last_failure(failed: list[FrozenTrial], lost: list[FrozenTrial]) -> str:
    """Return the error of the last failed trial, and what to do about it."""
    last = failed[-1]
    error = last_line(last.user_attrs.get(ERROR, ""))
    advice = "remove the cause, then "
    if not lost:
        advice += "the same command tries again"
    else:
        advice += "hydra.sweeper.restart=fresh begins a new study"
        if not all(trial.user_attrs.get(HOPELESS) for trial in lost):
            advice += ", or a larger hydra.sweeper.max_retries repeats them"
    return f"trial {last.number}: {error} (see {last.user_attrs[DIRECTORY]}); {advice}"


def _check_first_trial(runner: TrialRunner, plan: SamplingPlan, settings: Settings) -> None:
    """Build the sampler and compose a trial, so that an error is raised once, not in each trial."""
    check = settings.check_of_trial()
    if plan.is_planned:
        params = plan.point(0).params
    else:
        plan.sampler()
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        params = plan.space.suggest(study.ask())
    runner.compose(0, params)
    if check is not None:
        runner.check(check, params)


def _are_numbered(config: DictConfig) -> bool:
    """Return whether the trials' directories have the trials' numbers as names.

    Raises:
        SweepError: all trials would have the same directory.
    """
    content: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    subdirectory = str(content["subdir"])
    if "${" not in subdirectory:
        raise SweepError(
            "expected `hydra.sweep.subdir` to differ between trials, got the same for all, "
            f"{subdirectory}; use ${{hydra.job.num}} or ${{hydra.job.override_dirname}} in it"
        )
    return subdirectory == "${hydra.job.num}"


def _refuse_passwords(config: DictConfig) -> None:
    settings: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    refuse_password(str(settings["storage"]))
    # On a copy, because a configuration caches the values of its interpolations.
    refuse_copied_password(str(config.hydra.sweeper.storage), copy.deepcopy(config))


def _task_configuration(config: DictConfig) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    return {key: value for key, value in content.items() if key != "hydra"}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
