"""Lightning's plugin that synchronises a model's BatchNorms over the ranks, while it fits."""

import sys
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bn_lightning.conversion.class_swap import exchange_class, is_exchanged, restore_class
from bn_lightning.kernels.checks import check_backend
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.modules.sync_batch_norm import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)

_KEY = "sync"

# Exact classes: what a subclass overrides would be lost.
_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm1d: SyncBatchNorm1d,
    BatchNorm2d: SyncBatchNorm2d,
    BatchNorm3d: SyncBatchNorm3d,
}
_OURS = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)


class FusedSyncBatchNorm(TorchSyncBatchNorm):
    """Makes every BatchNorm of a model normalise by the batches of all ranks.

        Trainer(strategy="ddp", plugins=[FusedSyncBatchNorm()])

    with or without `sync_batchnorm=True`, on CPU (gloo) and GPU (NCCL). Lightning applies it when a
    fit begins and reverts it when the fit ends. Modules keep their identity, parameters, buffers,
    hooks and flags, ours their fused activation; only their class changes, to the one of
    `bn_lightning.modules.sync_batch_norm`, and back.

    Left alone, and named in a warning: subclasses of BatchNorm that are neither torch's nor ours,
    modules with a parametrisation, which are such subclasses, and lazy ones not yet initialised.
    Left alone without one: modules that are already of a class of
    `bn_lightning.modules.sync_batch_norm`.

    Args:
        process_group: over which to synchronise; None for all ranks. A `torch.nn.SyncBatchNorm`
            with a group of its own keeps that.
        backend: "auto", "native" or "triton" for all of them; None leaves ours their own, and
            "auto" to torch's.

    Raises:
        ValueError: an unknown `backend`.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, backend: str | None = None
    ) -> None:
        check_backend(backend, may_be_none=True)
        self.process_group = process_group
        self.backend = backend

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Exchanges the classes of the model's BatchNorms, in place.

        Args:
            model: on any device, on every rank of the group.

        Returns:
            `model`.
        """
        left_alone, exchanged = [], 0
        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm) or type(module) in _OURS:
                continue
            if is_exchanged(module, _KEY):
                continue
            if type(module) not in _SYNCHRONISED:
                left_alone.append(f"{name or 'the model itself'} ({type(module).__name__})")
                continue
            attributes: dict[str, Any] = {"_group_compared": None}
            if self.backend is not None:
                attributes["backend"] = self.backend
            if getattr(module, "process_group", None) is None:
                attributes["process_group"] = self.process_group
            exchange_class(module, _SYNCHRONISED[type(module)], _KEY, **attributes)
            exchanged += 1
        rank_zero_info(f"BatchNorm: {exchanged} synchronised over the ranks")
        if left_alone:
            rank_zero_warn(
                f"expected BatchNorms of torch.nn or bn_lightning to synchronise, and left these "
                f"alone: {', '.join(left_alone)}; each rank normalises them by its own batch"
            )
        return model

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Gives the BatchNorms their classes and attributes back, in place.

        Args:
            model: as `apply` left it; others stay as they are.

        Returns:
            `model`.
        """
        for module in model.modules():
            restore_class(module, _KEY)
        return model

    def __repr__(self) -> str:
        # pytorch_lightning's Trainer refuses it with an error that shows this.
        advice = ""
        if "pytorch_lightning" in sys.modules:
            advice = (
                " (a plugin of `lightning`, which `pytorch_lightning` does not take: write "
                "`from lightning.pytorch import Trainer, LightningModule` instead of "
                "`from pytorch_lightning import ...`)"
            )
        return (
            f"{type(self).__name__}(process_group={self.process_group}, backend={self.backend!r})"
            f"{advice}"
        )
