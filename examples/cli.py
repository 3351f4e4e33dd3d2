"""Uses this package's callback and plugin with LightningCLI, chosen in YAML, without Hydra.

    python examples/cli.py fit --config examples/cli.yaml [--trainer.max_steps 100]

Needs `pip install "jsonargparse[signatures]"`, as LightningCLI does.
"""

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.data import DigitsDataModule


class ConvNet(LightningModule):
    """A network of torch's own layers; nothing in it depends on bn_lightning."""

    def __init__(self, channels: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * 36, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        return F.cross_entropy(self.network(x), target)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, target = batch
        self.log("val/accuracy", (self.network(x).argmax(1) == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    LightningCLI(ConvNet, DigitsDataModule)
