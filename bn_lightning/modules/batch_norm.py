"""BatchNorm modules with the state and semantics of torch's, and a choice of backend.

The classes are subclasses of `torch.nn.BatchNorm1d`, `2d` and `3d` with the same `state_dict`, so
checkpoints load both ways, and with the same defaults and running statistics. The arithmetic is in
kernels/ops.py.

torch.jit is not supported, because it can neither compile the ops nor record the choice of a
backend. torch.fx records each module as one node, as it does for torch's.
"""

from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.kernels.checks import check_activation, check_backend
from bn_lightning.kernels.ops import batch_norm

_NO_JIT = (
    "expected no torch.jit around {0}, got a torch.jit call, which cannot compile it; use "
    "torch.compile or torch.export, or torch.nn.{0}, which has the same state_dict"
)


class _BackendMixin(_BatchNorm):
    """The constructor's checks, the freezing of statistics and the forward of all our modules."""

    # Class attributes, so that modules pickled by an older version and modules whose class was
    # swapped have them too.
    activation = "identity"
    negative_slope = 0.01
    backend = "auto"
    stats_frozen = False
    # Set by a conversion, on an instance: what defers its calls (conversion/deferred.py), what
    # makes torch's module with the same state, and whether copies and pickles are that.
    deferral: Any = None
    torch_twin: Any = None
    is_copied_as_torch = False

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
        # Passed on only when set, because torch before 2.13 has no such argument.
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
        """Freeze the running statistics: use them in training too, and do not update them.

        `.train()` does not end the freezing. Weight and bias are still trained. The flag is not
        part of the state_dict.

        Args:
            frozen: True to freeze, False to unfreeze.

        Returns:
            The module itself.

        Raises:
            ValueError: the module has no running statistics.
        """
        if frozen and self.running_mean is None:
            raise ValueError(
                "expected `track_running_stats` to be True to freeze the statistics, got False; "
                "build the module with track_running_stats=True"
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
        """Normalize each channel of `input`, add `residual` and apply the activation.

        Args:
            input: the shapes that torch's module of the same name accepts; any float dtype.
            residual: the shape and device of `input`, or None. If its dtype is another one, the sum
                is not fused, and has the promoted dtype.
            activation: overrides the module's activation for this call.
            negative_slope: overrides the module's negative slope for this call.

        Returns:
            y, the shape and device of `input`, and its dtype or that of `input + residual`.

        Raises:
            ValueError: wrong number of dimensions; one value per channel in training; a tensor that
                `backend` does not support; a residual of another shape. The module's state
                is unchanged.
            RuntimeError: a call under torch.jit.trace.
        """
        deferral = self.deferral
        if deferral is not None and residual is None and activation is None and not is_compiling():
            y = deferral.repeat(self, input)
            if y is not None:
                return y
        if isinstance(input, fx.Proxy):
            tracer: Any = input.tracer
            options: dict[str, Any] = {
                "residual": residual,
                "activation": activation,
                "negative_slope": negative_slope,
            }
            given = {name: value for name, value in options.items() if value is not None}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)
        if torch.jit.is_tracing():
            return self._twin_for_jit()(input)
        self._check_input_dim(input)
        parameters, buffers = self._parameters, self._buffers
        try:
            # Module.__getattr__ looks in the same places and takes ten times as long.
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            count = buffers["num_batches_tracked"]
        except KeyError:
            # One is parametrized, or was replaced by a plain attribute.
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            count = getattr(self, "num_batches_tracked", None)
        if self.training and not self.stats_frozen:
            training = True
            if not self.track_running_stats:
                running_mean = running_var = count = None
        else:
            training = running_mean is None and running_var is None
            count = None
        state = (weight, bias, running_mean, running_var)
        options = {
            "training": training,
            "momentum": self.momentum,
            "eps": self.eps,
            "activation": self.activation if activation is None else activation,
            "negative_slope": self.negative_slope if negative_slope is None else negative_slope,
            "residual": residual,
            "num_batches_tracked": count,
            "backend": self.backend,
        }
        # The method in between would take its time.
        is_own = type(self)._batch_norm is _BackendMixin._batch_norm
        compute = batch_norm if is_own else self._batch_norm
        if deferral is not None and residual is None and options["activation"] == "identity":
            return deferral(self, compute, input, state, options)
        return compute(input, *state, **options)

    def _batch_norm(self, input: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        """Compute `forward`'s result; the synchronized modules override this."""
        return batch_norm(input, *state, **options)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles, or raise a RuntimeError."""
        return self._twin_for_jit()

    def _twin_for_jit(self) -> nn.Module:
        if self.torch_twin is None:
            raise RuntimeError(_NO_JIT.format(type(self).__name__))
        return self.torch_twin(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how copy.deepcopy and pickle make a copy."""
        if self.is_copied_as_torch:
            # The other protocols expect an object of this class.
            return self.torch_twin(self).__reduce_ex__(1)
        return super().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        """Return torch's description, the fused activation, whether frozen, and the backend."""
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

    Training uses the mean and the biased variance of the batch, evaluation the running statistics.

    Args:
        num_features: C, at least 1.
        eps: value added to the variance; at least 0, and above 0 in training.
        momentum: weight of a new batch in the running statistics, in [0, 1]; None for the average
            over all batches.
        affine: whether the module has `weight` and `bias`, each (C,).
        track_running_stats: whether the module has `running_mean` and `running_var` (unbiased),
            each (C,); without them evaluation uses the batch's statistics.
        device: device of the parameters and buffers.
        dtype: dtype of the parameters and buffers; may differ from the input's.
        bias: whether an affine module has a `bias`.
        activation: name of the activation, as in `bn_lightning.kernels.batch_norm`.
        negative_slope: slope of "leaky_relu" below zero.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Raises:
        ValueError: an argument is outside its range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """


class BatchNorm3d(_BackendMixin, nn.BatchNorm3d):
    """Batch Normalization of (N, C, D, H, W); see `BatchNorm2d` for the arguments."""
