"""Run a forward or a backward on the Triton kernels, in the regime that the schedule chooses.

Evaluation reduces no statistics, so its forward is the elementwise pass in every regime, and so is
its backward if weight and bias need no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from bn_lightning.kernels.arguments import (
    Backward,
    BackwardNeeds,
    Forward,
    RunningStatistics,
)
from bn_lightning.kernels.backward import (
    affine_gradients,
    evaluation_gradients,
    input_gradients,
)
from bn_lightning.kernels.dispatch import check_device, schedule_of
from bn_lightning.kernels.layout import is_channels_last
from bn_lightning.kernels.normalize import launch_evaluation, launch_normalize
from bn_lightning.kernels.schedule import Regime
from bn_lightning.kernels.single_launch import backward_single_launch, forward_single_launch
from bn_lightning.kernels.stats import compute_partials, finish_statistics


def run_forward(
    call: Forward,
    running: RunningStatistics,
    eps: float,
    *,
    training: bool,
    keeps_statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Any, Any]:
    """Run a forward.

    Args:
        call: the tensors, of any strides, and the activation.
        running: read in evaluation, updated in place in training.
        eps: added to the biased variance, > 0.
        training: normalize by the statistics of the batch, else by the running ones.
        keeps_statistics: whether a backward follows, which reads mean and rstd.

    Returns:
        y, the mask of the derivative or None, and mean and rstd, each (C,) fp32. In evaluation the
        last two are None without `keeps_statistics`.

    Raises:
        ValueError: an `x` on a device that the kernels cannot read.
        RuntimeError: no running statistics in evaluation.
    """
    check_device(call.x)
    channels_last = is_channels_last(call.x)
    call = call.in_layout(channels_last)
    dense = running.contiguous()
    cumulative = training and running.momentum is None
    schedule = schedule_of(
        call.x, channels_last, writes_mask=call.writes_mask, cumulative=cumulative
    )
    mask: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    with torch.cuda.device_of(call.x):
        if not training:
            if dense.mean is None or dense.var is None:
                raise RuntimeError(
                    "expected `running_mean` and `running_var` to be tensors in evaluation, got "
                    "None for at least one; pass both, or training=True"
                )
            y, mask, mean, rstd = launch_evaluation(
                call, dense, eps, schedule, keeps_statistics=keeps_statistics
            )
        elif schedule.regime is Regime.SINGLE_LAUNCH:
            y, mask, mean, rstd = forward_single_launch(call, dense, eps, schedule)
        else:
            partials = compute_partials(call.x, schedule, dense.num_batches_tracked)
            mean, rstd = finish_statistics(partials, dense, eps, schedule)
            y, mask = launch_normalize(call, mean, rstd, schedule)
    if training:
        running.take(dense)
    return y, mask, mean, rstd


def run_backward(
    call: Backward, needs: BackwardNeeds
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run a backward.

    Args:
        call: the tensors, of any strides, and the activation.
        needs: which gradients, and the mode.

    Returns:
        dx, dresidual, dweight and dbias, each None if it is not needed; the last two (C,) fp32.
    """
    call = call.in_layout()
    schedule = schedule_of(call.dy, call.channels_last, reads_mask=call.mask is not None)
    dweight = dbias = None
    with torch.cuda.device_of(call.dy):
        if not (needs.affine or (needs.training and needs.dx)):
            dx, dresidual = input_gradients(call, needs, None, None, schedule)
        elif not needs.training:
            dx, dresidual, dweight, dbias = evaluation_gradients(call, needs, schedule)
        elif schedule.regime is Regime.SINGLE_LAUNCH:
            dx, dresidual, dweight, dbias = backward_single_launch(call, needs, schedule)
        else:
            dweight, dbias = affine_gradients(call, schedule)
            dx, dresidual = input_gradients(call, needs, dweight, dbias, schedule)
    if not needs.affine:
        dweight = dbias = None
    return dx, dresidual, dweight, dbias
