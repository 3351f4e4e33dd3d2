"""A Lightning plugin that synchronizes a model's BatchNorms across the ranks during a fit."""

import sys
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.utils import parametrize
from typing_extensions import override

from bn_lightning.conversion.adapted import adapt
from bn_lightning.conversion.adapters import find_adapter, is_batchnorm
from bn_lightning.conversion.class_swap import is_swapped, restore_class, swap_class
from bn_lightning.kernels.checks import check_backend
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
    _SyncMixin,
)

_KEY = "sync"

# Exact classes only, because a swap would drop what a subclass overrides.
_SYNC_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm1d: SyncBatchNorm1d,
    BatchNorm2d: SyncBatchNorm2d,
    BatchNorm3d: SyncBatchNorm3d,
}
_LEFT_ALONE = {*_SYNC_CLASSES.values(), GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d}


class FusedSyncBatchNorm(TorchSyncBatchNorm):
    """Synchronize every BatchNorm of a model across the ranks.

        Trainer(strategy="ddp", plugins=[FusedSyncBatchNorm()])

    The plugin works with or without `sync_batchnorm=True`, on CPU (gloo) and GPU (NCCL). Lightning
    applies it when a fit begins and reverts it when the fit ends. It changes only the class of a
    module, to one of `bn_lightning.modules.sync_batch_norm`. Identity, parameters, buffers, hooks,
    flags, a fused activation, and the activation of a BatchNorm of another class that
    `bn_lightning.conversion.adapters` knows, such as timm's `BatchNormAct2d`, stay.

    The plugin skips, with a warning that names them, other subclasses of BatchNorm, modules with a
    parametrization, and uninitialized lazy modules. It skips without a warning BatchNorms whose
    class is frozen, ghost BatchNorms, which normalize by parts of a rank's batch on purpose, and
    modules that are already synchronized by this project.

    Args:
        process_group: process group to synchronize over; None for all ranks. A
            `torch.nn.SyncBatchNorm` with its own group keeps it.
        backend: "auto", "native" or "triton" for all modules; None keeps the backend of our modules
            and uses "auto" for torch's.

    Raises:
        ValueError: an unknown `backend`. In `apply`: an AdapterError.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, backend: str | None = None
    ) -> None:
        check_backend(backend, may_be_none=True)
        self.process_group = process_group
        self.backend = backend

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Swap the classes of the model's BatchNorms in place.

        Args:
            model: the model, on any device; call this on every rank of the group.

        Returns:
            `model`.
        """
        skipped, count = [], 0
        adapters = {module: find_adapter(module) for module in model.modules()}
        for name, module in model.named_modules():
            adapter = adapters[module]
            if is_swapped(module, _KEY) or (adapter is None and not is_batchnorm(module)):
                continue
            if type(module) in _LEFT_ALONE or (adapter and adapter.frozen):
                continue
            attributes: dict[str, Any] = {}
            if type(module) in _SYNC_CLASSES:
                synchronized = _SYNC_CLASSES[type(module)]
            elif adapter is not None and not parametrize.is_parametrized(module):
                synchronized, attributes = adapt(module, adapter, _SyncMixin)
            else:
                skipped.append(f"{name or 'the model itself'} ({type(module).__name__})")
                continue
            attributes["_group_compared"] = None
            if self.backend is not None:
                attributes["backend"] = self.backend
            if getattr(module, "process_group", None) is None:
                attributes["process_group"] = self.process_group
            swap_class(module, synchronized, _KEY, **attributes)
            count += 1
        rank_zero_info(f"BatchNorm: {count} synchronized across the ranks")
        if skipped:
            rank_zero_warn(
                f"expected every BatchNorm to be of torch.nn or bn_lightning, or to be registered, "
                f"got {', '.join(skipped)}; each rank normalizes these by its own batch; "
                f"bn_lightning.register_batchnorm adds a class"
            )
        return model

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the classes and attributes that `apply` changed, in place.

        Args:
            model: any model; modules that `apply` did not change stay unchanged.

        Returns:
            `model`.
        """
        for module in model.modules():
            restore_class(module, _KEY)
        return model

    def __repr__(self) -> str:
        # pytorch_lightning's Trainer refuses the plugin with an error that contains this repr.
        advice = ""
        if "pytorch_lightning" in sys.modules:
            advice = (
                " (a plugin of `lightning`, which `pytorch_lightning` does not accept: write "
                "`from lightning.pytorch import Trainer, LightningModule` instead of "
                "`from pytorch_lightning import ...`)"
            )
        return (
            f"{type(self).__name__}(process_group={self.process_group}, backend={self.backend!r})"
            f"{advice}"
        )
