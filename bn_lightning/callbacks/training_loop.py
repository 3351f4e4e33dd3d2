"""State of a Trainer's loop in `on_train_batch_end`."""

from lightning.pytorch import Trainer


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


def _may_stop_early(trainer: Trainer) -> bool:
    """Return whether `min_epochs` and `min_steps` allow `should_stop` to take effect."""
    enough_epochs = not trainer.min_epochs or trainer.current_epoch >= trainer.min_epochs
    return enough_epochs and (not trainer.min_steps or trainer.global_step >= trainer.min_steps)
