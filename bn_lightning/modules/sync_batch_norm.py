"""BatchNorm whose batch lies on several ranks of a process group.

    forward    one gather of each rank's (mean, M2, n); combined by every rank to the same bits
    backward   one sum over the ranks of (sum g, sum g * x_hat)

The arithmetic is in kernels/sync_ops.py. Every rank of the group takes part in both, whatever the
size of its batch: an empty one counts for nothing, and its rank waits like the others. Evaluation
and frozen statistics send nothing.

Who joins the backward: every rank on which `backward` reaches y, whether or not its `x` needs a
gradient. y needs one where `x`, `residual`, `weight` or `bias` does, so a rank whose loss does not
depend on y, or where none of the four needs a gradient, lets the others wait. Compiled code leaves
the sum out where x needs no gradient, so there it needs one on all ranks or on none.

The gradients of weight and bias are this rank's own sums, as with `torch.nn.SyncBatchNorm`:
DistributedDataParallel averages them like those of every other parameter.
"""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist

# Private, for torch 2.13 has no public name for collectives that a compiler can take and that hand
# back a new tensor; PyTorch's own DTensor is written with them.
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.kernels import batch_norm, reference
from bn_lightning.kernels import sync_ops as stages
from bn_lightning.kernels.activations import recomputes_z, saves_mask, saves_output
from bn_lightning.kernels.arguments import Backward
from bn_lightning.kernels.checks import check_average, check_choices, check_like_aten
from bn_lightning.kernels.dispatch import (
    as_layout,
    is_channels_last,
    is_recomputation,
    uses_triton,
)
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BackendMixin

# Its name in torch 2.13, and before.
_all_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor

__all__ = [
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "sync_batch_norm",
]


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    backend: str = "auto",
    group_name: str,
) -> Tensor:
    """Normalises each channel by the batches of all ranks of a process group, in training.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with the mean and the biased variance of all values of all ranks, and
    `running = (1 - momentum) * running + momentum * batch` with the unbiased variance by their
    count. The statistics travel in fp32, for an fp64 `x` in fp64: the ranks may differ in the
    16-bit dtypes and fp32, but all or none have fp64.

    Every rank of the group calls it, in the same order, and with the same number of channels, which
    only the modules check. A forward inside a backward pass is the recomputation of a checkpoint:
    it takes part, and leaves the statistics alone.

    Args:
        x: (N, C) or (N, C, ...), any float dtype; N differs from rank to rank, and may be 0.
        weight: (C,) on the device of `x`; None stands for ones.
        bias: (C,) on the device of `x`; None stands for zeros.
        running_mean: (C,) on the device of `x`, updated in place.
        running_var: (C,), unbiased, on the device of `x`, updated in place.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average
            over all batches, which `num_batches_tracked` counts.
        eps: added to the variance, > 0.
        activation: its name, as in `bn_lightning.kernels.batch_norm`.
        negative_slope: of "leaky_relu" below zero.
        residual: with the shape, dtype and device of `x`, added before the activation.
        num_batches_tracked: int64 scalar on the device of `x`, to which one is added.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`; the ranks
            may differ.
        group_name: of a process group this rank belongs to, `ProcessGroup.group_name`.

    Returns:
        y, with the shape, dtype and device of `x`.

    Raises:
        ValueError: one value per channel on all ranks together, on each of them and before any
            statistic is written; otherwise as `bn_lightning.kernels.batch_norm`.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2; Chan, Golub & LeVeque 1983,
    equations 2.1.
    """
    check_choices(x, residual, activation, backend)
    check_like_aten(x, weight, bias, running_mean, running_var, True, eps, is_whole_batch=False)
    if momentum is None:
        check_average(running_mean, num_batches_tracked)
    triton = uses_triton(x, backend)
    x = stages.as_dense(x)
    with torch.no_grad():
        part = stages.local_statistics(x, triton)
        parts = _wait(_all_gather(part, 0, group_name)).view(-1, len(part))
        if x.numel() <= x.shape[1]:
            # With two values of its own a rank need not wait for the device to learn the count.
            parts = torch.ops.bn_lightning.check_total(parts)
        batch = stages.combine_statistics(parts)
        mean = batch.mean.to(part.dtype)
        var = batch.m2 / batch.total.clamp(min=1.0)
        rstd = torch.rsqrt(var + eps).to(part.dtype)
        if not is_recomputation():
            _update_running(batch, running_mean, running_var, num_batches_tracked, momentum)
    return torch.ops.bn_lightning.sync_normalize(
        x,
        residual,
        weight,
        bias,
        mean,
        rstd,
        batch.total,
        eps,
        activation,
        negative_slope,
        triton,
        group_name,
    )


def _update_running(
    batch: stages.BatchStatistics,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Moves the running statistics, by tensors alone: a batch without values moves nothing."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    share = batch.total.clamp(max=1.0)
    if momentum is not None:
        share = share * momentum
    elif num_batches_tracked is not None:
        share = share / num_batches_tracked
    unbiased_var = batch.m2 / (batch.total - 1.0).clamp(min=1.0)
    for running, new in ((running_mean, batch.mean), (running_var, unbiased_var)):
        running.copy_((1.0 - share) * running.double() + share * new)


class _SyncBatchNorm(torch.autograd.Function):
    """The normalisation, with a gradient that knows where mean and rstd come from."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        total: Tensor,
        eps: float,
        activation: str,
        negative_slope: float,
        triton: bool,
        group_name: str,
        writes_mask: bool,
    ) -> tuple[Tensor, Tensor]:
        return stages.normalize(
            x, residual, mean, rstd, weight, bias, activation, negative_slope, writes_mask, triton
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        y, mask = output
        x, residual, weight, bias, mean, rstd, total, *options = inputs
        eps, activation, negative_slope, triton, group_name, writes_mask = options
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        has_residual = residual is not None
        from_z = recomputes_z(activation, has_residual)
        ctx.save_for_backward(
            total,
            x,
            residual if from_z else None,
            y if saves_output(activation, has_residual) else None,
            mask if writes_mask else None,
            mean,
            rstd,
            weight,
            bias if from_z else None,
        )
        ctx.activation = activation
        ctx.options = (is_channels_last(x), activation, negative_slope, eps, triton, group_name)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        total, x, *saved = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else as_layout(dy, ctx.options[0])
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        # Without an activation the residual's gradient is dy itself.
        writes_dresidual = needs_dresidual and ctx.activation != "identity"
        arguments = (total, dy, x, *saved, *ctx.options, needs_dx, writes_dresidual)
        if torch.is_grad_enabled():
            dx, written, sums = _SyncBatchNormBackward.apply(*arguments)
        else:
            dx, written, sums = _backward(*arguments)
        dresidual = written if writes_dresidual else dy
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            dx if needs_dx else None,
            dresidual if needs_dresidual else None,
            sums[1].to(weight_dtype) if needs_dweight else None,
            sums[0].to(bias_dtype) if needs_dbias else None,
            *(None,) * 9,
        )


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dx, dresidual, and this rank's dbias and dweight as (2, C)."""
    total, call = arguments[0], Backward(*arguments[1:13])
    _, triton, group_name, needs_dx, needs_dresidual = arguments[13:]
    sums = stages.local_sums(call, triton)
    means = _all_reduce(sums, group_name) / total.to(sums.dtype).clamp(min=1.0)
    dx, dresidual = stages.input_gradients(call, means, needs_dx, needs_dresidual, triton)
    return dx, dresidual, sums


class _SyncBatchNormBackward(torch.autograd.Function):
    """`_backward` with its gradient, which is that of the same in differentiable operations."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.options = inputs[10:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        *of_activation, eps, _, group_name, needs_dx, needs_dresidual = ctx.options
        with torch.enable_grad():
            # Views, so that the way from the saved tensors to here is open to a third derivative.
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            call = Backward(*tensors[1:], *of_activation)
            results = _differentiable_backward(call, tensors[0], eps, group_name)
            used = (needs_dx, needs_dresidual, True)
            pairs = [(r, u) for r, u, use in zip(results, upstream, used, strict=True) if use]
            wanted = [t for t in tensors if t is not None and t.requires_grad]
            gradients = torch.autograd.grad(
                [r for r, _ in pairs],
                wanted,
                [u for _, u in pairs],
                create_graph=True,
                allow_unused=True,
            )
        found = iter(gradients)
        by_tensor = [next(found) if t is not None and t.requires_grad else None for t in tensors]
        return (*by_tensor, *(None for _ in ctx.options))


def _differentiable_backward(
    call: Backward, total: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what `_backward` does, with mean and rstd as functions of every rank's x."""
    x = call.x.to(call.mean.dtype)
    total = total.to(x.dtype).clamp(min=1.0)
    mean = _AllReduce.apply(reference.channel_sum(x), group_name) / total
    centred = x - reference.as_channels(mean, x)
    var = _AllReduce.apply(reference.channel_sum(centred * centred), group_name) / total
    call = call._replace(mean=mean, rstd=torch.rsqrt(var + eps))
    sums = stages.local_sums(call, triton=False)
    means = _AllReduce.apply(sums, group_name) / total
    return *stages.input_gradients(call, means, True, True, triton=False), sums


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the sum over the ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return _all_reduce(value, group_name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(gradient.contiguous(), ctx.group_name), None


def _all_reduce(value: Tensor, group_name: str) -> Tensor:
    return _wait(functional.all_reduce(value, "sum", group_name))  # type: ignore[arg-type]


def _wait(value: Tensor) -> Tensor:
    """Returns a plain tensor for the one that would wait at its first use."""
    return value.wait() if isinstance(value, functional.AsyncCollectiveTensor) else value


def _with_gradient(*args: Any) -> Tensor:
    """The Autograd kernel of `sync_normalize`."""
    x, residual, weight, bias = args[:4]
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias)
    ):
        return _without_gradient(*args)
    return _SyncBatchNorm.apply(*args, saves_mask(args[8], residual is not None))[0]


def _without_gradient(*args: Any) -> Tensor:
    x, residual, weight, bias, mean, rstd, _, _, activation, negative_slope, triton, _ = args
    options = (activation, negative_slope, False, triton)
    return stages.normalize(x, residual, mean, rstd, weight, bias, *options)[0]


def _check_total(parts: Tensor) -> Tensor:
    """Raises where all ranks together have one value per channel; returns a copy of `parts`."""
    if stages.combine_statistics(parts).total == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all ranks together; "
            "use batches of at least 2 samples in all, or model.eval()"
        )
    return parts.clone()


# Ops, as in kernels/ops.py: a compiler sees one, and AOTAutograd goes through the gradient, where
# Dynamo could not; and it must not look at the numbers that are checked.
_LIBRARY = torch.library.Library("bn_lightning", "FRAGMENT")
_LIBRARY.define(
    "sync_normalize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, Tensor total, float eps, str activation, float negative_slope, bool triton, "
    "str group_name) -> Tensor"
)
_LIBRARY.define("check_total(Tensor parts) -> Tensor")
_LIBRARY.impl("sync_normalize", _with_gradient, "Autograd")
# On every device: both are written in torch.
_LIBRARY.impl("sync_normalize", _without_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("check_total", _check_total, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bn_lightning::sync_normalize", lambda x, *_: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_fake("bn_lightning::check_total", torch.empty_like, lib=_LIBRARY)


class _SyncMixin(_BackendMixin):
    """What the synchronised modules share: the process group, and when it is used."""

    # On the class, as in `_BackendMixin`, and for modules that become synchronised later.
    process_group: dist.ProcessGroup | None = None
    _group_compared: str | None = None

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _batch_norm(self, input: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        synchronises = options["training"] and self.training and not self.stats_frozen
        if synchronises and (group_name := _group_name(self.process_group)):
            if not torch.compiler.is_compiling() and self._group_compared != group_name:
                _compare_ranks(input, self.process_group)
            # Also where a compiler left it out: a rank that goes on without must not begin it.
            self._group_compared = group_name
            del options["training"]
            return sync_batch_norm(input, *state, **options, group_name=group_name)
        return batch_norm(input, *state, **options)


# A compiler runs it while it traces, and keeps the answer for this process group.
@torch.compiler.assume_constant_result
def _group_name(process_group: dist.ProcessGroup | None) -> str:
    """Returns the name of the group to synchronise over, or "" where there is none to.

    Raises:
        ValueError: the group is without this rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _warn_alone()
        return ""
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"expected a `process_group` that this rank, {dist.get_rank()}, belongs to, got one "
            f"without it; on each rank, give the layer a group the rank is in"
        )
    group = process_group or dist.group.WORLD
    return group.group_name if group and group.size() > 1 else ""


def _compare_ranks(input: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Raises, on every rank, where the ranks are about to send tensors of different sizes."""
    mine = (input.shape[1], reference.compute_dtype(input.dtype).itemsize)
    sent = torch.tensor(mine, device=input.device)
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(found, sent, process_group)
    theirs = [tuple(other.tolist()) for other in found]
    if set(theirs) != {mine}:
        listed = ", ".join(
            f"{channels} channels in fp{8 * itemsize} on rank {rank}"
            for rank, (channels, itemsize) in enumerate(theirs)
        )
        raise ValueError(
            f"expected the ranks of a synchronised BatchNorm to have the same number of channels, "
            f"and all or none of them fp64, got {listed}; build the same model on every rank"
        )


@functools.cache
def _warn_alone() -> None:
    warnings.warn(
        "expected a process group for a synchronised BatchNorm, found none; it works as a plain "
        "BatchNorm. Train with several ranks, say Trainer(strategy='ddp', devices=2), or call "
        "torch.distributed.init_process_group first",
        stacklevel=2,
    )


class SyncBatchNorm1d(_SyncMixin, BatchNorm1d):
    """Synchronised Batch Normalization of (N, C) or (N, C, L); see `SyncBatchNorm`."""


class SyncBatchNorm2d(_SyncMixin, BatchNorm2d):
    """Synchronised Batch Normalization of (N, C, H, W); see `SyncBatchNorm`."""


class SyncBatchNorm3d(_SyncMixin, BatchNorm3d):
    """Synchronised Batch Normalization of (N, C, D, H, W); see `SyncBatchNorm`."""


class SyncBatchNorm(_SyncMixin, _BatchNorm):
    """Batch Normalization of (N, C) or (N, C, ...) by the batches of all ranks.

    What `torch.nn.SyncBatchNorm` is, on CPU (gloo) as well as GPU (NCCL), with empty batches, an
    activation, a residual, torch.compile and a second derivative. It is no subclass of it, for
    DistributedDataParallel refuses those on a CPU.

    In training it exchanges one tensor forward and one backward (see `sync_batch_norm`), and one
    more at its first forward, in which the ranks compare their channels. In evaluation, frozen,
    with a group of one rank, or without an initialised process group, it is a plain BatchNorm; in
    the last case it warns, once in a process.

    A compiled forward leaves the comparison out, and keeps to the process group it was compiled
    for: initialise that before the first one.

    Args:
        process_group: over which to synchronise, by keyword; None for all ranks. Pickled or copied
            a module must be without one.

    The other arguments are those of `bn_lightning.BatchNorm2d`.

    Raises:
        ValueError: an argument outside its range; in a forward, a process group without this rank,
            ranks that differ in channels, or one value per channel on all ranks together.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; Chan, Golub & LeVeque 1983, equations 2.1.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
