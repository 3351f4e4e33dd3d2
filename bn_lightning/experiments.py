"""Run experiments and sweeps from Python, in a notebook for instance, and read what they left.

    run = run_experiment(["+experiment=mnist_bn", "trainer.max_steps=500"])
    run.metrics["test/accuracy"], run.history["test/accuracy"].values
    sweep = run_sweep(["+experiment=mnist_bn", "+sweep=quick"])
    sweep.best.params, sweep.figures()

Each call does what its command does, with the same arguments and files, and leaves no state of
Hydra's behind. It seeds the global random generators.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from omegaconf import DictConfig
from torch import nn

from bn_lightning.cli.command import call_command
from bn_lightning.cli.error_line import ExperimentError, one_line_errors
from bn_lightning.models.protocol import network_of
from bn_lightning.runs.checkpoint import TrainedCheckpoint
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.sweeps.analysis.compared_runs import read_runs
from bn_lightning.sweeps.analysis.provenance import with_provenance
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable, read_study, to_csv
from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.report.figure import Figure
from bn_lightning.sweeps.report.matplotlib_renderer import Picture, draw
from bn_lightning.sweeps.report.run_figures import figures_of_run
from bn_lightning.sweeps.report.write_report import ReportOptions, sweep_figures, write_report
from bn_lightning.train import train


class LoggedMetric(NamedTuple):
    """What one metric was at the steps at which it was logged.

    Attributes:
        steps: (S,) int64, training steps, ascending.
        values: (S,) float64.
    """

    steps: Int[np.ndarray, "S"]
    values: Float[np.ndarray, "S"]


class History(Mapping[str, LoggedMetric]):
    """The logged metrics of a run: name -> `LoggedMetric`.

    Args:
        metrics: name -> (step, value) pairs.
    """

    def __init__(self, metrics: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        self._metrics = {
            name: LoggedMetric(
                np.array([step for step, _ in points], dtype=np.int64),
                np.array([value for _, value in points], dtype=np.float64),
            )
            for name, points in metrics.items()
        }

    def __getitem__(self, name: str) -> LoggedMetric:
        if name not in self._metrics:
            raise KeyError(f"expected one of {', '.join(self._metrics)}, got {name}")
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def __repr__(self) -> str:
        return f"History({', '.join(f'{n}: {len(s.steps)}' for n, s in self.items())})"

    def to_pandas(self) -> Any:
        """Return a DataFrame with a column for each metric and the steps as index.

        A cell is NaN if the metric was not logged at that step.

        Raises:
            ExperimentError: pandas is not installed.
        """
        pandas = _pandas()
        columns = {name: pandas.Series(s.values, index=s.steps) for name, s in self.items()}
        frame = pandas.DataFrame(columns).sort_index()
        frame.index.name = "step"
        return frame


class Figures(dict[str, Picture]):
    """Name -> a figure of matplotlib. As the result of a cell, a notebook shows all of them.

    Args:
        described: name -> description.
    """

    def __init__(self, described: Mapping[str, Figure]) -> None:
        super().__init__({name: draw(figure) for name, figure in described.items()})

    def _repr_html_(self) -> str:
        return "\n".join(
            f'<img alt="{escape(name)}" src="data:image/png;base64,'
            f'{base64.b64encode(picture._repr_png_()).decode()}">'
            for name, picture in self.items()
        )


@dataclass(frozen=True)
class Run:
    """A run, as its directory described it when it was read.

    Attributes:
        directory: of the run, absolute.
        record: the content of its run.json, which runs/record.py describes.
        trusted: as for `load_run`.
    """

    directory: Path
    record: Mapping[str, Any] = field(repr=False)
    trusted: tuple[str, ...] = field(default=(), repr=False)

    @property
    def status(self) -> str:
        """How the run ended, "completed" for instance; "running" if it has not."""
        return self.record["status"]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.record["config"]

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric, NaN included; accuracies are in [0, 1], losses in nats."""
        metrics = self.record.get("metrics") or {}
        return {name: math.nan if value is None else value for name, value in metrics.items()}

    @property
    def history(self) -> History:
        """Every logged value, read from metrics.csv."""
        with one_line_errors():
            return History(read_metrics(self.directory))

    def network(self, checkpoint: str = "last") -> nn.Module:
        """Build the trained network, on the CPU and in evaluation mode.

        Args:
            checkpoint: "last", whose test accuracy `metrics` has, or "best", by validation.

        Raises:
            ExperimentError: there is no such checkpoint, or it would build a class that is not
                trusted.
        """
        path = self.directory / "checkpoints" / f"{checkpoint}.ckpt"
        with one_line_errors():
            return network_of(TrainedCheckpoint.read(str(path), self.trusted).build_model()).eval()

    def figures(self) -> Figures:
        """Draw the figures of the run that its metrics suffice for, such as `accuracy`."""
        with one_line_errors():
            (run,) = read_runs([self.directory])
            return Figures(figures_of_run(run))


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its study described it when it was read.

    Attributes:
        directory: of the sweep, absolute.
        table: its trials, and how they were made.
    """

    directory: Path
    table: TrialTable = field(repr=False)

    @property
    def trials(self) -> tuple[TrialRow, ...]:
        """All trials: number, state, values, params and attributes, as plain values."""
        return self.table.rows

    @property
    def best(self) -> TrialRow | None:
        """The best complete trial, None without one; of several directions, a first optimum."""
        complete = [row for row in self.trials if row.is_complete]
        return next(iter(best_trials(complete, self.table.optuna_directions)), None)

    def run(self, number: int) -> Run:
        """Read the run of a trial."""
        row = next((row for row in self.trials if row.number == number), None)
        if row is None or "directory" not in row.attributes:
            raise ExperimentError(
                f"expected `number` to be a trial that has a directory, got {number} of "
                f"{len(self.trials)} trials"
            )
        return _read_run(self.directory / str(row.attributes["directory"]), _TYPED)

    def figures(self) -> Figures:
        """Draw which learning rates and initializations train, with and without BatchNorm.

        A sweep that is no grid of them has its history, the value against each parameter, and
        importances instead.
        """
        with one_line_errors():
            return Figures(sweep_figures(self.table))

    def report(self, output: str | Path | None = None) -> Path:
        """Write the report of the sweep, as `bn-report` does, and return the path of its page.

        Args:
            output: the folder to write to; None for the sweep's own.
        """
        with one_line_errors():
            options = ReportOptions(output=None if output is None else Path(output))
            return write_report([str(self.directory)], options)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each trial and the columns of trials.csv.

        Raises:
            ExperimentError: pandas is not installed.
        """
        return _pandas().read_csv(io.StringIO(to_csv(self.table)))


# What somebody typed may build anything: the beginning of every name.
_TYPED = ("",)


def run_experiment(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Run:
    """Train and test a network as `bn-train` does with these arguments, and return the run.

    Args:
        overrides: such as "+experiment=mnist_bn" and "trainer.max_steps=500".
        config_dir: a folder with configurations of your own, as for `--config-dir`.

    Raises:
        ExperimentError: the run failed.
        KeyboardInterrupt: SIGINT came; `ckpt_path=last` resumes the run.
    """
    directories: list[Path] = []

    def task(config: DictConfig) -> Any:
        directories.append(Path(config.paths.output_dir).absolute())
        return train(config)

    with _threads_restored():
        call_command(task, "train", _checked(overrides), config_dir)
    return _read_run(directories[-1], _TYPED)


def run_sweep(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Sweep:
    """Run or resume a sweep as `bn-train -m` does with these arguments, and return its trials.

    The sweeper is `hydra/sweeper=bn_optuna`. Trials run in this process, or in worker processes if
    `hydra.sweeper.n_jobs` is above 1.

    Args:
        overrides: such as "+experiment=mnist_bn", "+sweep=quick" and "optimizer.lr=0.1,1".
        config_dir: a folder with configurations of your own, as for `--config-dir`.

    Raises:
        ExperimentError: the sweep cannot begin or be resumed, or too many trials failed.
        KeyboardInterrupt: SIGINT came; the same call resumes the sweep.
    """
    arguments = ["hydra/sweeper=bn_optuna", *_checked(overrides)]
    with _threads_restored():
        place = call_command(train, "train", arguments, config_dir, multirun=True)
    with one_line_errors():
        table = with_provenance(read_study(place.url, place.study), place.directory)
    return Sweep(place.directory, table)


def load_run(directory: str | Path, *, trusted: Sequence[str] = ()) -> Run:
    """Read a run from its directory.

    Args:
        directory: of the run.
        trusted: beginnings of the names of your own classes, such as "my_package.", that `network`
            may build from its checkpoints.

    Raises:
        ExperimentError: the directory is not a run's.
    """
    return _read_run(Path(directory).absolute(), tuple(trusted))


def _read_run(directory: Path, trusted: tuple[str, ...]) -> Run:
    with one_line_errors():
        return Run(directory, read_run(directory), trusted)


def _checked(overrides: Sequence[str]) -> list[str]:
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise TypeError(
            f"expected `overrides` to be a list of texts, got {overrides!r}; write "
            '["+experiment=mnist_bn"]'
        )
    return list(overrides)


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Restore torch's number of threads, which `extras.num_threads` changes."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ExperimentError(
            "expected pandas to be installed for `to_pandas`, got none; pip install pandas"
        ) from error
    return pandas
