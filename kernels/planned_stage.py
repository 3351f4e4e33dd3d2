"""Plans for the stages of a synchronized BatchNorm, inside their ops.

A stage is launched as its launchers do the first time, and its launches are recorded
(launch_plan.py). Later calls with tensors of the same kind (eager.py) repeat them.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bn_lightning.kernels.eager import (
    TensorGuards,
    has_memory,
    make_guard,
    make_room,
    misalignment_of,
)
from bn_lightning.kernels.launch_plan import (
    LaunchPlan,
    Result,
    make_plan,
    picker,
    places_of,
    recorded,
)
from bn_lightning.kernels.schedule import forced

MAX_STAGES = 512


class _Stage(NamedTuple):
    """A stage that was recorded.

    Attributes:
        is_alike: whether other tensors are like the recorded ones.
        misalignment: of those.
        launches: how to repeat the launches.
        pick: picks the results from those of the launches, followed by None.
    """

    is_alike: Callable[..., bool]
    misalignment: tuple[int, ...] | None
    launches: LaunchPlan
    pick: Callable[[Sequence[Any]], tuple[Tensor | None, ...]]


_stages: dict[Hashable, _Stage] = {}


def run_stage(
    name: Hashable,
    tensors: Sequence[Tensor | None],
    launch: Callable[[], Sequence[Tensor | None]],
) -> list[Tensor | None]:
    """Repeat the launches of a stage, or call `launch` and record them.

    Args:
        name: of the stage, with all options that its launches depend on.
        tensors: what the stage reads.
        launch: launches the stage, with no other operation, and returns what it allocated.

    Returns:
        The results of the stage.
    """
    given = [t for t in tensors if t is not None]
    kinds = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
    key = (name, forced(), *kinds)
    addresses = [t.data_ptr() for t in given]
    stage = _stages.get(key)
    if (
        stage is not None
        and not stage.launches.is_observed()
        and stage.is_alike(*given)
        and misalignment_of(addresses) == stage.misalignment
    ):
        return [*stage.pick((*stage.launches.launch(addresses), None))]
    with recorded() as recording:
        results = [*launch()]
    plain = TensorGuards is not None and all(map(has_memory, given))
    if plain and len(set(addresses)) == len(addresses):
        launches = make_plan(recording, given, [Result.like(r) for r in results if r is not None])
        if launches is not None:
            make_room(_stages, MAX_STAGES)
            pick = picker(places_of(results))
            _stages[key] = _Stage(make_guard(given), misalignment_of(addresses), launches, pick)
    return results
