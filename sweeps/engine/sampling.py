"""Samplers: which of them choose all points in advance, and how a seed continues.

Grid, brute-force, random and quasi-random samplers do not depend on results. Their points are
drawn once, when the study is filled, and each worker takes the next one, so two workers that ask at
the same time never try the same point. All other samplers draw a point when its trial begins. A
`GridRefinement` is between them: its points are known, and results choose which of them are tried.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, QMCSampler, RandomSampler
from optuna.trial import FrozenTrial, Trial

from bn_lightning.sweeps.engine.space import Parameter, Space
from bn_lightning.sweeps.engine.sweep_error import SweepError

# Samplers that choose all points in advance; the finite ones choose how many there are, too.
FINITE = (GridSampler, BruteForceSampler)
PLANNED = (*FINITE, RandomSampler, QMCSampler)


class Point(NamedTuple):
    """The parameters of a trial and the distributions they are from; empty if not drawn yet."""

    params: dict[str, Parameter]
    distributions: dict[str, BaseDistribution]


Following = Callable[[Mapping[int, FrozenTrial | None]], Sequence[int]]
"""From the slots so far, each with its trial or None without a result, to the next slots."""


class RefinedGrid(NamedTuple):
    """A grid, and the points between its points.

    Attributes:
        space: its distributions contain all points.
        points: one for each slot, those of the grid first.
        n_trials: number of points of the grid.
        following: chooses the slots of the next round when all slots so far have ended.
    """

    space: Space
    points: list[Point]
    n_trials: int
    following: Following


class GridRefinement(ABC):
    """Tries all points of a grid, then points between them that the results ask for, in rounds."""

    @abstractmethod
    def refine(self, space: Space) -> RefinedGrid:
        """Return the points of a space.

        Raises:
            SweepError: the space cannot be refined.
        """


class SamplingPlan:
    """The sampler of a sweep, and the points that it chooses in advance.

    Args:
        sampler: the sampler's configuration: `_target_` and its arguments.
        space: the search space.
        n_trials: number of trials of the sweep; None for all points of a finite sampler.

    Attributes:
        space: the search space; with a `GridRefinement`, one that contains all of its points.
        n_trials: number of trials of the sweep; with a `GridRefinement`, of its first round.
        following: chooses the slots of further rounds; None without them.

    Raises:
        SweepError: the sampler cannot be used, or needs a number of trials.
    """

    def __init__(self, sampler: Mapping[str, Any], space: Space, n_trials: int | None) -> None:
        self.space = space
        self._sampler = dict(sampler)
        kind = _class_of("sampler", sampler, (BaseSampler, GridRefinement))
        is_finite = issubclass(kind, FINITE)
        self.is_planned = issubclass(kind, (*PLANNED, GridRefinement))
        self.following: Following | None = None
        self._points: list[Point] = []
        if issubclass(kind, GridSampler | GridRefinement) and space.custom is not None:
            raise SweepError(
                "expected `custom_search_space` to be null for a grid, which has no conditional "
                "parameters, got a function; choose hydra/sweeper/sampler=brute_force"
            )
        if issubclass(kind, GridRefinement):
            if n_trials is not None:
                raise SweepError(
                    f"expected `n_trials` to be null for {kind.__name__}, whose results choose how "
                    f"many trials there are, got {n_trials}; set hydra.sweeper.n_trials=null"
                )
            refinement: GridRefinement = _built("sampler", sampler, GridRefinement)
            self.space, self._points, n_trials, self.following = refinement.refine(space)
        elif is_finite and space.custom is None:
            self._points = [Point(params, space.distributions) for params in space.grid()]
        elif is_finite:
            # With a seed, each process has the same point in the same slot.
            seeded = {**self._sampler, "seed": self._sampler.get("seed") or 0}
            self._points = _simulated(seeded, space, None)
        elif n_trials is None:
            raise SweepError(
                f"expected `n_trials` to be a number for {kind.__name__}, which has no last trial, "
                "got null; set hydra.sweeper.n_trials=N"
            )
        elif self.is_planned:
            self._points = _simulated(self._sampler, space, n_trials)
        self.n_trials: int = n_trials or len(self._points)
        if is_finite:
            self.n_trials = min(self.n_trials, len(self._points))

    def point(self, slot: int) -> Point:
        """Return the point of a slot, counted from 0; empty if it is drawn when a trial begins."""
        return self._points[slot] if self.is_planned else Point({}, {})

    def describe(self) -> dict[str, str]:
        """Return what must stay the same for a slot to have the same point: a refinement's keys."""
        if self.following is None:
            return {}
        return {f"sampler.{key}": str(value) for key, value in self._sampler.items()}

    def sampler(self, first_trial: int = 0) -> BaseSampler:
        """Return a new sampler for a worker.

        Args:
            first_trial: number of the first trial that the worker draws. If it is above 0, in
                another worker or after a resume, a seeded sampler gets a seed made from its own
                and this number, so that it does not repeat the points of earlier trials.

        Raises:
            SweepError: the sampler's arguments cannot be used.
        """
        return _make_sampler(self._sampler, first_trial)


def make_pruner(pruner: Mapping[str, Any] | None) -> BasePruner:
    """Return the study's pruner; Optuna's NopPruner for None.

    Raises:
        SweepError: there is no such pruner, or its arguments cannot be used.
    """
    if pruner is None:
        return NopPruner()
    built: BasePruner = _built("pruner", pruner, BasePruner)
    return built


def _make_sampler(sampler: Mapping[str, Any], first_trial: int = 0) -> BaseSampler:
    arguments = dict(sampler)
    seed = arguments.get("seed")
    if seed is not None and first_trial > 0:
        arguments["seed"] = int(np.random.SeedSequence([seed, first_trial]).generate_state(1)[0])
    built: BaseSampler = _built("sampler", arguments, BaseSampler)
    return built


def _simulated(sampler: Mapping[str, Any], space: Space, n_trials: int | None) -> list[Point]:
    """Return the points of a study in memory whose trials end immediately."""

    def objective(trial: Trial) -> float:
        space.suggest(trial)
        return 0.0

    study = optuna.create_study(sampler=_make_sampler(sampler))
    study.optimize(objective, n_trials=n_trials)
    return [Point(t.params, t.distributions) for t in study.get_trials(deepcopy=False)]


def _class_of(key: str, config: Mapping[str, Any], kind: type | tuple[type, ...]) -> type:
    target = config.get("_target_")
    cause: Exception | None = None
    try:
        found: type = get_class(str(target))
        if issubclass(found, kind):
            return found
    except Exception as error:
        cause = error
    raise SweepError(
        f"expected `{key}` to be one of Optuna's {key}s, got {target}; choose an option of "
        f"hydra/sweeper/{key}"
    ) from cause


def _built(key: str, config: Mapping[str, Any], kind: type) -> Any:
    _class_of(key, config, kind)  # check before anything is called
    try:
        with warnings.catch_warnings():
            # A user who names an experimental sampler has chosen it.
            warnings.simplefilter("ignore", ExperimentalWarning)
            return instantiate(dict(config))
    except (HydraException, ValueError, TypeError, ImportError) as error:
        raise SweepError(
            f"expected `{key}` to be arguments that {config.get('_target_')} takes, got: "
            f"{error.__cause__ or error}"
        ) from error
