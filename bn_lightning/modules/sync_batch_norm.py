"""Synchronized BatchNorm modules: the process group, and when a forward uses it.

The arithmetic, and which ranks take part in it, is in kernels/sync_autograd.py. Evaluation and
frozen statistics need no communication.
"""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.kernels import batch_norm
from bn_lightning.kernels.reference import compute_dtype
from bn_lightning.kernels.sync_autograd import sync_batch_norm
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BackendMixin


class _SyncMixin(_BackendMixin):
    """The process group of the synchronized modules, and their arithmetic."""

    # Class attributes, for the reason given in `_BackendMixin`.
    process_group: dist.ProcessGroup | None = None
    _group_compared: str | None = None

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _batch_norm(self, input: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        synchronizes = options["training"] and self.training and not self.stats_frozen
        if synchronizes and (group_name := _group_name(self.process_group)):
            if not torch.compiler.is_compiling() and self._group_compared != group_name:
                _compare_ranks(input, self.process_group)
            # Also set if a compiler skipped the comparison: all ranks must start it together, so a
            # rank that later leaves the compiled code must not start it alone.
            self._group_compared = group_name
            del options["training"]
            return sync_batch_norm(input, *state, **options, group_name=group_name)
        return batch_norm(input, *state, **options)


# A compiler calls it while tracing, and keeps the result for this process group.
@torch.compiler.assume_constant_result
def _group_name(process_group: dist.ProcessGroup | None) -> str:
    """Return the name of the group to synchronize over, or "" if there is only one rank.

    Raises:
        ValueError: the group does not contain this rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _warn_uninitialized()
        return ""
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"expected `process_group` to contain this rank, {dist.get_rank()}, got a group "
            f"without it; give the layer, on each rank, a group that contains the rank"
        )
    group = process_group or dist.group.WORLD
    return group.group_name if group and group.size() > 1 else ""


def _compare_ranks(input: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Raise a ValueError on every rank if the ranks would send tensors of different sizes."""
    mine = (input.shape[1], compute_dtype(input.dtype).itemsize)
    sent = torch.tensor(mine, device=input.device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(received, sent, process_group)
    of_ranks = [tuple(other.tolist()) for other in received]
    if set(of_ranks) != {mine}:
        listed = ", ".join(
            f"{channels} channels in fp{8 * itemsize} on rank {rank}"
            for rank, (channels, itemsize) in enumerate(of_ranks)
        )
        raise ValueError(
            f"expected `input` to have the same number of channels on every rank, and to be fp64 "
            f"on all ranks or on none, got {listed}; build the same model on every rank"
        )


@functools.cache
def _warn_uninitialized() -> None:
    warnings.warn(
        "expected an initialized process group for a synchronized BatchNorm, got none, so it works "
        "as a plain BatchNorm; train with several ranks, for example "
        "Trainer(strategy='ddp', devices=2), or call torch.distributed.init_process_group first",
        stacklevel=2,
    )


class SyncBatchNorm1d(_SyncMixin, BatchNorm1d):
    """Synchronized Batch Normalization of (N, C) or (N, C, L); see `SyncBatchNorm`."""


class SyncBatchNorm2d(_SyncMixin, BatchNorm2d):
    """Synchronized Batch Normalization of (N, C, H, W); see `SyncBatchNorm`."""


class SyncBatchNorm3d(_SyncMixin, BatchNorm3d):
    """Synchronized Batch Normalization of (N, C, D, H, W); see `SyncBatchNorm`."""


class SyncBatchNorm(_SyncMixin, _BatchNorm):
    """Batch Normalization of (N, C) or (N, C, ...) by the batches of all ranks.

    It does what `torch.nn.SyncBatchNorm` does, on CPU (gloo) as well as GPU (NCCL), and supports
    empty batches, an activation, a residual, torch.compile and a second derivative. It is not a
    subclass of `torch.nn.SyncBatchNorm`, because DistributedDataParallel rejects those on a CPU.

    In training each forward and each backward needs one collective (see kernels/sync_autograd.py).
    The first forward needs one more, which compares the numbers of channels of the ranks. In
    evaluation, with frozen statistics, with a group of one rank, and without an initialized process
    group, the module is a plain BatchNorm. In the last case it warns once per process.

    A compiled forward skips the comparison. It uses the process group that existed when it was
    compiled, so initialize that group before the first call.

    Args:
        process_group: process group to synchronize over, keyword-only; None for all ranks. Only a
            module without one can be pickled or copied.

    The other arguments are those of `bn_lightning.BatchNorm2d`.

    Raises:
        ValueError: an argument is outside its range. In a forward: a process group without this
            rank; ranks that differ in channels; one value per channel on all ranks together.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; Chan, Golub & LeVeque 1983, equations 2.1.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
