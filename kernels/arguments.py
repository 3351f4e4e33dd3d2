"""The arguments of a forward and a backward: those of the ops, and those of the Triton kernels.

NamedTuples, which Triton takes as arguments of kernels and between their functions. In a kernel a
tensor is a pointer, and a field in capitals is a `tl.constexpr`.

Shapes: x is (N, C, ...), dense; residual, y, dy and the results have its shape, dtype and strides.
Per-channel tensors are (C,).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_lightning.kernels.layout import as_layout, contiguous, is_channels_last, mask_shape
from bn_lightning.kernels.schedule import Schedule
from bn_lightning.kernels.walk import as_constexpr


def split_residual(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the residual as one to be fused, or as one to be added afterwards.

    A residual of another dtype is added afterwards, so that the sum is promoted as in eager code.
    """
    if residual is None or residual.dtype == x.dtype:
        return residual, None
    return None, residual


class BatchNormArguments(NamedTuple):
    """The arguments of the op `batch_norm`, in its order; described at the function."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    activation: str
    negative_slope: float

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that may need a gradient."""
        return [t for t in (self.x, self.residual, self.weight, self.bias) if t is not None]


class Forward(NamedTuple):
    """The inputs of y = act((x - mean) * rstd * weight + bias + residual), without mean and rstd.

    Attributes:
        x: fp32, fp16 or bf16.
        residual: added before the activation, or None.
        weight: any float dtype, or None for ones.
        bias: any float dtype, or None for zeros.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
        writes_mask: whether to write the mask of the derivative, for the backward.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    activation: str
    negative_slope: float
    writes_mask: bool

    def in_layout(self, channels_last: bool) -> "Forward":
        """Return the same with dense tensors in one layout, each copied at most once."""
        return Forward(
            as_layout(self.x, channels_last),
            None if self.residual is None else as_layout(self.residual, channels_last),
            contiguous(self.weight),
            contiguous(self.bias),
            self.activation,
            self.negative_slope,
            self.writes_mask,
        )

    def tensors(self, y: Tensor, mask: Tensor | None) -> "ForwardTensors":
        """Return the argument of a kernel that writes `y`."""
        activation = as_constexpr(self.activation)
        return ForwardTensors(self.x, self.residual, y, mask, self.negative_slope, activation)

    def channels(self, mean: Tensor | None, rstd: Tensor | None) -> "ChannelTensors":
        """Return the per-channel tensors."""
        return ChannelTensors(mean, rstd, self.weight, self.bias)

    def new_outputs(self) -> tuple[Tensor, Tensor | None]:
        """Allocate y and, if `writes_mask`, the mask of the derivative: one bit per element."""
        x = self.x
        if not self.writes_mask:
            return torch.empty_like(x), None
        shape = mask_shape(x.shape, is_channels_last(x))
        return torch.empty_like(x), x.new_empty(shape, dtype=torch.uint8)


class RunningStatistics(NamedTuple):
    """The statistics that training updates; the tensors are pointers in a kernel.

    Attributes:
        mean: any float dtype, or None together with `var`.
        var: any float dtype, unbiased.
        num_batches_tracked: int64 scalar to which training adds one, or None.
        momentum: weight of the batch, in [0, 1]; None for the average over all batches, which
            `num_batches_tracked` counts.
    """

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None

    def contiguous(self) -> "RunningStatistics":
        """Return the same with contiguous `mean` and `var`, each copied at most once."""
        mean, var = contiguous(self.mean), contiguous(self.var)
        return RunningStatistics(mean, var, self.num_batches_tracked, self.momentum)

    def take(self, updated: "RunningStatistics") -> None:
        """Copy back what `contiguous` copied, and tell autograd that the tensors have changed."""
        for old, new in ((self.mean, updated.mean), (self.var, updated.var)):
            if old is not None and new is not None and new is not old:
                old.copy_(new)
        tensors = (self.mean, self.var, self.num_batches_tracked)
        torch.autograd.graph.increment_version([v for v in tensors if v is not None])


class Partials(NamedTuple):
    """The statistics of each split of each channel, (S, C) fp32 each.

    Attributes:
        count_ptr: values.
        mean_ptr: their mean.
        root_ptr: sqrt(M2), with M2 = sum (x - mean)^2.
    """

    count_ptr: Any
    mean_ptr: Any
    root_ptr: Any

    @classmethod
    def empty(cls, x: Tensor, schedule: Schedule) -> "Partials":
        """Allocate the partials of `x`."""
        return cls(*x.new_empty((3, schedule.splits, schedule.C), dtype=torch.float32).unbind())


# The fields of `Backward` in the schemas of the ops of sync_ops.py.
BACKWARD_SCHEMA = (
    "Tensor dy, Tensor? x, Tensor? residual, Tensor? y, Tensor? mask, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool channels_last, str activation, float negative_slope"
)


class Backward(NamedTuple):
    """The inputs of a backward, on one device or across ranks.

    Attributes:
        dy: gradient of y.
        x: as the forward read it; None in evaluation if neither z nor dweight needs it.
        residual: the forward's, if z is recomputed and there was one.
        y: the forward's, if act' is computed from it.
        mask: the forward's, uint8 of `mask_shape`, if act' is read from it.
        mean: (C,) in the compute dtype (fp32 for the kernels), as the forward used it.
        rstd: as `mean`.
        weight: any float dtype, or None for ones.
        bias: any float dtype, or None for zeros.
        channels_last: whether `x` is, and `mask` with it.
        activation: a key of `ACTIVATIONS`.
        negative_slope: of leaky_relu.
    """

    dy: Tensor
    x: Tensor | None
    residual: Tensor | None
    y: Tensor | None
    mask: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    channels_last: bool
    activation: str
    negative_slope: float

    def in_layout(self) -> "Backward":
        """Return the same with dense tensors in one layout, each copied at most once."""
        return self._replace(
            dy=as_layout(self.dy, self.channels_last),
            x=None if self.x is None else as_layout(self.x, self.channels_last),
            residual=(
                None if self.residual is None else as_layout(self.residual, self.channels_last)
            ),
            weight=contiguous(self.weight),
            bias=contiguous(self.bias),
        )

    def tensors(
        self,
        dx: Tensor | None = None,
        dresidual: Tensor | None = None,
        inverse_count: float = 0.0,
        training: bool = False,
    ) -> "BackwardTensors":
        """Return the argument of a kernel of the backward; by default it writes no dx."""
        return BackwardTensors(
            dy_ptr=self.dy,
            x_ptr=self.x,
            residual_ptr=self.residual,
            y_ptr=self.y,
            mask_ptr=self.mask,
            dx_ptr=dx,
            dresidual_ptr=dresidual,
            inverse_count=inverse_count,
            negative_slope=self.negative_slope,
            ACTIVATION=as_constexpr(self.activation),
            TRAINING=as_constexpr(training),
        )

    @property
    def channels(self) -> "ChannelTensors":
        """The per-channel tensors."""
        return ChannelTensors(self.mean, self.rstd, self.weight, self.bias)

    def new_gradients(self, needs: "BackwardNeeds") -> tuple[Tensor | None, Tensor | None]:
        """Allocate dx and dresidual, each None if it is not needed."""
        dx = torch.empty_like(self.dy) if needs.dx else None
        return dx, torch.empty_like(self.dy) if needs.dresidual else None

    def new_sums(self) -> tuple[Tensor, Tensor]:
        """Allocate dweight and dbias, each (C,) fp32."""
        return torch.empty_like(self.mean), torch.empty_like(self.mean)

    def new_partials(self, splits: int) -> tuple[Tensor, ...]:
        """Allocate dweight and dbias of each split, each (splits, C) fp32."""
        return self.mean.new_empty((2, splits, *self.mean.shape)).unbind()


class BackwardNeeds(NamedTuple):
    """Which gradients a backward computes, and in which mode.

    Attributes:
        training: whether mean and rstd were those of x, so that dx goes through them.
        dx: whether to compute dx.
        affine: whether to compute dweight and dbias.
        dresidual: whether to compute dresidual.
    """

    training: bool
    dx: bool
    affine: bool
    dresidual: bool


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate mean and rstd of `x`, each (C,) fp32."""
    mean_C = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean_C, torch.empty_like(mean_C)


class ForwardTensors(NamedTuple):
    """The argument of a kernel that writes y.

    Attributes:
        x_ptr: (N, C, L).
        residual_ptr: (N, C, L) or None.
        y_ptr: (N, C, L), written.
        mask_ptr: uint8 of `mask_shape`, written, or None.
        negative_slope: of leaky_relu.
        ACTIVATION: constexpr, a key of `ACTIVATIONS`.
    """

    x_ptr: Any
    residual_ptr: Any
    y_ptr: Any
    mask_ptr: Any
    negative_slope: Any
    ACTIVATION: Any


class BackwardTensors(NamedTuple):
    """The argument of a kernel of the backward.

    Attributes:
        dy_ptr: (N, C, L).
        x_ptr: (N, C, L), or None if neither dx nor z needs it.
        residual_ptr: (N, C, L) or None.
        y_ptr: (N, C, L) or None.
        mask_ptr: uint8 of `mask_shape`, or None.
        dx_ptr: (N, C, L), written, or None.
        dresidual_ptr: (N, C, L), written, or None.
        inverse_count: 1 / M.
        negative_slope: of leaky_relu.
        ACTIVATION: constexpr, a key of `ACTIVATIONS`.
        TRAINING: constexpr, whether dx goes through mean and rstd.
    """

    dy_ptr: Any
    x_ptr: Any
    residual_ptr: Any
    y_ptr: Any
    mask_ptr: Any
    dx_ptr: Any
    dresidual_ptr: Any
    inverse_count: Any
    negative_slope: Any
    ACTIVATION: Any
    TRAINING: Any


class ChannelTensors(NamedTuple):
    """The per-channel tensors of a kernel, (C,) each.

    Attributes:
        mean_ptr: fp32, or None where it is to be written and is not wanted.
        rstd_ptr: fp32, 1 / sqrt(var + eps), or None together with the mean.
        weight_ptr: any float dtype, or None for ones.
        bias_ptr: any float dtype, or None for zeros.
    """

    mean_ptr: Any
    rstd_ptr: Any
    weight_ptr: Any
    bias_ptr: Any
