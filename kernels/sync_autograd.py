"""BatchNorm whose batch is split across the ranks of a process group, with its gradient.

    forward    gather (mean, M2, count) of each rank; every rank combines them to the same bits
    backward   all-reduce (sum g, sum g * x_hat)

Every rank of the group takes part in both, also with an empty batch, which has weight zero.

A rank joins the backward if `backward` reaches y, whether or not its x needs a gradient. y needs a
gradient if x, residual, weight or bias does. If on some rank none of them does, or the loss does
not depend on y, the other ranks wait for that rank. Compiled code omits the all-reduce if x needs
no gradient, so under torch.compile x must need one on all ranks or on none.

The gradients of weight and bias are the sums of this rank alone, as in `torch.nn.SyncBatchNorm`.
DistributedDataParallel averages them like those of every other parameter.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167; Chan, Golub & LeVeque 1983.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Private, because torch 2.13 has no public collectives that a compiler supports and that return a
# new tensor. PyTorch's own DTensor uses them.
from torch.distributed import _functional_collectives as collectives

from bn_lightning.kernels import reference
from bn_lightning.kernels.activations import activate, recomputes_z, saves_mask, saves_output
from bn_lightning.kernels.arguments import (
    Backward,
    BackwardNeeds,
    Forward,
    RunningStatistics,
    split_residual,
)
from bn_lightning.kernels.checks import check_average, check_choices, check_like_aten
from bn_lightning.kernels.dispatch import is_recomputation, uses_triton
from bn_lightning.kernels.layout import as_layout, is_channels_last
from bn_lightning.kernels.sync_ops import (
    BatchStatistics,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_gather_stats_with_counts,
    batch_norm_stats,
)

# The name since torch 2.13, and the one before.
_all_gather: Any = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


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
    """Normalize each channel by the batches of all ranks of a process group, in training.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with the mean and the biased variance of all values on all ranks. The running statistics are
    updated as `running = (1 - momentum) * running + momentum * batch`, with the unbiased variance
    of all values. The ranks exchange statistics in fp32, or in fp64 for an fp64 `x`. The ranks may
    mix fp32 and the 16-bit dtypes, but either all or none may use fp64.

    Every rank of the group calls this function, in the same order, with the same number of
    channels. Only the modules check that number. When activation checkpointing re-runs the forward,
    the rank takes part again, but running statistics are not updated again.

    Args:
        x: (N, C) or (N, C, ...), any float dtype; N may differ between ranks and may be 0.
        weight: (C,) on the device of `x`, or None for ones.
        bias: (C,) on the device of `x`, or None for zeros.
        running_mean: (C,) on the device of `x`, updated in place.
        running_var: (C,), unbiased, on the device of `x`, updated in place.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average
            over all batches, which `num_batches_tracked` counts.
        eps: value added to the variance, > 0.
        activation: name of the activation, as in `bn_lightning.kernels.batch_norm`.
        negative_slope: slope of "leaky_relu" below zero.
        residual: added before the activation; the shape and device of `x`. If its dtype is another
            one, sum and activation are not fused, and have the promoted dtype.
        num_batches_tracked: int64 scalar on the device of `x`, incremented by one.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`; may differ
            between ranks.
        group_name: `ProcessGroup.group_name` of a process group that contains this rank.

    Returns:
        y, the shape and device of `x`, and its dtype or that of `x + residual`.

    Raises:
        ValueError: one value per channel on all ranks together; every rank raises it, before it
            writes any statistic. Otherwise the errors of `bn_lightning.kernels.batch_norm`.
    """
    check_choices(x, residual, activation, backend)
    check_like_aten(x, weight, bias, running_mean, running_var, True, eps, is_whole_batch=False)
    if momentum is None:
        check_average(running_mean, num_batches_tracked)
    triton = uses_triton(x, backend)
    if not is_channels_last(x):
        x = x.contiguous()
    with torch.no_grad():
        part = batch_norm_stats(x, triton)
        parts = _wait(_all_gather(part, 0, group_name)).view(-1, len(part))
        if x.numel() <= x.shape[1]:
            # A rank with at least two values per channel need not wait for the device here.
            parts = torch.ops.bn_lightning.check_count(parts)
        batch = batch_norm_gather_stats_with_counts(parts)
        var = batch.m2 / batch.total_count.clamp(min=1.0)
        if not is_recomputation():
            _update_running(
                RunningStatistics(running_mean, running_var, num_batches_tracked, momentum), batch
            )
    fused, added = split_residual(x, residual)
    arguments = _Arguments(
        x=x,
        residual=fused,
        weight=weight,
        bias=bias,
        mean=batch.mean.to(part.dtype),
        rstd=torch.rsqrt(var + eps).to(part.dtype),
        total_count=batch.total_count,
        eps=eps,
        activation=activation if added is None else "identity",
        negative_slope=negative_slope,
        triton=triton,
        group_name=group_name,
    )
    y = torch.ops.bn_lightning.sync_batch_norm_elemt(*arguments)
    return y if added is None else activate(y + added, activation, negative_slope)


def _update_running(running: RunningStatistics, batch: BatchStatistics) -> None:
    """Update the running statistics without reading the count on the host.

    A batch without values changes no statistic.
    """
    tracked = running.num_batches_tracked
    if tracked is not None:
        tracked.add_(1)
    share = batch.total_count.clamp(max=1.0)
    if running.momentum is not None:
        share = share * running.momentum
    elif tracked is not None:
        share = share / tracked
    unbiased_var = batch.m2 / (batch.total_count - 1.0).clamp(min=1.0)
    for old, new in ((running.mean, batch.mean), (running.var, unbiased_var)):
        if old is not None:
            old.copy_((1.0 - share) * old.double() + share * new)


class _Arguments(NamedTuple):
    """The arguments of the op `sync_batch_norm_elemt`, in the order of its schema.

    Attributes:
        x: dense.
        mean: (C,) in the compute dtype, of all ranks together.
        rstd: (C,) in the compute dtype, of all ranks together.
        total_count: fp64 scalar, values per channel on all ranks together.
        triton: whether to run the Triton kernels.

    The other attributes are those of `sync_batch_norm`.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    total_count: Tensor
    eps: float
    activation: str
    negative_slope: float
    triton: bool
    group_name: str

    def normalize(self, writes_mask: bool) -> tuple[Tensor, Tensor]:
        """Return y and the mask, as `batch_norm_elemt` does."""
        forward = Forward(
            self.x,
            self.residual,
            self.weight,
            self.bias,
            self.activation,
            self.negative_slope,
            writes_mask=writes_mask,
        )
        return batch_norm_elemt(forward, self.mean, self.rstd, self.triton)


class _Ranks(NamedTuple):
    """The options of a backward across the ranks.

    Attributes:
        eps: value added to the variance, > 0; only the second derivative reads it.
        triton: whether to run the Triton kernels.
        group_name: of the process group.
    """

    eps: float
    triton: bool
    group_name: str


class _SyncBatchNorm(torch.autograd.Function):
    """`batch_norm_elemt` with the gradient through the mean and rstd of all ranks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        a = _Arguments(*arguments)
        has_residual = a.residual is not None
        writes_mask = saves_mask(a.activation, has_residual)
        from_z = recomputes_z(a.activation, has_residual)
        y, mask = a.normalize(writes_mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        # The fields of `Backward` from x to bias.
        fields = (
            a.x,
            a.residual if from_z else None,
            y if saves_output(a.activation, has_residual) else None,
            mask if writes_mask else None,
            a.mean,
            a.rstd,
            a.weight,
            a.bias if from_z else None,
        )
        ctx.save_for_backward(a.total_count, *fields)
        ctx.options = (is_channels_last(a.x), a.activation, a.negative_slope)
        ctx.ranks = _Ranks(a.eps, a.triton, a.group_name)
        ctx.dtypes = [None if t is None else t.dtype for t in (a.weight, a.bias)]
        return y, mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        total_count, x, *saved = ctx.saved_tensors
        channels_last, activation, _ = ctx.options
        dy = torch.zeros_like(x) if dy is None else as_layout(dy, channels_last)
        needs_dx, needs_dresidual, needs_dweight, needs_dbias, *others = ctx.needs_input_grad
        # Without an activation the gradient of the residual is dy itself.
        writes_dresidual = needs_dresidual and activation != "identity"
        needs = BackwardNeeds(training=True, dx=needs_dx, affine=True, dresidual=writes_dresidual)
        run = _SyncBatchNormBackward.apply if torch.is_grad_enabled() else _backward
        dx, written, (dbias, dweight) = run(
            needs, ctx.ranks, total_count, dy, x, *saved, *ctx.options
        )
        dresidual = written if writes_dresidual else dy
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            dx if needs_dx else None,
            dresidual if needs_dresidual else None,
            dweight.to(weight_dtype) if needs_dweight else None,
            dbias.to(bias_dtype) if needs_dbias else None,
            *(None for _ in others),
        )


def _backward(
    needs: BackwardNeeds, ranks: _Ranks, total_count: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, dresidual, and dbias and dweight of this rank as (2, C).

    Args:
        needs: whether to compute dx and dresidual.
        ranks: how the stages run, and the process group.
        total_count: scalar, values per channel on all ranks together.
        fields: those of `Backward`.
    """
    call = Backward(*fields)
    sums = batch_norm_backward_reduce(call, ranks.triton)
    means = _all_reduce(sums, ranks.group_name) / total_count.to(sums.dtype).clamp(min=1.0)
    return *batch_norm_backward_elemt(call, needs, means, ranks.triton), sums


class _SyncBatchNormBackward(torch.autograd.Function):
    """`_backward` with its gradient, which is that of `_differentiable_backward`."""

    @staticmethod
    def forward(
        ctx: Any, needs: BackwardNeeds, ranks: _Ranks, total_count: Tensor, *fields: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, channels_last, activation, negative_slope = fields
        ctx.save_for_backward(total_count, *tensors)
        ctx.options = (channels_last, activation, negative_slope)
        ctx.needs, ctx.ranks = needs, ranks
        return _backward(needs, ranks, total_count, *fields)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        def composite(total_count: Any, *tensors: Any) -> tuple[Tensor, ...]:
            return _differentiable_backward(
                Backward(*tensors, *ctx.options), total_count, ctx.ranks
            )

        used = (ctx.needs.dx, ctx.needs.dresidual, True)
        wanted = [u if use else None for u, use in zip(upstream, used, strict=True)]
        gradients = reference.vector_jacobian_product(composite, ctx.saved_tensors, wanted)
        return (None, None, *gradients, *(None for _ in ctx.options))


def _differentiable_backward(
    call: Backward, total_count: Tensor, ranks: _Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `_backward` does, with mean and rstd as functions of the x of every rank."""
    x: Any = call.x
    x = x.to(call.mean.dtype)
    total_count = total_count.to(x.dtype).clamp(min=1.0)
    mean = _AllReduce.apply(reference.channel_sum(x), ranks.group_name) / total_count
    centered = x - reference.as_channels(mean, x)
    m2 = _AllReduce.apply(reference.channel_sum(centered * centered), ranks.group_name)
    call = call._replace(mean=mean, rstd=torch.rsqrt(m2 / total_count + ranks.eps))
    sums = batch_norm_backward_reduce(call, triton=False)
    means = _AllReduce.apply(sums, ranks.group_name) / total_count
    needs = BackwardNeeds(training=True, dx=True, affine=True, dresidual=True)
    return *batch_norm_backward_elemt(call, needs, means, triton=False), sums


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return _all_reduce(value, group_name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(gradient.contiguous(), ctx.group_name), None


def _all_reduce(value: Tensor, group_name: str) -> Tensor:
    return _wait(collectives.all_reduce(value, "sum", group_name))  # type: ignore[arg-type]


def _wait(value: Tensor) -> Tensor:
    """Return the result of a collective as a plain tensor, which no later op has to wait for."""
    return value.wait() if isinstance(value, collectives.AsyncCollectiveTensor) else value


def _with_gradient(*arguments: Any) -> Tensor:
    """The Autograd kernel of `sync_batch_norm_elemt`."""
    a = _Arguments(*arguments)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (a.x, a.residual, a.weight, a.bias)
    ):
        return _SyncBatchNorm.apply(*a)[0]
    return _without_gradient(*a)


def _without_gradient(*arguments: Any) -> Tensor:
    return _Arguments(*arguments).normalize(writes_mask=False)[0]


def _check_count(parts: Tensor) -> Tensor:
    """Return a copy of `parts`, or raise if all ranks together have one value per channel."""
    if batch_norm_gather_stats_with_counts(parts).total_count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all ranks together; "
            "use batches of at least 2 samples in all, or model.eval()"
        )
    return parts.clone()


# `sync_batch_norm_elemt` is an op so that AOTAutograd traces its gradient, which Dynamo cannot.
# `check_count` is an op so that a compiler does not look at the values that it checks.
_LIBRARY = torch.library.Library("bn_lightning", "FRAGMENT")
_LIBRARY.define(
    "sync_batch_norm_elemt(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, Tensor total_count, float eps, str activation, float negative_slope, "
    "bool triton, str group_name) -> Tensor"
)
_LIBRARY.define("check_count(Tensor parts) -> Tensor")
_LIBRARY.impl("sync_batch_norm_elemt", _with_gradient, "Autograd")
# For every device, because both are written in torch.
_LIBRARY.impl("sync_batch_norm_elemt", _without_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("check_count", _check_count, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bn_lightning::sync_batch_norm_elemt", lambda x, *_: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_fake("bn_lightning::check_count", torch.empty_like, lib=_LIBRARY)
