"""Launch a batch of jobs: first all together by a function of the program, then each as a job."""

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

NO_PRUNER = "optuna.pruners.NopPruner"

_log = logging.getLogger(__name__)


def launch_together(
    prepare: str,
    size: int,
    program: tuple[HydraContext, TaskFunction, DictConfig],
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> Sequence[JobReturn]:
    """Give the configurations of all jobs to `prepare`, then run the jobs one after another.

    Args:
        prepare: dotted path of a function of the resolved configurations, each with the job's own
            directories, and of `size`. What it has computed the task finds when its job runs.
        size: passed to `prepare`.
        program: Hydra's context, the task and the configuration of the sweep.
        job_overrides: of each job.
        initial_job_idx: number of the first job.

    Returns:
        What each job returned or raised.
    """
    context, task, sweep = program
    setup_globals()
    configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    Path(str(sweep.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, overrides in enumerate(job_overrides, initial_job_idx):
        job = context.config_loader.load_sweep_config(sweep, list(overrides))
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        jobs.append(job)
    pruner = OmegaConf.select(sweep, "hydra.sweeper.pruner._target_")
    if pruner is None or pruner == NO_PRUNER:
        get_method(prepare)([_resolved(job) for job in jobs], size)
    else:
        # It compares a trial with others at its step, of which those of its batch know nothing.
        _log.info("jobs one by one: hydra/sweeper/pruner prunes no trial that others train with")
    returns = []
    for job in jobs:
        returns.append(
            run_job(
                hydra_context=context,
                task_function=task,
                config=job,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        )
        configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    return returns


def _resolved(job: DictConfig) -> Any:
    """Return the task's part of a job's configuration, as it will be when the job runs."""
    # A copy, because a configuration caches the values of its interpolations.
    job = copy.deepcopy(job)
    state = HydraConfig.instance()
    before = state.cfg
    try:
        state.set_config(job)
        directory = os.path.join(str(job.hydra.sweep.dir), str(job.hydra.sweep.subdir))
        with read_write(job.hydra.runtime), open_dict(job.hydra.runtime):
            job.hydra.runtime.output_dir = os.path.abspath(directory)
        state.set_config(job)
        with read_write(job), open_dict(job):
            del job["hydra"]
        return OmegaConf.to_container(job, resolve=True)
    finally:
        state.cfg = before
