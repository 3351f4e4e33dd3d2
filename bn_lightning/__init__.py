"""Batch Normalization for people who train with PyTorch Lightning.

Names are imported when first used: `bn_lightning.kernels` needs torch alone (and Triton where there
is a GPU), and a command's `--help` does not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_lightning.callbacks.adapt_batch_norm import adapt_batchnorm
    from bn_lightning.callbacks.fused_batch_norm import FusedBatchNorm
    from bn_lightning.conversion.adapted import Adapter
    from bn_lightning.conversion.adapters import register_batchnorm
    from bn_lightning.conversion.convert import (
        convert_batchnorm,
        fusion_counts,
        revert_batchnorm,
    )
    from bn_lightning.conversion.fold import fold_batchnorm
    from bn_lightning.experiments import load_run, run_experiment, run_sweep
    from bn_lightning.models.classifier import Classifier
    from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from bn_lightning.modules.ghost_batch_norm import (
        GhostBatchNorm1d,
        GhostBatchNorm2d,
        GhostBatchNorm3d,
    )
    from bn_lightning.modules.sync_batch_norm import (
        SyncBatchNorm,
        SyncBatchNorm1d,
        SyncBatchNorm2d,
        SyncBatchNorm3d,
    )
    from bn_lightning.plugins.layer_sync import FusedSyncBatchNorm
    from bn_lightning.stack.stacked_classifier import StackedClassifier
    from bn_lightning.stack.training import train_stack

__version__ = "0.2.0"
__all__ = [
    "Adapter",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Classifier",
    "FusedBatchNorm",
    "FusedSyncBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "StackedClassifier",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "adapt_batchnorm",
    "convert_batchnorm",
    "fold_batchnorm",
    "fusion_counts",
    "load_run",
    "register_batchnorm",
    "revert_batchnorm",
    "run_experiment",
    "run_sweep",
    "train_stack",
]

_HOME = {
    "Adapter": "bn_lightning.conversion.adapted",
    "BatchNorm1d": "bn_lightning.modules.batch_norm",
    "BatchNorm2d": "bn_lightning.modules.batch_norm",
    "BatchNorm3d": "bn_lightning.modules.batch_norm",
    "Classifier": "bn_lightning.models.classifier",
    "FusedBatchNorm": "bn_lightning.callbacks.fused_batch_norm",
    "FusedSyncBatchNorm": "bn_lightning.plugins.layer_sync",
    "GhostBatchNorm1d": "bn_lightning.modules.ghost_batch_norm",
    "GhostBatchNorm2d": "bn_lightning.modules.ghost_batch_norm",
    "GhostBatchNorm3d": "bn_lightning.modules.ghost_batch_norm",
    "StackedClassifier": "bn_lightning.stack.stacked_classifier",
    "SyncBatchNorm": "bn_lightning.modules.sync_batch_norm",
    "SyncBatchNorm1d": "bn_lightning.modules.sync_batch_norm",
    "SyncBatchNorm2d": "bn_lightning.modules.sync_batch_norm",
    "SyncBatchNorm3d": "bn_lightning.modules.sync_batch_norm",
    "adapt_batchnorm": "bn_lightning.callbacks.adapt_batch_norm",
    "convert_batchnorm": "bn_lightning.conversion.convert",
    "fold_batchnorm": "bn_lightning.conversion.fold",
    "fusion_counts": "bn_lightning.conversion.convert",
    "load_run": "bn_lightning.experiments",
    "register_batchnorm": "bn_lightning.conversion.adapters",
    "revert_batchnorm": "bn_lightning.conversion.convert",
    "run_experiment": "bn_lightning.experiments",
    "run_sweep": "bn_lightning.experiments",
    "train_stack": "bn_lightning.stack.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
