"""The data."""

import math

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = {"train": 2000, "validation": 500, "test": 500}


class SpiralsDataModule(LightningDataModule):
    """Points (N, 2) float32 on two spirals, and the spiral of each, (N,) int64.

    Args:
        batch_size: points in a batch.
        noise: standard deviation of the points around their spiral, whose radius is 1.
        seed: of the points and of the order of the batches.
    """

    input_shape = (2,)  # bn-export reads it
    num_classes = 2

    def __init__(self, batch_size: int, noise: float, seed: int) -> None:
        super().__init__()
        self.batch_size, self.noise, self.seed = batch_size, noise, seed

    def setup(self, stage: str) -> None:
        """Draw the points. Lightning calls it before it asks for a DataLoader."""
        generator = torch.Generator().manual_seed(self.seed)
        self.sets = {name: self._draw(n, generator) for name, n in SAMPLES.items()}

    @property
    def info(self) -> dict[str, object]:
        """What run.json and the report say about the data; optional."""
        return {"source": "spirals", "sha256": {}, **SAMPLES, "classes": 2}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of the training points, in another order in each epoch."""
        order = torch.Generator().manual_seed(self.seed)
        points = self.sets["train"]
        return DataLoader(points, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation points in one batch."""
        return DataLoader(self.sets["validation"], SAMPLES["validation"])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test points in one batch."""
        return DataLoader(self.sets["test"], SAMPLES["test"])

    def _draw(self, samples: int, generator: torch.Generator) -> TensorDataset:
        radius = torch.rand(samples, generator=generator).sqrt()
        spiral = torch.arange(samples) % 2
        angle = 2 * math.pi * radius + math.pi * spiral
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return TensorDataset(
            points + self.noise * torch.randn(samples, 2, generator=generator), spiral
        )
