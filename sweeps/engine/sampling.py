"""Samplers: which choose all points beforehand, and how their random numbers go on.

A grid, random and quasi-random points do not depend on results. They are drawn once, when the study
is filled, and every worker takes the next one: no point is tried twice because two workers asked at
the same moment. The other samplers draw when a trial begins.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    GridSampler,
    QMCSampler,
    RandomSampler,
)
from optuna.trial import Trial

from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.space import Parameter, Space

# Those that need no results: they choose all points beforehand.
FINITE = (GridSampler, BruteForceSampler)
PLANNED = (*FINITE, RandomSampler, QMCSampler)

Suggest = Callable[[Trial], dict[str, Parameter]]
Point = tuple[dict[str, Parameter], dict[str, BaseDistribution]]


class Points:
    """The points of a sweep, as far as its sampler chooses them beforehand.

    Args:
        sampler: the sampler's configuration: `_target_` and its arguments.
        space: what is swept.
        suggest: draws a point by a trial.
        conditional: whether `suggest` draws more than `space` says.
        n_trials: how many trials the sweep has; None for a grid's every point.

    Raises:
        SweepError: the sampler, or its number of trials, cannot be used.
    """

    def __init__(
        self,
        sampler: Mapping[str, Any],
        space: Space,
        suggest: Suggest,
        conditional: bool,
        n_trials: int | None,
    ) -> None:
        self._sampler = dict(sampler)
        self._suggest = suggest
        kind = sampler_class(sampler)
        self.is_finite = issubclass(kind, FINITE)
        self.are_planned = issubclass(kind, PLANNED)
        if conditional and issubclass(kind, GridSampler):
            raise SweepError(
                "a grid has no conditional parameters, and `custom_search_space` draws some: use "
                "hydra/sweeper/sampler=brute_force, which tries every combination there is"
            )
        if self.is_finite:
            self._planned = self._every_point() if conditional else self._product(space)
            n_trials = min(n_trials or len(self._planned), len(self._planned))
        elif n_trials is None:
            raise SweepError(
                f"`n_trials` expected a number, as {kind.__name__} has no end, got null"
            )
        else:
            self._planned = self._drawn(n_trials) if self.are_planned else []
        self.n_trials = n_trials

    def __getitem__(self, slot: int) -> Point | None:
        """The point of a slot, from 0; None if it is drawn when its trial begins."""
        return self._planned[slot] if self.are_planned else None

    def _product(self, space: Space) -> list[Point]:
        return [(point, space.distributions) for point in space.grid()]

    def _every_point(self) -> list[Point]:
        # Seeded, so that everybody has the same point in the same slot.
        seeded = {**self._sampler, "seed": self._sampler.get("seed") or 0}
        return self._rehearsed(make_sampler(seeded), None)

    def _drawn(self, n_trials: int) -> list[Point]:
        return self._rehearsed(make_sampler(self._sampler), n_trials)

    def _rehearsed(self, sampler: BaseSampler, n_trials: int | None) -> list[Point]:
        """The points of a study in memory, whose trials all end at once."""

        def objective(trial: Trial) -> float:
            self._suggest(trial)
            return 0.0

        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=n_trials)
        return [(trial.params, trial.distributions) for trial in study.get_trials(deepcopy=False)]


def sampler_class(sampler: Mapping[str, Any]) -> type[BaseSampler]:
    """The class that a sampler's configuration names.

    Raises:
        SweepError: there is no such sampler.
    """
    found: type[BaseSampler] = _class_of("sampler", sampler, BaseSampler)
    return found


def make_sampler(sampler: Mapping[str, Any], first_trial: int = 0) -> BaseSampler:
    """Build the sampler of a worker.

    Args:
        sampler: its configuration.
        first_trial: the number of the first trial it draws. A seeded sampler that starts later than
            at trial 0, in another worker or after a resume, must not draw the same numbers again:
            its seed is made from `seed` and this number.

    Raises:
        SweepError: its arguments cannot be used.
    """
    arguments = dict(sampler)
    seed = arguments.get("seed")
    if seed is not None and first_trial > 0:
        arguments["seed"] = int(np.random.SeedSequence([seed, first_trial]).generate_state(1)[0])
    return _built("sampler", arguments, BaseSampler)


def make_pruner(pruner: Mapping[str, Any] | None) -> optuna.pruners.BasePruner:
    """Build the study's pruner; none is Optuna's NopPruner.

    Raises:
        SweepError: there is no such pruner, or its arguments cannot be used.
    """
    if pruner is None:
        return optuna.pruners.NopPruner()
    return _built("pruner", pruner, optuna.pruners.BasePruner)


def _class_of(key: str, config: Mapping[str, Any], kind: type) -> Any:
    target = config.get("_target_")
    try:
        found = get_class(str(target))
    except Exception as error:
        raise SweepError(f"`{key}` expected one of Optuna's {key}s, got {target}") from error
    if not issubclass(found, kind):
        raise SweepError(f"`{key}` expected one of Optuna's {key}s, got {target}")
    return found


def _built(key: str, config: Mapping[str, Any], kind: type) -> Any:
    _class_of(key, config, kind)  # before anything else is called
    try:
        with warnings.catch_warnings():
            # Who names a sampler has chosen it.
            warnings.simplefilter("ignore", ExperimentalWarning)
            built = instantiate(dict(config))
    except (HydraException, ValueError, TypeError, ImportError) as error:
        reason = error.__cause__ or error
        raise SweepError(f"`{key}` {config.get('_target_')} cannot be built: {reason}") from error
    if not isinstance(built, kind):  # with `_partial_`
        raise SweepError(f"`{key}` expected one of Optuna's {key}s, got {config.get('_target_')}")
    return built
