"""Launch a batch of jobs: first all together by a function of the program, then each as a job."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    configure_log,
    env_override,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from hydra_plugins.bn_optuna._composed_job import ComposedJob
from hydra_plugins.bn_optuna._job_composer import JobComposer
from hydra_plugins.bn_optuna._trial_runner import RecordedTask
from omegaconf import DictConfig, OmegaConf

from bn_lightning.sweeps.engine.environment import TRIAL_VARIABLE

if TYPE_CHECKING:
    from bn_lightning.sweeps.engine.rungs import Rungs

NO_PRUNER = "optuna.pruners.NopPruner"

_log = logging.getLogger(__name__)


def launch_together(
    prepare: str,
    size: int,
    program: tuple[HydraContext, TaskFunction, DictConfig],
    composer: JobComposer,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> Sequence[JobReturn]:
    """Give the configurations of all jobs to `prepare`, then run the jobs one after another.

    Args:
        prepare: dotted path of a function of the resolved configurations, each with the job's own
            directories, of `size`, and of the `Rungs` that prune the jobs, in their order, or None.
            It returns a function for each job that it has computed, which is called instead of the
            task, and None for each other job. While it runs, Hydra's configuration and the
            environment variables are those of the first job.
        size: passed to `prepare`.
        program: Hydra's context, the task and the configuration of the sweep.
        composer: of the jobs.
        job_overrides: of each job.
        initial_job_idx: number of the first job.

    Returns:
        What each job returned or raised. `cfg` and `hydra_cfg` are None for a computed job.

    Raises:
        ValueError: two jobs have the same directory.
    """
    context, task, sweep = program
    setup_globals()
    configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    Path(str(sweep.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    jobs = list(enumerate(job_overrides, initial_job_idx))
    ends: Sequence[Callable[[], Any] | None] = [None] * len(jobs)
    configs, trials, directories = [], [], set()
    for number, overrides in jobs:
        with composer.composed(overrides, number) as job:
            configs.append(job.resolved())
            trials.append(job.config.hydra.job.env_set.get(TRIAL_VARIABLE))
            directory = job.config.hydra.runtime.output_dir
        if directory in directories:
            raise ValueError(
                "expected `hydra.sweep.subdir` to differ from job to job, got several in "
                f"{directory}; let it follow ${{hydra.job.num}}"
            )
        directories.add(directory)
    try:
        rungs = _rungs(sweep, trials)
    except ValueError as error:
        _log.info("jobs one by one: %s", error)
    else:
        number, overrides = jobs[0]
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(composer.composed(overrides, number))
            stack.enter_context(env_override(first.config.hydra.job.env_set))
            ends = get_method(prepare)(configs, size, rungs)
    returns = []
    for (number, overrides), end in zip(jobs, ends, strict=True):
        if end is not None:
            with composer.composed(overrides, number) as job:
                returns.append(_end_job(context, task, job, end))
        else:
            returns.append(
                run_job(
                    hydra_context=context,
                    task_function=task,
                    config=composer.compose(overrides, number),
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
            )
    configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    return returns


def _rungs(sweep: DictConfig, trials: Sequence[Any]) -> "Rungs | None":
    """Return what prunes the trials of a batch; None without a pruner.

    Raises:
        ValueError: the pruner cannot judge a batch.
    """
    pruner = OmegaConf.select(sweep, "hydra.sweeper.pruner._target_")
    if pruner is None or pruner == NO_PRUNER:
        return None
    from bn_lightning.sweeps.engine.rungs import Rungs
    from bn_lightning.sweeps.engine.trial import running_trials

    return Rungs(running_trials(sweep.hydra.sweeper, [int(number) for number in trials]))


def _end_job(
    context: HydraContext, task: TaskFunction, job: ComposedJob, end: Callable[[], Any]
) -> JobReturn:
    """Do what Hydra's `run_job` does, for a job that is computed: call `end` instead of the task.

    `run_job` copies the configuration several times, which takes 40 ms.
    """
    directory = Path(job.config.hydra.runtime.output_dir)
    result = JobReturn(
        overrides=list(job.overrides["task"]),
        working_dir=os.getcwd(),
        task_name=JobRuntime.instance().get("name"),
    )
    directory.mkdir(parents=True, exist_ok=True)
    configure_log(job.logging(), job.config.hydra.verbose)
    if (subdirectory := job.of_hydra("output_subdir")) is not None:
        folder = directory / subdirectory
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in job.files().items():
            (folder / name).write_text(text, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        stack.enter_context(env_override(job.of_hydra("job", "env_set")))
        if job.of_hydra("job", "chdir"):
            stack.enter_context(contextlib.chdir(directory))
        context.callbacks.on_job_start(config=job.config, task_function=task)
        try:
            result.return_value = task.recorded(end) if isinstance(task, RecordedTask) else end()
            result.status = JobStatus.COMPLETED
        except Exception as error:
            result.return_value = error
            result.status = JobStatus.FAILED
    context.callbacks.on_job_end(config=job.config, job_return=result)
    return result
