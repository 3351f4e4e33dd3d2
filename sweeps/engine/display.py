"""Show a sweep: a live table in a terminal, else a line for each trial; and a summary."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bn_lightning.sweeps.engine.best import best_trials
from bn_lightning.sweeps.engine.outcome import last_line
from bn_lightning.sweeps.engine.slots import SlotCounts, Slots
from bn_lightning.sweeps.engine.space import value_text
from bn_lightning.sweeps.engine.stored_names import (
    DIRECTORY,
    DIVERGED,
    ERROR,
    INTERRUPTED,
    NOTICE,
    RESULTS_FILE,
    SECONDS,
)


class Display:
    """The progress of a sweep.

    Args:
        title: name of the sweep.
        slots: of the sweep; updated elsewhere.
        directions: of the study.
        console: where to show the progress; a live table if it is a terminal.
    """

    def __init__(
        self,
        title: str,
        slots: Slots,
        directions: Sequence[StudyDirection],
        console: Console | None = None,
    ) -> None:
        self._title = title
        self._slots = slots
        self._directions = list(directions)
        self._console = console or Console(soft_wrap=True)
        self._best: list[FrozenTrial] = []
        self._notices: set[str] = set()
        self._take_new()
        self._settled_before = slots.counts().settled
        self._started = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self) -> None:
        """Show the trials that have ended since the last call."""
        new = self._take_new()
        for trial, _ in new:
            if (notice := trial.user_attrs.get(NOTICE)) and notice not in self._notices:
                self._notices.add(notice)
                self._console.print(notice, highlight=False, markup=False)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        for trial, counts in new:
            is_last = trial is new[-1][0] and counts.settled < counts.total
            line = trial_line(trial, counts, self._time_left() if is_last else "")
            self._console.print(line, highlight=False, markup=False)

    def _take_new(self) -> list[tuple[FrozenTrial, SlotCounts]]:
        new = self._slots.take_new()
        complete = [trial for trial, _ in new if trial.state == TrialState.COMPLETE]
        self._best = best_trials([*self._best, *complete], self._directions)
        return new

    def _table(self) -> Table:
        counts = self._slots.counts()
        table = Table(title=self._title, show_header=False)
        running = f", {counts.running} running" if counts.running else ""
        table.add_row("trials", f"{counts.settled:,} of {counts.total:,}{running}")
        table.add_row(
            "pruned / failed / diverged", f"{counts.pruned} / {counts.lost} / {counts.diverged}"
        )
        for trial in self._best[:1]:
            table.add_row("best so far", f"{_values(trial)} in trial {trial.number}")
            table.add_row("", _params(trial))
        if left := self._time_left():
            table.add_row("time left", left)
        return table

    def _time_left(self) -> str:
        """Return about how long the sweep still takes, "" before a trial has ended."""
        counts = self._slots.counts()
        done = counts.settled - self._settled_before
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / done * (counts.total - counts.settled)
        return f"about {timedelta(seconds=round(seconds))}"


def trial_line(trial: FrozenTrial, counts: SlotCounts, time_left: str = "") -> str:
    """Return a line with the result of a trial, its parameters, its time and the progress."""
    if trial.state == TrialState.COMPLETE:
        ended = _values(trial) + (" diverged" if trial.user_attrs.get(DIVERGED) else "")
    elif trial.state == TrialState.PRUNED:
        ended = "pruned"
    elif trial.user_attrs.get(INTERRUPTED):
        ended = "interrupted"
    else:
        ended = f"failed ({last_line(trial.user_attrs.get(ERROR, ''))})"
    parts = [f"trial {trial.number}: {ended}", _params(trial)]
    if SECONDS in trial.user_attrs:
        parts.append(f"{trial.user_attrs[SECONDS]:.1f} s")
    if time_left:
        parts.append(f"{time_left} left")
    parts.append(f"[{counts.settled}/{counts.total}]")
    return "  ".join(part for part in parts if part)


def write_results(directory: Path, best: Sequence[FrozenTrial], n_directions: int) -> None:
    """Write `optimization_results.yaml` with the keys of hydra-optuna-sweeper."""
    results: dict[str, Any] = {"name": "optuna"}
    if n_directions == 1:
        results["best_params"] = dict(best[0].params)
        results["best_value"] = best[0].value
    else:
        results["solutions"] = [
            {"params": dict(trial.params), "values": list(trial.values)} for trial in best
        ]
    OmegaConf.save(OmegaConf.create(results), directory / RESULTS_FILE)


def print_sweep_summary(
    best: Sequence[FrozenTrial],
    counts: SlotCounts,
    n_again: int,
    commands: Mapping[int, str],
    directory: Path,
    console: Console | None = None,
) -> None:
    """Print the counts and the best trials of a sweep.

    Args:
        best: the best trials.
        counts: of the sweep.
        n_again: number of failed trials that the same command would run again.
        commands: from the number of a trial to the command that repeats it.
        directory: of the sweep, printed last.
        console: where to print; standard output by default.
    """
    again = f", {n_again} to be tried again" if n_again else ""
    lines = [
        f"{counts.settled} of {counts.total} trials: {counts.complete} complete "
        f"({counts.diverged} of them diverged), {counts.pruned} pruned, {counts.lost} failed{again}"
    ]
    for trial in best:
        lines += [
            f"best: {_values(trial)} in trial {trial.number}  {_params(trial)}",
            f"  {trial.user_attrs.get(DIRECTORY, '')}",
            f"  {commands[trial.number]}",
        ]
    console = console or Console(soft_wrap=True)
    for line in [*lines, str(directory)]:
        console.print(line, highlight=False, markup=False)


def _values(trial: FrozenTrial) -> str:
    return ", ".join(f"{value:.6g}" for value in trial.values)


def _params(trial: FrozenTrial) -> str:
    return " ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value_text(value)}"
        for name, value in trial.params.items()
    )
