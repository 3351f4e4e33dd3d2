"""BatchNorm modules: torch's state and meaning, with a choice of backend.

Subclasses of `torch.nn.BatchNorm1d`, `2d` and `3d`: the same `state_dict`, so checkpoints load both
ways, the same defaults, the same running statistics. The arithmetic is in kernels/ops.py.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.kernels.ops import BACKENDS, batch_norm


class _BackendMixin(_BatchNorm):
    """What the three modules share: the constructor's checks, and a forward with a backend."""

    backend: str

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
        backend: str = "auto",
    ) -> None:
        if num_features < 1:
            raise ValueError(f"expected `num_features` to be at least 1, got {num_features}")
        if not eps >= 0:
            raise ValueError(f"expected `eps` to be at least 0, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"expected `momentum` to be None or in [0, 1], got {momentum}")
        if backend not in BACKENDS:
            raise ValueError(f"expected `backend` to be one of {BACKENDS}, got {backend!r}")
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
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each channel of `input`.

        Args:
            input: as torch's module of the same name takes it.

        Returns:
            y, with the shape, dtype and device of `input`.

        Raises:
            ValueError: another number of dimensions; one value per channel in training; a tensor
                that `backend` cannot take. The state is then as it was.
        """
        self._check_input_dim(input)
        # Module.__getattr__ makes each read of a parameter or buffer slow, so each is read once.
        running_mean, running_var = self.running_mean, self.running_var
        momentum = self.momentum
        count = None
        if self.training:
            training = True
            if self.track_running_stats:
                count = self.num_batches_tracked
            else:
                running_mean = running_var = None
        else:
            training = running_mean is None and running_var is None
        if momentum is None:
            # The average over all batches, this one included.
            momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
        y = batch_norm(
            input,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=self.eps,
            backend=self.backend,
        )
        if count is not None:
            count.add_(1)
        return y

    def extra_repr(self) -> str:
        """Returns torch's description of the module, and the backend."""
        return f"{super().extra_repr()}, backend={self.backend}"


class BatchNorm1d(_BackendMixin, nn.BatchNorm1d):
    """Batch Normalization of (N, C) or (N, C, L); see `BatchNorm2d` for the arguments."""


class BatchNorm2d(_BackendMixin, nn.BatchNorm2d):
    """Batch Normalization of (N, C, H, W).

        y = (x - mean) / sqrt(var + eps) * weight + bias

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
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Raises:
        ValueError: an argument outside its range.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """


class BatchNorm3d(_BackendMixin, nn.BatchNorm3d):
    """Batch Normalization of (N, C, D, H, W); see `BatchNorm2d` for the arguments."""
