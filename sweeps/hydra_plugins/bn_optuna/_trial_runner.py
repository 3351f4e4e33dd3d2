"""Run trials: in this process, in a process for each trial, or with one of Hydra's launchers."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.bn_optuna._job_composer import JobComposer
from omegaconf import DictConfig, OmegaConf

from bn_lightning.sweeps.engine.claim import ClaimedTrial
from bn_lightning.sweeps.engine.environment import TRIAL_VARIABLE, environment_variables
from bn_lightning.sweeps.engine.outcome import (
    ERROR_LINES,
    Outcome,
    failed,
    outcome_of,
    outcome_of_error,
    read_outcome,
)
from bn_lightning.sweeps.engine.processes import end_session, run_command
from bn_lightning.sweeps.engine.space import Parameter, to_overrides
from bn_lightning.sweeps.engine.stored_names import PROCESS_LOG, SECONDS

_log = logging.getLogger(__name__)


@dataclass
class RecordedTask:
    """A task that writes its outcome into the directory of its run, in any process.

    Attributes:
        task: of the program.
        metric: keys of the values in the mapping that it returns; None if it returns numbers.
        n_directions: number of values.
        outcome: of the latest call in this process.
    """

    task: TaskFunction
    metric: list[str] | None
    n_directions: int
    outcome: Outcome | None = field(default=None, init=False)

    def __call__(self, config: DictConfig) -> Any:
        return self.recorded(lambda: self.task(config))

    def recorded(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns that stands for the task, and write its outcome."""
        started = time.perf_counter()
        try:
            result = call()
        except Exception as error:
            self._record(outcome_of_error(error), started)
            raise
        self._record(outcome_of(result, self.metric, self.n_directions), started)
        return result

    def _record(self, outcome: Outcome, started: float) -> None:
        self.outcome = _timed(outcome, started)
        _write(self.outcome, Path(HydraConfig.get().runtime.output_dir))


class TrialRunner:
    """Runs the trials of a sweep.

    Args:
        context: Hydra's.
        task: what a trial runs.
        config: the configuration of the sweep.
        fixed: the overrides that all trials share.
        directory: of the sweep.
    """

    def __init__(
        self,
        context: HydraContext,
        task: RecordedTask,
        config: DictConfig,
        fixed: Sequence[str],
        directory: Path,
    ) -> None:
        self._context = context
        self._task = task
        self._config = config
        self._fixed = list(fixed)
        self._directory = directory
        self._composer = JobComposer(context.config_loader, config)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )

    def compose(
        self, number: int, params: dict[str, Parameter], subdirectory: str | None = None
    ) -> DictConfig:
        """Return the configuration of a trial.

        Args:
            number: of the trial.
            params: of the trial.
            subdirectory: of the trial; None leaves it to the configuration.

        Raises:
            HydraException: an override names no key, or no option.
        """
        return self._composer.compose(self._overrides(params, subdirectory), number)

    def check(
        self, check: Callable[[dict[str, Any]], object], params: dict[str, Parameter]
    ) -> None:
        """Call `check` with the configuration of trial 0, which is Hydra's current one then."""
        with self._composer.composed(self._overrides(params, None), 0) as job:
            check(job.resolved())

    def subdirectory(self, number: int, params: dict[str, Parameter]) -> str:
        """Return `hydra.sweep.subdir` of a trial."""
        return str(self.compose(number, params).hydra.sweep.subdir)

    def run(self, trials: Sequence[ClaimedTrial]) -> list[Outcome]:
        """Run trials one after another, each here or, if configured, in a process of its own."""
        return [self._run(trial) for trial in trials]

    def _run(self, trial: ClaimedTrial) -> Outcome:
        setup_globals()
        config = self.compose(*trial)
        with environment_variables({TRIAL_VARIABLE: str(trial.number)}):
            if config.hydra.sweeper.isolate:
                return self._run_isolated(trial)
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
        # From memory, because the disk may be full.
        return self._task.outcome or outcome_of_error(job._return_value)

    def _run_isolated(self, trial: ClaimedTrial) -> Outcome:
        directory = self._directory / trial.subdirectory
        directory.mkdir(parents=True, exist_ok=True)
        names = self._task.metric
        metric = "null" if names is None else f"[{','.join(map(_quoted, names))}]"
        command = run_command(
            [
                *_kept_hydra_overrides(self._config),
                *self._fixed,
                *to_overrides(trial.params),
                "hydra.mode=RUN",
                f"hydra.run.dir={_quoted(str(directory))}",
                "++hydra.callbacks.bn_optuna="
                "{_target_:hydra_plugins.bn_optuna.OutcomeCallback,"
                f"metric:{metric},directions:{self._task.n_directions}}}",
            ]
        )
        started = time.perf_counter()
        with open(directory / PROCESS_LOG, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches the sweeper only, which ends the whole session.
                start_new_session=True,
            )
            try:
                code = process.wait()
            except BaseException:
                end_session(process)
                raise
        outcome = read_outcome(directory)
        if outcome is None or (code != 0 and outcome.state == "COMPLETE"):
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            text = (directory / PROCESS_LOG).read_text(encoding="utf-8", errors="replace")
            lines = text.rstrip().splitlines()[-ERROR_LINES:]
            outcome = failed("\n".join([*lines, f"the trial's process ended: {how}"]))
        return _timed(outcome, started)

    def launch(self, trials: Sequence[ClaimedTrial]) -> list[Outcome]:
        """Run trials at the same time, with the launcher of the configuration."""
        overrides = [
            [
                *self._overrides(trial.params, trial.subdirectory),
                f"++hydra.job.env_set.{TRIAL_VARIABLE}='{trial.number}'",
            ]
            for trial in trials
        ]
        lost = "the launcher returned no result for this trial"
        returns: Sequence[JobReturn] = []
        try:
            returns = self._launcher.launch(overrides, initial_job_idx=trials[0].number)
        except Exception as error:
            # The launcher may have lost only one of the jobs: the others wrote their outcomes.
            lost = f"the launcher failed: {error}"
        outcomes = []
        for i, trial in enumerate(trials):
            outcome = read_outcome(self._directory / trial.subdirectory)
            if outcome is None and i < len(returns) and returns[i].status == JobStatus.FAILED:
                outcome = outcome_of_error(returns[i]._return_value)
            outcomes.append(outcome or failed(lost))
        return outcomes

    def _overrides(self, params: dict[str, Parameter], subdirectory: str | None) -> list[str]:
        overrides = [
            *self._fixed,
            *to_overrides(params),
            f"hydra.sweep.dir={_quoted(str(self._directory))}",
        ]
        if subdirectory is not None:
            overrides.append(f"hydra.sweep.subdir={_quoted(subdirectory)}")
        return overrides


def write_outcome(
    config: DictConfig, job: JobReturn, metric: list[str] | None, n_directions: int
) -> None:
    """Write the outcome of the trial of this process, unless it is a rank that a trial started."""
    if os.getsid(0) != os.getpid():
        return
    result = job._return_value
    if job.status == JobStatus.COMPLETED:
        outcome = outcome_of(result, metric, n_directions)
    else:
        outcome = outcome_of_error(result)
    _write(outcome, Path(config.hydra.runtime.output_dir))


def _write(outcome: Outcome, directory: Path) -> None:
    try:
        outcome.write(directory)
    except OSError as error:
        _log.warning("the outcome of this trial is not on disk, only in the study: %s", error)


def _timed(outcome: Outcome, started: float) -> Outcome:
    seconds = round(time.perf_counter() - started, 3)
    # A task that was computed together with others returns its share of the time.
    return replace(outcome, attributes={SECONDS: seconds} | outcome.attributes)


def _kept_hydra_overrides(config: DictConfig) -> list[str]:
    """Return the overrides of Hydra's own configuration that a trial's process gets, too."""
    dropped = ("hydra.mode=", "hydra.sweep.", "hydra.run.dir=", "hydra/launcher=")
    texts: Any = OmegaConf.to_container(config.hydra.overrides.hydra)
    return [text for text in texts if not text.lstrip("+").startswith(dropped)]


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()
