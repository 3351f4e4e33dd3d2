"""Prunes an unpromising trial of a sweep."""

from typing import TYPE_CHECKING

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from bn_lightning.sweeps.engine.environment import in_trial

if TYPE_CHECKING:
    from optuna.trial import Trial


class OptunaPruning(Callback):
    """Reports a metric of each validation to the sweep, whose pruner may end the trial there.

    Works in trials of `hydra/sweeper=bn_optuna`, with several ranks too: the first rank reports,
    and all ranks stop together. Outside a trial and in Lightning's sanity check it does nothing.
    The reported steps are optimizer steps.

    Args:
        monitor: name of a metric that every validation logs, the one that the sweep optimizes.

    Raises:
        optuna.TrialPruned: After a validation, on all ranks; the sweeper records the trial as
            pruned.
        ValueError: If a validation does not log `monitor`.
    """

    def __init__(self, monitor: str) -> None:
        super().__init__()
        self.monitor = monitor
        self._trial: Trial | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and in_trial() and trainer.is_global_zero:
            from bn_lightning.sweeps.engine.trial import current_trial

            self._trial = current_trial()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not in_trial() or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                "expected `monitor` to be a metric that validation logs, got "
                f"{self.monitor!r}; there are "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}"
            )
        pruned = False
        if self._trial is not None:
            value = trainer.callback_metrics[self.monitor].item()
            self._trial.report(value, trainer.global_step)
            pruned = self._trial.should_prune()
        if trainer.strategy.broadcast(pruned):
            from optuna import TrialPruned

            raise TrialPruned(f"{self.monitor} at step {trainer.global_step}")
