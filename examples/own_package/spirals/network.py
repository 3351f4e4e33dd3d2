"""The network."""

from collections.abc import Callable

from torch import Tensor, nn


class SpiralNetwork(nn.Module):
    """Hidden layers of equal width, each normalized before its activation.

    Args:
        width: units of a hidden layer.
        depth: number of hidden layers.
        norm: builds the normalization of a layer from its number of units; None for no
            normalization. The configuration's group `norm` chooses it.
    """

    def __init__(self, width: int, depth: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Linear(2 if i == 0 else width, width))
            if norm is not None:
                layers.append(norm(width))
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map points (N, 2) to logits (N, 2)."""
        return self.layers(x)
