"""BatchNorm modules: torch's state and meaning, with a choice of backend.

Subclasses of `torch.nn.BatchNorm1d`, `2d` and `3d`: the same `state_dict`, so checkpoints load both
ways, the same defaults, the same running statistics. The arithmetic is in kernels/ops.py.

torch.jit takes none of them: it can neither compile the ops nor record the choice of a backend. To
torch.fx each is one node, as torch's are.
"""

from typing import Any, NoReturn, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.kernels.checks import check_activation, check_backend
from bn_lightning.kernels.ops import batch_norm

_NO_JIT = (
    "expected no torch.jit around {0}, which it cannot compile; use torch.compile or torch.export, "
    "or torch.nn.{0}, whose state_dict is the same"
)


class _BackendMixin(_BatchNorm):
    """What the three modules share: the constructor's checks, freezing, and the forward."""

    # On the class, so that modules pickled before they existed have them too.
    activation = "identity"
    negative_slope = 0.01
    backend = "auto"
    stats_frozen = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str = "identity",
        negative_slope: float = 0.01,
        backend: str = "auto",
    ) -> None:
        if num_features < 1:
            raise ValueError(f"expected `num_features` to be at least 1, got {num_features}")
        if not eps >= 0:
            raise ValueError(f"expected `eps` to be at least 0, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"expected `momentum` to be None or in [0, 1], got {momentum}")
        check_backend(backend)
        check_activation(activation)
        # Passed on only when set: torch before 2.13 does not know it.
        without_bias = {} if bias else {"bias": False}
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            **without_bias,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend

    def freeze_stats(self, frozen: bool = True) -> Self:
        """Normalises by the running statistics, and leaves them alone, whatever `.train()` says.

        Weight and bias train on. Not part of the state_dict.

        Args:
            frozen: False ends it.

        Returns:
            The module.

        Raises:
            ValueError: the module has no running statistics.
        """
        if frozen and self.running_mean is None:
            raise ValueError(
                "expected a module with running statistics to freeze, got one with "
                "`track_running_stats`=False"
            )
        self.stats_frozen = frozen
        return self

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float | None = None,
    ) -> Tensor:
        """Normalises each channel of `input`, adds `residual` and applies the activation.

        Args:
            input: as torch's module of the same name takes it.
            residual: with the shape, dtype and device of `input`.
            activation: for this call, instead of the module's own.
            negative_slope: for this call, instead of the module's own.

        Returns:
            y, with the shape, dtype and device of `input`.

        Raises:
            ValueError: another number of dimensions; one value per channel in training; a tensor
                that `backend` cannot take; a residual unlike `input`. The state is then as it was.
            RuntimeError: under torch.jit.trace.
        """
        if isinstance(input, fx.Proxy):
            tracer: Any = input.tracer
            given = {
                "residual": residual,
                "activation": activation,
                "negative_slope": negative_slope,
            }
            options = {name: value for name, value in given.items() if value is not None}
            return tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (input,), options
            )
        if torch.jit.is_tracing():
            raise RuntimeError(_NO_JIT.format(type(self).__name__))
        self._check_input_dim(input)
        # Module.__getattr__ makes each read of a parameter or buffer slow, so each is read once.
        running_mean, running_var = self.running_mean, self.running_var
        count = None
        if self.training and not self.stats_frozen:
            training = True
            if self.track_running_stats:
                count = self.num_batches_tracked
            else:
                running_mean = running_var = None
        else:
            training = running_mean is None and running_var is None
        return self._batch_norm(
            input,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation if activation is None else activation,
            negative_slope=self.negative_slope if negative_slope is None else negative_slope,
            residual=residual,
            num_batches_tracked=count,
            backend=self.backend,
        )

    def _batch_norm(self, input: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        """The arithmetic of `forward`; the synchronised modules have another."""
        return batch_norm(input, *state, **options)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which asks for this before it compiles."""
        raise RuntimeError(_NO_JIT.format(type(self).__name__))

    def extra_repr(self) -> str:
        """Returns torch's description of the module, what is fused into it, and the backend."""
        parts = [super().extra_repr()]
        if self.activation != "identity":
            parts.append(f"activation={self.activation}")
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        if self.stats_frozen:
            parts.append("stats_frozen=True")
        return ", ".join([*parts, f"backend={self.backend}"])


class BatchNorm1d(_BackendMixin, nn.BatchNorm1d):
    """Batch Normalization of (N, C) or (N, C, L); see `BatchNorm2d` for the arguments."""


class BatchNorm2d(_BackendMixin, nn.BatchNorm2d):
    """Batch Normalization of (N, C, H, W).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with the mean and the biased variance of the batch in training, the running ones in evaluation.

    Args:
        num_features: C, at least 1.
        eps: added to the variance, at least 0, and above 0 to train.
        momentum: weight of a new batch in the running statistics, in [0, 1]; None for the average
            over all batches.
        affine: whether there are `weight` and `bias`, each (C,).
        track_running_stats: whether there are `running_mean` and `running_var` (unbiased), each
            (C,); without them evaluation uses the batch's statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers, which may differ from the input's.
        bias: whether an affine module has a `bias`.
        activation: its name, as in `bn_lightning.kernels.batch_norm`.
        negative_slope: of "leaky_relu" below zero.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Raises:
        ValueError: an argument outside its range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """


class BatchNorm3d(_BackendMixin, nn.BatchNorm3d):
    """Batch Normalization of (N, C, D, H, W); see `BatchNorm2d` for the arguments."""
