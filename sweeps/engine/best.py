"""The best trials of a study with one direction or several."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from optuna.study import StudyDirection


class HasValues(Protocol):
    """A complete trial: one of Optuna's, or a row of a table."""

    @property
    def values(self) -> Sequence[float]:
        """One value for each direction."""
        ...


_T = TypeVar("_T", bound=HasValues)


def best_trials(trials: Sequence[_T], directions: Sequence[StudyDirection]) -> list[_T]:
    """Return the best trial, or the Pareto front if there are several directions.

    Args:
        trials: complete trials. With one direction, the first of equal trials is the best.
        directions: of the study, one for each value.
    """
    signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
    costs = [[s * v for s, v in zip(signs, trial.values, strict=True)] for trial in trials]
    if len(signs) == 1:
        return [trials[costs.index(min(costs))]] if costs else []
    return [
        trial
        for trial, cost in zip(trials, costs, strict=True)
        if not any(
            other != cost and all(o <= c for o, c in zip(other, cost, strict=True))
            for other in costs
        )
    ]
