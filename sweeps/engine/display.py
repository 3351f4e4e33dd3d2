"""What the user sees of a sweep: a live table in a terminal, else a line a trial; a summary."""

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
from bn_lightning.sweeps.engine.outcome import (
    DIRECTORY,
    DIVERGED,
    ERROR,
    INTERRUPTED,
    SECONDS,
    last_line,
)
from bn_lightning.sweeps.engine.slots import Counts, Ledger
from bn_lightning.sweeps.engine.space import value_text

RESULTS_FILE = "optimization_results.yaml"


class Display:
    """The progress of a sweep.

    Args:
        title: what is swept.
        ledger: of the sweep; whoever reads the study keeps it up.
        directions: of the study.
        console: where to show it; a live table if that is a terminal, else one line a trial.
    """

    def __init__(
        self,
        title: str,
        ledger: Ledger,
        directions: Sequence[StudyDirection],
        console: Console | None = None,
    ) -> None:
        self._title = title
        self._ledger = ledger
        self._directions = list(directions)
        self._console = console or Console(soft_wrap=True)
        self._best: list[FrozenTrial] = []
        self._take_best([trial for trial, _ in ledger.take_new()])
        self._settled_before = ledger.counts().settled
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
        """Show what the ledger has learnt."""
        new = self._ledger.take_new()
        self._take_best([trial for trial, _ in new])
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        for trial, counts in new:
            self._console.print(trial_line(trial, counts), highlight=False, markup=False)

    def _take_best(self, trials: list[FrozenTrial]) -> None:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        self._best = best_trials([*self._best, *complete], self._directions)

    def _table(self) -> Table:
        counts = self._ledger.counts()
        table = Table(title=self._title, show_header=False)
        done = f"{counts.settled:,} of {counts.total:,}"
        if counts.running:
            done += f", {counts.running} running"
        table.add_row("trials", done)
        table.add_row(
            "pruned / failed / diverged", f"{counts.pruned} / {counts.lost} / {counts.diverged}"
        )
        for trial in self._best[:1]:
            table.add_row("best so far", f"{_values(trial)} in trial {trial.number}")
            table.add_row("", _params(trial))
        if (left := self._seconds_left(counts)) is not None:
            table.add_row("time left", f"about {timedelta(seconds=round(left))}")
        return table

    def _seconds_left(self, counts: Counts) -> float | None:
        here = counts.settled - self._settled_before
        if here == 0:
            return None
        return (time.monotonic() - self._started) / here * (counts.total - counts.settled)


def trial_line(trial: FrozenTrial, counts: Counts) -> str:
    """One trial in one line: how it ended, its point, its time, how far the sweep is."""
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
    parts.append(f"[{counts.settled}/{counts.total}]")
    return "  ".join(part for part in parts if part)


def write_results(directory: Path, best: Sequence[FrozenTrial], directions: int) -> None:
    """Write `optimization_results.yaml` with the keys of hydra-optuna-sweeper."""
    results: dict[str, Any] = {"name": "optuna"}
    if directions == 1:
        results["best_params"] = dict(best[0].params)
        results["best_value"] = best[0].value
    else:
        results["solutions"] = [
            {"params": dict(trial.params), "values": list(trial.values)} for trial in best
        ]
    OmegaConf.save(OmegaConf.create(results), directory / RESULTS_FILE)


def print_summary(
    best: Sequence[FrozenTrial],
    counts: Counts,
    commands: Mapping[int, str],
    directory: Path,
    console: Console | None = None,
) -> None:
    """Say how a sweep ended.

    Args:
        best: the best trial, or the best ones.
        counts: of the sweep.
        commands: trial number to the command that runs it again.
        directory: of the sweep, printed last.
        console: where to say it; standard output if none is named.
    """
    console = console or Console(soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(
        f"{counts.settled} of {counts.total} trials: {counts.complete} complete "
        f"({counts.diverged} of them diverged), {counts.pruned} pruned, {counts.lost} failed"
    )
    for trial in best:
        say(f"best: {_values(trial)} in trial {trial.number}  {_params(trial)}")
        say(f"  {trial.user_attrs.get(DIRECTORY, '')}")
        say(f"  {commands[trial.number]}")
    say(str(directory))


def _values(trial: FrozenTrial) -> str:
    return ", ".join(f"{value:.6g}" for value in trial.values)


def _params(trial: FrozenTrial) -> str:
    return " ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value_text(value)}"
        for name, value in trial.params.items()
    )
