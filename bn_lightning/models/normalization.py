"""The choices of the `norm` group: callables that build a normalisation layer for a network.

A network calls `norm(num_features, spatial_dims)` wherever it normalises: `spatial_dims` is 0 after
a linear layer and 1, 2 or 3 after a convolution of that many dimensions.
"""

from typing import Protocol, runtime_checkable

from torch import nn

from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d


@runtime_checkable
class NormFactory(Protocol):
    """Builds the normalisation layer of `num_features` channels for `spatial_dims` in 0..3."""

    def __call__(self, num_features: int, spatial_dims: int = 0) -> nn.Module: ...


_TORCH = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OURS = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)


def torch_batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None
) -> nn.Module:
    """PyTorch's own BatchNorm (`norm=torch`). Arguments are those of `torch.nn.BatchNorm1d`."""
    return _TORCH[spatial_dims](num_features, eps=eps, momentum=momentum)


def batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None, backend: str
) -> nn.Module:
    """This project's BatchNorm (`norm=batch`). Arguments as for `bn_lightning.BatchNorm1d`."""
    return _OURS[spatial_dims](num_features, eps=eps, momentum=momentum, backend=backend)


def sync_batch_norm(
    num_features: int, spatial_dims: int = 0, *, eps: float, momentum: float | None, backend: str
) -> nn.Module:
    """BatchNorm over all ranks (`norm=sync`). Arguments as for `bn_lightning.SyncBatchNorm1d`."""
    # Not every build of torch has torch.distributed.
    from bn_lightning.modules.sync_batch_norm import (
        SyncBatchNorm1d,
        SyncBatchNorm2d,
        SyncBatchNorm3d,
    )

    modules = (SyncBatchNorm1d, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
    return modules[spatial_dims](num_features, eps=eps, momentum=momentum, backend=backend)
