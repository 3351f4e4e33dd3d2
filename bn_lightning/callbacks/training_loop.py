"""State of a Trainer's loop: in `on_train_batch_end`, and after training."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def is_last_batch_of_step(trainer: Trainer) -> bool:
    """Return whether the batch that has just ended completed an optimizer step."""
    batches = trainer.fit_loop.batch_idx + 1
    return batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def validation_follows(trainer: Trainer) -> bool:
    """Return whether the Trainer validates after the training batch that has just ended.

    False if `val_check_interval` is a time, because the answer is not known in advance.
    """
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return False
    if trainer.should_stop and _may_stop_early(trainer):
        return True
    if trainer.check_val_every_n_epoch is None:
        return (trainer.fit_loop.total_batch_idx + 1) % trainer.val_check_batch == 0
    if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    if trainer.val_check_batch == float("inf"):
        return trainer.is_last_batch
    return (trainer.fit_loop.batch_idx + 1) % trainer.val_check_batch == 0


def planned_steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps of the whole budget after training has begun, None if unlimited.

    The budget is the first of `max_steps` and `max_epochs` to be reached.
    """
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < float("inf") else None


def early_stop_reason(trainer: Trainer) -> str | None:
    """Return why a callback ended training before its budget; None if none did."""
    planned = planned_steps(trainer) if trainer.should_stop else None
    if not trainer.should_stop or (planned is not None and trainer.global_step >= planned):
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, Timer):
            left = callback.time_remaining()
            if left is not None and left <= 0:
                return "trainer.max_time is over"
        if isinstance(callback, EarlyStopping):
            monitor = callback.monitor
            match callback.stopping_reason:
                case EarlyStoppingReason.PATIENCE_EXHAUSTED:
                    return f"{monitor} did not improve"
                case EarlyStoppingReason.STOPPING_THRESHOLD:
                    return f"{monitor} reached {callback.stopping_threshold:g}"
                case EarlyStoppingReason.DIVERGENCE_THRESHOLD:
                    return f"{monitor} was worse than {callback.divergence_threshold:g}"
                case EarlyStoppingReason.NON_FINITE_METRIC:
                    return f"{monitor} was not finite"
    return "a callback set trainer.should_stop"


def _may_stop_early(trainer: Trainer) -> bool:
    """Return whether `min_epochs` and `min_steps` allow `should_stop` to take effect."""
    enough_epochs = not trainer.min_epochs or trainer.current_epoch >= trainer.min_epochs
    return enough_epochs and (not trainer.min_steps or trainer.global_step >= trainer.min_steps)
