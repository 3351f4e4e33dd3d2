"""`hydra/sweeper=bn_optuna`: the sweeper as a plugin of Hydra, and a launcher of stacks of jobs.

Hydra imports this module in each program that it starts, so Optuna is imported only in a sweep. In
an editable install Hydra does not find the plugin; `register()`, before `hydra.main`, adds it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A sweeper whose workers share a study, and which resumes a sweep that was stopped.

    Args:
        settings: the keys of `conf/hydra/sweeper/_bn_optuna.yaml`, which explains them.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._program = (hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep until it is over or stopped, and return its `Location`.

        Raises:
            SweepError: the sweep cannot begin or be resumed, or too many trials failed.
        """
        from hydra_plugins.bn_optuna._sweep import run_sweep

        return run_sweep(self._settings, *self._program, arguments)


class StackLauncher(Launcher):
    """A launcher that gives the jobs of a batch to a function before they run one by one.

    The function may compute several jobs at once, as bn_lightning's `hydra/launcher=bn_stack` does.
    Works with any sweeper. `hydra/sweeper=bn_optuna` runs it in each of its worker processes.

    Args:
        prepare: dotted path of the function of the jobs' resolved configurations, of `size`, and of
            the `bn_lightning.sweeps.engine.rungs.Rungs` that prune the jobs, None without a pruner.
            It returns a function for each job that it has computed, which is called instead of the
            task, and None for each other job.
        size: most jobs that are computed at once, at least 1.
        batch: most jobs that `hydra/sweeper=bn_optuna` hands over at once.

    Raises:
        ValueError: `size` or `batch` is not a positive integer.
    """

    def __init__(self, prepare: str, size: int, batch: int) -> None:
        for name, value in (("size", size), ("batch", batch)):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"expected `hydra.launcher.{name}` to be a positive integer, got {value!r}"
                )
        self._prepare, self._size = prepare, size

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra_plugins.bn_optuna._job_composer import JobComposer

        self._program = (hydra_context, task_function, config)
        self._composer = JobComposer(hydra_context.config_loader, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return what each returned."""
        from hydra_plugins.bn_optuna._stack_launcher import launch_together

        return launch_together(
            self._prepare,
            self._size,
            self._program,
            self._composer,
            job_overrides,
            initial_job_idx,
        )


class SweeperSearchPath(SearchPathPlugin):
    """Adds the sweeper's configurations to the search path of each program."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("bn_optuna", f"file://{Path(__file__).parent / 'conf'}")


class OutcomeCallback(Callback):
    """Writes the outcome of a trial that runs in a process of its own.

    Args:
        metric: keys of the values in the mapping that the task returns; None if it returns numbers.
        directions: number of values.
    """

    def __init__(self, metric: list[str] | None, directions: int) -> None:
        self._metric = metric
        self._directions = directions

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        from hydra_plugins.bn_optuna._trial_runner import write_outcome

        write_outcome(config, job_return, self._metric, self._directions)


def register() -> None:
    """Register the sweeper and the launcher with Hydra."""
    for plugin in (OptunaSweeper, StackLauncher, SweeperSearchPath):
        Plugins.instance().register(plugin)
