"""The best trials of a study, of one direction or of several."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from optuna.study import StudyDirection


class HasValues(Protocol):
    """A complete trial: Optuna's, or one of a table."""

    @property
    def values(self) -> Sequence[float]:
        """One for each direction."""
        ...


T = TypeVar("T", bound=HasValues)


def best_trials(trials: Sequence[T], directions: Sequence[StudyDirection]) -> list[T]:
    """The best trial; of several directions, the trials that no other beats in all of them.

    Args:
        trials: complete ones; of equal ones, in one direction, the first is the best.
        directions: of the study, one for each value.
    """
    signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
    points = [
        (trial, tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)))
        for trial in trials
    ]
    if len(signs) == 1:
        best = min(points, key=lambda point: point[1], default=None)
        return [] if best is None else [best[0]]
    return [
        trial
        for trial, costs in points
        if not any(
            other != costs and all(o <= c for o, c in zip(other, costs, strict=True))
            for _, other in points
        )
    ]
