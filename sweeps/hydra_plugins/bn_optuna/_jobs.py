"""One trial: as a job in this process, in a process of its own, or of a Hydra launcher."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from bn_lightning.sweeps.engine.environment import TRIAL, environment
from bn_lightning.sweeps.engine.outcome import (
    ERROR_LINES,
    SECONDS,
    Outcome,
    failed,
    outcome_of,
    outcome_of_error,
    read_outcome,
)
from bn_lightning.sweeps.engine.processes import end_session
from bn_lightning.sweeps.engine.program import run_command
from bn_lightning.sweeps.engine.space import to_overrides
from bn_lightning.sweeps.engine.study import ClaimedTrial

PROCESS_LOG = "process.log"

log = logging.getLogger(__name__)


@dataclass
class Recorded:
    """A task that leaves its outcome in its run's directory, in whatever process it runs.

    Args:
        task: the program's task.
        metric: names of the values that it returns.
        directions: how many there are.
    """

    task: TaskFunction
    metric: list[str] | None
    directions: int
    outcome: Outcome | None = field(default=None, init=False)

    def __call__(self, config: DictConfig) -> Any:
        started = time.perf_counter()
        try:
            result = self.task(config)
        except Exception as error:
            self._record(outcome_of_error(error), started)
            raise
        self._record(outcome_of(result, self.metric, self.directions), started)
        return result

    def _record(self, outcome: Outcome, started: float) -> None:
        seconds = round(time.perf_counter() - started, 3)
        self.outcome = outcome.with_attributes(**{SECONDS: seconds})
        _write(self.outcome, Path(HydraConfig.get().runtime.output_dir))


class Jobs:
    """Runs the trials of a sweep.

    Args:
        context: Hydra's.
        task: what a trial runs.
        config: the sweep's configuration.
        fixed: the overrides that all trials share.
        directory: of the sweep.
    """

    def __init__(
        self,
        context: HydraContext,
        task: Recorded,
        config: DictConfig,
        fixed: Sequence[str],
        directory: Path,
    ) -> None:
        self._context = context
        self._task = task
        self._config = config
        self._fixed = list(fixed)
        self._directory = directory

    def compose(self, params: dict[str, Any], number: int = 0) -> DictConfig:
        """The configuration of a trial.

        Raises:
            HydraException: an override names no key, or no option.
        """
        config = self._context.config_loader.load_sweep_config(
            self._config, self._overrides(params, number)
        )
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def run(self, claimed: ClaimedTrial) -> Outcome:
        """Run a trial here, or in a process of its own if its configuration says so."""
        setup_globals()
        config = self.compose(claimed.params, claimed.number)
        with environment({TRIAL: str(claimed.number)}):
            if config.hydra.sweeper.isolate:
                return self._run_isolated(claimed)
            return self._run_here(config)

    def _run_here(self, config: DictConfig) -> Outcome:
        self._task.outcome = None
        job = run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        # In memory, as the disk may be full.
        return self._task.outcome or outcome_of_error(job._return_value)

    def _run_isolated(self, claimed: ClaimedTrial) -> Outcome:
        directory = self._directory / str(claimed.number)
        directory.mkdir(parents=True, exist_ok=True)
        metric = (
            "null"
            if self._task.metric is None
            else f"[{','.join(map(_quoted, self._task.metric))}]"
        )
        command = run_command(
            [
                *_kept_hydra_overrides(self._config),
                *self._fixed,
                *to_overrides(claimed.params),
                "hydra.mode=RUN",
                f"hydra.run.dir={_quoted(str(directory))}",
                "++hydra.callbacks.bn_optuna="
                "{_target_:hydra_plugins.bn_optuna.OutcomeCallback,"
                f"metric:{metric},directions:{self._task.directions}}}",
            ]
        )
        started = time.perf_counter()
        with open(directory / PROCESS_LOG, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is the sweeper's, and its signals reach all processes.
                start_new_session=True,
            )
            try:
                code = process.wait()
            except BaseException:
                end_session(process)
                raise
        seconds = {SECONDS: round(time.perf_counter() - started, 3)}
        outcome = read_outcome(directory)
        if outcome is not None and (code == 0 or outcome.state != "COMPLETE"):
            return outcome.with_attributes(**seconds)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        text = (directory / PROCESS_LOG).read_text(encoding="utf-8", errors="replace")
        lines = text.rstrip().splitlines()[-ERROR_LINES:]
        return failed("\n".join([*lines, f"the trial's process ended: {how}"]), **seconds)

    def launch(self, batch: Sequence[ClaimedTrial]) -> list[Outcome]:
        """Run trials by the launcher that the configuration names, all at once."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=self._task, config=self._config
        )
        overrides = [
            [
                *self._overrides(claimed.params, claimed.number),
                f"++hydra.job.env_set.{TRIAL}='{claimed.number}'",
            ]
            for claimed in batch
        ]
        lost = "the launcher returned nothing of this trial"
        returns: Sequence[JobReturn] = []
        try:
            returns = launcher.launch(overrides, initial_job_idx=batch[0].number)
        except Exception as error:
            # It may have lost one job of many: the others have left their outcomes.
            lost = f"the launcher failed: {error}"
        outcomes = []
        for i, claimed in enumerate(batch):
            outcome = read_outcome(self._directory / str(claimed.number))
            if outcome is None and i < len(returns) and returns[i].status == JobStatus.FAILED:
                outcome = outcome_of_error(returns[i]._return_value)
            outcomes.append(outcome or failed(lost))
        return outcomes

    def _overrides(self, params: dict[str, Any], number: int) -> list[str]:
        return [
            *self._fixed,
            *to_overrides(params),
            f"hydra.sweep.dir={_quoted(str(self._directory))}",
            f"hydra.sweep.subdir='{number}'",
        ]


def write_outcome(
    config: DictConfig, job: JobReturn, metric: list[str] | None, directions: int
) -> None:
    """Write the outcome of a trial that is this process, and not a rank that it started."""
    if os.getsid(0) != os.getpid():
        return
    result = job._return_value
    if job.status == JobStatus.COMPLETED:
        outcome = outcome_of(result, metric, directions)
    else:
        outcome = outcome_of_error(result)
    _write(outcome, Path(config.hydra.runtime.output_dir))


def _write(outcome: Outcome, directory: Path) -> None:
    try:
        outcome.write(directory)
    except OSError as error:
        log.warning("the outcome of this trial is not on disk, only in the study: %s", error)


def _kept_hydra_overrides(config: DictConfig) -> list[str]:
    """What the user changed in Hydra's own configuration, for a process of a trial."""
    overrides = OmegaConf.to_container(config.hydra.overrides.hydra)
    assert isinstance(overrides, list)
    dropped = ("hydra.mode=", "hydra.sweep.", "hydra.run.dir=", "hydra/launcher=")
    return [str(text) for text in overrides if not str(text).lstrip("+").startswith(dropped)]


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()
