"""BatchNorms with the names and the structure of those of other packages.

They are like those of timm, torchvision, detectron2, transformers and inplace_abn, which the fast
tests do not have; tests/zoo runs the originals.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: dropout and activation follow."""

    def __init__(self, channels: int, drop: nn.Module, act: nn.Module, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: all four tensors are buffers."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return input * scale[:, None, None] + shift[:, None, None]


class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):
    """transformers' copies: eps is written in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight / torch.sqrt(self.running_var + 1e-5)
        shift = self.bias - self.running_mean * scale
        return input * scale[:, None, None] + shift[:, None, None]


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def detectron2_frozen(channels: int) -> nn.Module:
    class FrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        """detectron2's: the output has the dtype of the input."""

        def forward(self, input: Tensor) -> Tensor:
            state = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(input, *state, training=False, eps=1e-5)

    return FrozenBatchNorm2d(channels)


class ABN(nn.Module):
    """inplace_abn's: not a subclass of torch's, and it counts no batches."""

    def __init__(self, channels: int, activation: str = "leaky_relu", param: float = 0.2) -> None:
        super().__init__()
        self.eps, self.momentum = 1e-4, 0.3
        self.activation, self.activation_param = activation, param
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.rand(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        state = self.running_mean, self.running_var, self.weight, self.bias
        y = F.batch_norm(input, *state, self.training, self.momentum, self.eps)
        if self.activation == "elu":
            return F.elu_(y, self.activation_param)
        return F.leaky_relu_(y, self.activation_param)


class Renamed(nn.BatchNorm2d):
    """A subclass with torch's forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)


class AnyRank(nn.modules.batchnorm._BatchNorm):
    """Its own check of the input, as in packages of sparse convolutions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass
