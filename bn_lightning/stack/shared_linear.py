"""A linear layer of all members whose input they share: a single product of matrices.

On a CPU in fp32 it is oneDNN's, in half the time of MKL's, which torch takes: MKL 2024 does without
AVX-512 on processors of AMD. The op is the one to which torch.compile compiles linear layers.
Suffixes of tensors: N samples, I inputs, M outputs of all members.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def shared_linear(x_NI: Tensor, weight_MI: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return x W^T + b, (N, M), without a gradient."""
    onednn = _onednn(x_NI)
    if onednn is None:
        return F.linear(x_NI, weight_MI, bias_M)
    return onednn(_dense(x_NI), _dense(weight_MI), bias_M, "none", [], "")


def add_weight_gradient(weight_MI: Tensor, dy_NM: Tensor, x_NI: Tensor, factor: float) -> None:
    """Compute W += factor * dy^T x in place."""
    if _onednn(x_NI) is None:
        weight_MI.addmm_(dy_NM.t(), x_NI, alpha=factor)
    else:
        weight_MI.add_(shared_linear(dy_NM.t(), x_NI.t()), alpha=factor)


def _onednn(x: Tensor) -> Any:
    """Return the linear layer of oneDNN, or None where torch's is to compute it."""
    is_for = x.is_cpu and x.dtype is torch.float32 and x.numel() and _has_onednn()
    return torch.ops.mkldnn._linear_pointwise if is_for else None


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix without gaps between its rows or columns, for which oneDNN is slow."""
    is_dense = matrix.is_contiguous() or matrix.t().is_contiguous()
    return matrix if is_dense else matrix.contiguous()
