"""Batch Normalization in Triton, and the custom ops that make it part of PyTorch.

Reading order, each file resting on the ones before it:

    reference.py   the definition in plain torch: forward, backward, double backward
    schedule.py    shape and dtype -> layout, tiles, splits, warps: pure functions
    statistics.py  per-channel mean and rstd from (n, mean, M2) partials, running statistics
    normalize.py   y = (x - mean) * rstd * weight + bias
    backward.py    dweight and dbias, then dx
    ops.py         the ops, their fakes and gradients, and the choice of backend

Triton is imported by the three files with kernels only, and those only when a kernel runs.
"""

from bn_lightning.kernels.ops import batch_norm

__all__ = ["batch_norm"]
