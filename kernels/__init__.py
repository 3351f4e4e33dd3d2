"""Batch Normalization in Triton, and the custom ops that make it part of PyTorch.

The files in reading order:

    activations.py    the table of activations, and what the gradient of each needs
    walk.py           rows, blocks, tiles and splits of a tensor in memory
    schedule.py       shape, dtype, layout, device -> regime, tiles, splits: pure functions
    layout.py         contiguous and channels-last memory
    measurements.py   the table of what was measured on a device
    cost.py           what a BatchNorm costs, counted: bytes, launches and host time
    dispatch.py       the backend of a tensor and its schedule
    arguments.py      the arguments of a forward and a backward, also those of the kernels
    reference.py      the definition in plain torch: forward, and a differentiable backward
    triton_launcher.py  Triton's launcher, called with addresses: its private fields
    launch_plan.py    record the launches of a call, and repeat them on other tensors
    element.py        the activations and their derivatives, of an element
    tile_access.py    one tile: where its elements are, loads, stores and their arithmetic
    stats.py          per-channel mean and rstd from (n, mean, M2) partials, running statistics
    normalize.py      y = act((x - mean) * rstd * weight + bias + residual)
    backward.py       dweight and dbias, then dx and dresidual
    single_launch.py  a forward or a backward in one launch, for small tensors
    launch.py         a forward or a backward in the regime of its schedule
    checks.py         errors for wrong arguments
    autograd.py       the gradient of the ops, and the gradient of that
    eager.py          the path of eager code around the ops: a plan for each kind of call
    ops.py            the ops, their fakes, gradients and vmap
    planned_stage.py  plans for the stages of a batch on several ranks
    sync_ops.py       the stages of a batch on several ranks, under ATen's names
    sync_autograd.py  the stages with the communication between ranks, and the gradient

Only files with kernels import Triton, and they are imported when a kernel runs.
"""

from bn_lightning.kernels.dispatch import update_in_recomputation
from bn_lightning.kernels.ops import batch_norm

__all__ = ["batch_norm", "update_in_recomputation"]
