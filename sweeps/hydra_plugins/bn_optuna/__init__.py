"""`hydra/sweeper=bn_optuna`: Hydra's way to a sweep by Optuna.

Hydra imports this whenever one of its programs starts, so that Optuna is imported only by a sweep.
Where Hydra does not find it by itself, in an editable install, `register()` makes it known, before
`hydra.main`.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A sweep whose study is shared by all its workers, and goes on where it stopped.

    Args:
        settings: the keys of `conf/hydra/sweeper/_bn_optuna.yaml`, where they are explained.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._program = (hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep to its end, or until it is stopped.

        Raises:
            SweepError: it cannot begin or go on, or more trials are lost than allowed.
        """
        from hydra_plugins.bn_optuna._sweep import run_sweep

        run_sweep(self._settings, *self._program, arguments)


class SweeperSearchPath(SearchPathPlugin):
    """Lets every program find the sweeper's configurations, after its own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("bn_optuna", f"file://{Path(__file__).parent / 'conf'}")


class OutcomeCallback(Callback):
    """Writes the outcome of a trial that runs in a process of its own.

    Args:
        metric: names of the values that the task returns.
        directions: how many there are.
    """

    def __init__(self, metric: list[str] | None, directions: int) -> None:
        self._metric = metric
        self._directions = directions

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        from hydra_plugins.bn_optuna._jobs import write_outcome

        write_outcome(config, job_return, self._metric, self._directions)


def register() -> None:
    """Make the sweeper known to Hydra."""
    for plugin in (OptunaSweeper, SweeperSearchPath):
        Plugins.instance().register(plugin)
