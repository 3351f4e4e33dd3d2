"""Lightning callbacks, one a file; each works in any Trainer, without Hydra."""

from bn_lightning.callbacks.activation_percentiles import ActivationPercentiles
from bn_lightning.callbacks.adapt_batch_norm import AdaptBatchNorm
from bn_lightning.callbacks.batch_norm_monitor import BatchNormMonitor
from bn_lightning.callbacks.divergence_guard import DivergenceGuard
from bn_lightning.callbacks.freeze_batch_norm import FreezeBatchNorm
from bn_lightning.callbacks.fused_batch_norm import FusedBatchNorm
from bn_lightning.callbacks.optuna_pruning import OptunaPruning
from bn_lightning.callbacks.precise_batch_norm import PreciseBatchNorm
from bn_lightning.callbacks.run_checkpoints import RunCheckpoints
from bn_lightning.callbacks.same_data import ChangedDataError, SameData
from bn_lightning.callbacks.step_progress import StepProgress
from bn_lightning.callbacks.steps_to_accuracy import StepsToAccuracy

__all__ = [
    "ActivationPercentiles",
    "AdaptBatchNorm",
    "BatchNormMonitor",
    "ChangedDataError",
    "DivergenceGuard",
    "FreezeBatchNorm",
    "FusedBatchNorm",
    "OptunaPruning",
    "PreciseBatchNorm",
    "RunCheckpoints",
    "SameData",
    "StepProgress",
    "StepsToAccuracy",
]
