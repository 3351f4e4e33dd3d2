"""Batch Normalization in Triton, and the custom ops that make it part of PyTorch.

Reading order, each file resting on the ones before it:

    reference.py    the definition in plain torch: forward, and a backward that is differentiable
    activations.py  the table of activations, and what the gradient of each needs
    schedule.py     shape, dtype, layout, device -> regime, tiles, splits: pure functions
    calls.py        what one forward and one backward hand to the kernels
    elements.py     one tile: where its elements lie, and the arithmetic of each
    statistics.py   per-channel mean and rstd from (n, mean, M2) partials, running statistics
    normalize.py    y = act((x - mean) * rstd * weight + bias + residual)
    backward.py     dweight and dbias, then dx and dresidual
    small.py        all of it in one launch, for small tensors
    resident.py     all of it in one launch that reads each element from memory once
    checks.py       what is wrong with the arguments
    dispatch.py     from a tensor to the kernels: choice of backend, layout in memory, schedule
    ops.py          the ops, their fakes, gradients and vmap
    sync_ops.py       the stages of a batch on several ranks, under ATen's names
    sync_autograd.py  the stages with the communication between ranks, and the gradient

Triton is imported by the files with kernels only, and those only when a kernel runs.
"""

from bn_lightning.kernels.ops import batch_norm

__all__ = ["batch_norm"]
