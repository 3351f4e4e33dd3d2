"""Prune trials that train together: all of them report a value, then each is compared with all.

Optuna's pruners judge one trial when it reports. `MedianPruner` compares it with trials that have
ended, and a batch has none at its first steps. `SuccessiveHalvingPruner` and `HyperbandPruner`
compare it with those that were judged before, so that the order decides. Here the order of the
trials in a batch changes nothing.

Source of the rules: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and
hyperparameter optimization", algorithm 1; Li et al. 2018, "Hyperband", algorithm 1; Golovin et al.
2017, "Google Vizier", section 3.2.2 (median).
"""

import copy
import math
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import accumulate
from typing import NamedTuple

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState, create_trial

from bn_lightning.sweeps.engine.storage import RetryingStorage

ValuesByStep = Mapping[int, float]
"""Reported values of a trial, by step."""

# Optuna's pruners that compare a trial with those that have ended, or with nothing.
_OF_ENDED_TRIALS = (NopPruner, PercentilePruner, ThresholdPruner, WilcoxonPruner)


class Rung(NamedTuple):
    """What is known after the trials that train together have reported at a step.

    Attributes:
        study: name of the study.
        direction: of the study.
        curves: by number of the trial: of those to judge, of those of the batch that have left it,
            and of earlier ones that were completed or pruned.
        members: numbers of the trials to judge, each with a value at `step`.
        step: at which the members have reported.
        last_step: at which their training ends.
    """

    study: str
    direction: StudyDirection
    curves: Mapping[int, ValuesByStep]
    members: Set[int]
    step: int
    last_step: int


class SuccessiveHalving(SuccessiveHalvingPruner):
    """Optuna's `SuccessiveHalvingPruner`, which judges batches, too.

    In a batch, a trial reaches a rung when it first reports at or after `min_resource` times a
    power of `reduction_factor`. Of all trials that have reached the rung, the best
    1/`reduction_factor` are kept, at least one. Rungs between two reports are one.

    Args:
        min_resource: step of the first rung. In a batch, "auto" is a hundredth of its steps.
        reduction_factor: at least 2.
        min_early_stopping_rate: how many of the first rungs are left out.
        bootstrap_count: if no more trials have reached a rung, none is kept.
    """

    def __init__(
        self,
        min_resource: str | int = "auto",
        reduction_factor: int = 4,
        min_early_stopping_rate: int = 0,
        bootstrap_count: int = 0,
    ) -> None:
        super().__init__(min_resource, reduction_factor, min_early_stopping_rate, bootstrap_count)
        self._least = min_resource
        self._factor = reduction_factor
        self._left_out = min_early_stopping_rate
        self._bootstrap = bootstrap_count

    def pruned(self, rung: Rung) -> set[int]:
        """Return which members are not kept."""
        least = self._least
        first = max(1, rung.last_step // 100) if isinstance(least, str) else least
        first *= self._factor**self._left_out
        return _not_kept(rung, rung.curves, first, self._factor, self._bootstrap)


class Hyperband(HyperbandPruner):
    """Optuna's `HyperbandPruner`, which judges batches, too.

    A trial belongs to the same bracket as in Optuna, and is compared with those of its bracket, as
    `SuccessiveHalving` does.

    Args:
        min_resource: step of the first rung of the first bracket; the next begins a rung later.
        max_resource: step of the last rung. In a batch, "auto" is the end of its training.
        reduction_factor: at least 2.
        bootstrap_count: if no more trials have reached a rung, none is kept.
    """

    def __init__(
        self,
        min_resource: int = 1,
        max_resource: str | int = "auto",
        reduction_factor: int = 3,
        bootstrap_count: int = 0,
    ) -> None:
        super().__init__(min_resource, max_resource, reduction_factor, bootstrap_count)
        self._least = min_resource
        self._most = max_resource
        self._factor = reduction_factor
        self._bootstrap = bootstrap_count

    def pruned(self, rung: Rung) -> set[int]:
        """Return which members are not kept in their brackets."""
        most = rung.last_step + 1 if isinstance(self._most, str) else self._most
        count = max(1, math.floor(math.log(most / self._least, self._factor)) + 1)
        shares = [math.ceil(count * self._factor**s / (s + 1)) for s in reversed(range(count))]
        lost: set[int] = set()
        brackets = {number: _bracket(rung.study, number, shares) for number in rung.curves}
        for bracket in range(count):
            curves = {n: curve for n, curve in rung.curves.items() if brackets[n] == bracket}
            first = self._least * self._factor**bracket
            lost |= _not_kept(rung, curves, first, self._factor, self._bootstrap)
        return lost


class Rungs:
    """Reports the values of trials that train together, and tells which of them are pruned.

    The pruner of their study decides: `SuccessiveHalving`, `Hyperband`, or one of Optuna's that
    compare a trial with those that have ended (`MedianPruner`, `PercentilePruner`,
    `ThresholdPruner`, `WilcoxonPruner`). For the latter, all trials of the batch count as ended,
    and one that was pruned or has ended before counts with its last value.

    Args:
        trials: at least one, of one study. They may train in several stacks, one after another.

    Raises:
        ValueError: the study has several directions, or its pruner cannot judge a batch.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = {trial.number: trial for trial in trials}
        self._study = trials[0].study
        self._curves: dict[int, dict[int, float]] = {}
        if len(self._study.directions) > 1:
            raise ValueError(
                "expected the study to have one direction for its pruner, got "
                f"{len(self._study.directions)}; use optuna.pruners.NopPruner"
            )
        pruner = self._study.pruner
        if not isinstance(pruner, (SuccessiveHalving, Hyperband, *_OF_ENDED_TRIALS)):
            raise ValueError(
                "expected the study's pruner to be one that judges trials that train together, got "
                f"{type(pruner).__name__}; use SuccessiveHalving or Hyperband of "
                "bn_lightning.sweeps.engine.rungs, or Optuna's MedianPruner"
            )

    @property
    def numbers(self) -> list[int]:
        """The numbers of the trials."""
        return list(self._trials)

    @property
    def pruner(self) -> str:
        """Name of the pruner's class."""
        return type(self._study.pruner).__name__

    def part(self, places: Sequence[int]) -> "Rungs":
        """Return the rungs of some of the trials, which are compared with the others, too.

        Args:
            places: in `numbers`.
        """
        part = copy.copy(self)  # shares the values
        trials = [*self._trials.values()]
        part._trials = {trials[place].number: trials[place] for place in places}
        return part

    def report(self, values: Mapping[int, float], step: int, last_step: int) -> set[int]:
        """Report values at a step, and return the numbers of the trials that are pruned there.

        Args:
            values: of the trials that are still trained, by number.
            step: of the report.
            last_step: at which the training of these trials ends. None is pruned there.
        """
        storage = next(iter(self._trials.values())).storage
        if isinstance(storage, RetryingStorage):
            storage.together(lambda: self._store(storage, values, step))
        else:
            self._store(storage, values, step)
        for number, value in values.items():
            self._curves.setdefault(number, {})[step] = value
        pruner = self._study.pruner
        if step >= last_step or isinstance(pruner, NopPruner):
            return set()
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        ended = self._study.get_trials(deepcopy=False, states=states)
        curves: dict[int, ValuesByStep] = {
            trial.number: trial.intermediate_values for trial in ended
        }
        rung = Rung(
            self._study.study_name,
            self._study.direction,
            curves | self._curves,
            values.keys(),
            step,
            last_step,
        )
        if isinstance(pruner, SuccessiveHalving | Hyperband):
            return pruner.pruned(rung)
        return _pruned_as_if_ended(pruner, rung)

    def _store(self, storage: BaseStorage, values: Mapping[int, float], step: int) -> None:
        """Write the values, which `Trial.report` would not do again after a failed write."""
        study_id = storage.get_study_id_from_name(self._study.study_name)
        for number, value in values.items():
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            storage.set_trial_intermediate_value(trial_id, step, float(value))


def _not_kept(
    rung: Rung, curves: Mapping[int, ValuesByStep], first: int, factor: int, bootstrap: int
) -> set[int]:
    """Return the members that reach a rung of successive halving at this step and are not kept.

    Args:
        rung: whose members are judged.
        curves: of the trials that are compared.
        first: step of the first rung.
        factor: of trials that reach a rung, one of so many is kept.
        bootstrap: if no more trials have reached it, none is kept.
    """
    if rung.step < first:
        return set()
    at = first
    while at * factor <= rung.step:
        at *= factor
    sign = 1 if rung.direction == StudyDirection.MAXIMIZE else -1
    scores: dict[int, float] = {}
    for number, curve in curves.items():
        reached = min((step for step in curve if step >= at), default=None)
        if reached is not None:
            value = sign * curve[reached]
            scores[number] = -math.inf if math.isnan(value) else value
    arriving = {n for n in rung.members & scores.keys() if _before(curves[n], rung.step) < at}
    if len(scores) <= bootstrap:
        return arriving
    least = sorted(scores.values())[-max(1, len(scores) // factor)]
    return {n for n in arriving if scores[n] < least or math.isnan(curves[n][rung.step])}


def _before(steps: Iterable[int], step: int) -> int:
    return max((other for other in steps if other < step), default=0)


def _bracket(study: str, number: int, shares: Sequence[int]) -> int:
    """Return the bracket of a trial: as in Optuna, whose samplers look at one bracket."""
    place = zlib.crc32(f"{study}_{number}".encode()) % sum(shares)
    return bisect_right(list(accumulate(shares)), place)


def _pruned_as_if_ended(pruner: BasePruner, rung: Rung) -> set[int]:
    """Ask a pruner about each member in a study in which all trials have ended at this step."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study in memory is told, too
    try:
        study = optuna.create_study(direction=rung.direction)
    finally:
        optuna.logging.set_verbosity(level)
    worst = -math.inf if rung.direction == StudyDirection.MAXIMIZE else math.inf
    for curve in rung.curves.values():
        values = {step: value for step, value in curve.items() if step <= rung.step}
        if values:
            last = values[max(values)]
            study.add_trial(
                create_trial(
                    value=worst if math.isnan(last) else last,
                    intermediate_values={**values, rung.step: last},
                )
            )
    members = {
        n: create_trial(state=TrialState.RUNNING, intermediate_values=dict(rung.curves[n]))
        for n in rung.members
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, if all values are NaN
        return {number for number, trial in members.items() if pruner.prune(study, trial)}
