"""The state of Lightning's loops in the checkpoint of a member, from which its run goes on."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Validated(NamedTuple):
    """The validations of a run."""

    at: int  # step of the last one; 0 before the first
    in_epoch: int  # how many the current epoch has had
    batches: int  # of each, in all validation sets


def loop_state(
    steps: int,
    steps_per_epoch: int,
    batches: Mapping[str, Any],
    validated: Validated,
    *,
    is_scheduled: bool,
) -> dict[str, Any]:
    """Return what a run's checkpoint holds under "loops" after so many steps of one batch each.

    Lightning keeps its own value of what is left out: the progress of manual optimization, of
    tests and of predictions.

    Args:
        steps: optimizer steps so far, at least 1.
        steps_per_epoch: batches in an epoch.
        batches: state of the training batches.
        validated: what the validations so far have counted.
        is_scheduled: whether a scheduler is stepped after each step.
    """
    epoch = (steps - 1) // steps_per_epoch  # the current one
    before = epoch * steps_per_epoch

    def counts(least: int, *names: str) -> dict[str, int]:
        return dict.fromkeys(names, steps - least)

    def tracked(*names: str) -> dict[str, dict[str, int]]:
        return {"total": counts(0, *names), "current": counts(before, *names)}

    names = ("ready", "started", "processed", "completed")
    batch = tracked(*names)
    if validated.at != steps:  # Lightning counts a batch as completed after the hook that saves
        for part in batch.values():
            part["completed"] -= 1
    begun = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    step, zero_grad = tracked("ready", "completed"), tracked("ready", "started", "completed")
    fit_loop: dict[str, Any] = {
        "state_dict": {"combined_loader": [dict(batches)]},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps - 1},
        "epoch_loop.batch_progress": {
            **batch,
            "is_last_batch": steps - before == steps_per_epoch,
        },
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": step, "zero_grad": zero_grad}
        },
        "epoch_progress": {"total": begun, "current": dict(begun)},
    }
    last = validated.batches if validated.at else 0
    fit_loop["epoch_loop.val_loop.batch_progress"] = {
        "total": dict.fromkeys(names, validated.in_epoch * validated.batches),
        "current": dict.fromkeys(names, last),
        "is_last_batch": validated.at > 0,
    }
    if is_scheduled:
        fit_loop["epoch_loop.scheduler_progress"] = tracked("ready", "completed")
    return {"fit_loop": fit_loop}
