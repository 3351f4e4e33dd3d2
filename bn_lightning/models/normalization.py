"""The choices of the config group `norm`: functions that build a normalization layer.

A network calls `norm(num_features, spatial_dims)` for each normalization layer. `spatial_dims` is 0
after a linear layer, and 1, 2 or 3 after a 1D, 2D or 3D convolution.
"""

from typing import Protocol, runtime_checkable

from torch import nn

from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.modules.ghost_batch_norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
)


@runtime_checkable
class NormFactory(Protocol):
    """Builds a normalization layer with `num_features` channels; `spatial_dims` is 0 to 3."""

    def __call__(self, num_features: int, spatial_dims: int = 0) -> nn.Module: ...


_TORCH_MODULES = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OUR_MODULES = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_GHOST_MODULES = (GhostBatchNorm1d, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)


def torch_batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None
) -> nn.Module:
    """Build PyTorch's own BatchNorm (`norm=torch`); arguments: `torch.nn.BatchNorm1d`."""
    return _TORCH_MODULES[spatial_dims](num_features, eps=eps, momentum=momentum)


def batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None, backend: str
) -> nn.Module:
    """Build this package's BatchNorm (`norm=batch`); arguments: `bn_lightning.BatchNorm1d`."""
    return _OUR_MODULES[spatial_dims](num_features, eps=eps, momentum=momentum, backend=backend)


def ghost_batch_norm(
    num_features: int,
    spatial_dims: int = 0,
    *,
    eps: float,
    momentum: float | None,
    backend: str,
    ghost_size: int,
) -> nn.Module:
    """Build BatchNorm over parts of a batch (`norm=ghost`): `bn_lightning.GhostBatchNorm2d`."""
    return _GHOST_MODULES[spatial_dims](
        num_features, eps=eps, momentum=momentum, backend=backend, ghost_size=ghost_size
    )


def sync_batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None, backend: str
) -> nn.Module:
    """Build BatchNorm over all ranks (`norm=sync`); arguments: `bn_lightning.SyncBatchNorm1d`."""
    # Imported here because some builds of torch lack torch.distributed.
    from bn_lightning.modules.sync_batch_norm import (
        SyncBatchNorm1d,
        SyncBatchNorm2d,
        SyncBatchNorm3d,
    )

    modules = (SyncBatchNorm1d, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
    return modules[spatial_dims](num_features, eps=eps, momentum=momentum, backend=backend)
