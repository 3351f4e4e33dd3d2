"""What one call of the forward and of the backward hands to the kernels, whatever the regime.

Shapes: x is (N, C, ...), dense; residual, y, dy and the results have its shape, dtype and strides.
Per-channel tensors are (C,) and contiguous.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A forward: in training, in evaluation, or the normalisation of one rank's part.

    `normalize.normalize` alone, which evaluation and the ranks run, reads neither statistics,
    `momentum` nor `eps`: it is given mean and rstd.

    Attributes:
        x: fp32, fp16 or bf16.
        residual: added before the activation, or None.
        weight: any float dtype, or None for ones.
        bias: any float dtype, or None for zeros.
        running_mean: any float dtype, updated in training; None together with `running_var`.
        running_var: any float dtype, unbiased, updated in training.
        num_batches_tracked: int64 scalar to which training adds one, or None.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average
            over all batches, which `num_batches_tracked` counts.
        eps: added to the biased variance, > 0, in training; unread otherwise.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
        writes_bits: whether the backward will read bits of the derivative.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    activation: str
    negative_slope: float
    writes_bits: bool

    @property
    def elementwise(self) -> dict[str, Any]:
        """What every kernel that writes y reads, but for mean and rstd."""
        return {
            "x_ptr": self.x,
            "residual_ptr": self.residual,
            "weight_ptr": self.weight,
            "bias_ptr": self.bias,
            "negative_slope": self.negative_slope,
            "ACTIVATION": self.activation,
        }

    @property
    def state(self) -> dict[str, Any]:
        """What every kernel that ends the statistics reads and writes."""
        return {
            "running_mean_ptr": self.running_mean,
            "running_var_ptr": self.running_var,
            "tracked_ptr": self.num_batches_tracked,
            "momentum": self.momentum or 0.0,
            "eps": self.eps,
        }

    def new_outputs(self) -> tuple[Tensor, Tensor | None]:
        """Makes room for y and, where they are written, the bits: one for each element."""
        x = self.x
        if not self.writes_bits:
            return torch.empty_like(x), None
        return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)

    def new_statistics(self) -> tuple[Tensor, Tensor]:
        """Makes room for mean and rstd, each (C,) fp32."""
        C = self.x.shape[1]
        mean_C = self.x.new_empty(C, dtype=torch.float32)
        return mean_C, torch.empty_like(mean_C)


@dataclass(frozen=True, slots=True)
class BackwardCall:
    """A backward.

    Attributes:
        dy: fp32, fp16 or bf16.
        x: the forward's; None in evaluation where neither z nor dweight needs it.
        residual: the forward's, where z is recomputed and there was one.
        y: the forward's, where the derivative is computed from it.
        bits: the forward's, where the derivative is read from them.
        mean: fp32, as the forward used it.
        rstd: fp32, as the forward used it.
        weight: any float dtype, or None for ones.
        bias: any float dtype, or None for zeros.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
        training: whether mean and rstd were those of `x`.
        needs_dx: whether to compute dx.
        needs_affine: whether to compute dweight and dbias.
        needs_dresidual: whether to compute dresidual.
    """

    dy: Tensor
    x: Tensor | None
    residual: Tensor | None
    y: Tensor | None
    bits: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    activation: str
    negative_slope: float
    training: bool
    needs_dx: bool
    needs_affine: bool
    needs_dresidual: bool

    @property
    def gradient(self) -> dict[str, Any]:
        """What every kernel needs that computes g and x_hat."""
        return {
            "dy_ptr": self.dy,
            "x_ptr": self.x,
            "residual_ptr": self.residual,
            "y_ptr": self.y,
            "bits_ptr": self.bits,
            "mean_ptr": self.mean,
            "rstd_ptr": self.rstd,
            "weight_ptr": self.weight,
            "bias_ptr": self.bias,
            "negative_slope": self.negative_slope,
            "ACTIVATION": self.activation,
        }

    def new_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Makes room for dx and dresidual, where they are needed."""
        dy = self.dy
        dx = torch.empty_like(dy) if self.needs_dx else None
        return dx, torch.empty_like(dy) if self.needs_dresidual else None

    def new_sums(self) -> tuple[Tensor, Tensor]:
        """Makes room for dweight and dbias, each (C,) fp32."""
        return torch.empty_like(self.mean), torch.empty_like(self.mean)
