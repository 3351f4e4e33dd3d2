"""Fuses every BatchNorm of an existing residual network with one line, `callbacks=[...]`.

python examples/swap_resnet.py [--max-steps 100]

100 steps take 9 s on one core of an AMD EPYC, with torch 2.13.
"""

import argparse
from functools import partial

import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn

from bn_lightning import Classifier, FusedBatchNorm
from bn_lightning.data import DigitsDataModule

SECONDS_PER_STEP = 0.04  # on one core of an AMD EPYC with torch 2.13; imports take 5 s


class Block(nn.Module):
    """A basic residual block; nothing in it depends on bn_lightning."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def resnet(channels: int = 16, blocks: int = 2, classes: int = 10) -> nn.Sequential:
    """Return a residual network for images (N, 1, 28, 28)."""
    stem = [nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels)]
    body = [nn.ReLU(), *(Block(channels) for _ in range(blocks))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*stem, *body, *head)


def main() -> None:
    """Train it fused on the digits, then test the reverted network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=100)
    max_steps = parser.parse_args().max_steps
    seconds = 5 + SECONDS_PER_STEP * max_steps
    print(f"{max_steps:,} steps of 60 digits: about {seconds:.0f} s on one CPU core", flush=True)

    seed_everything(1, verbose=False)
    model = Classifier(resnet(), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    data = DigitsDataModule(60, eval_batch_size=360, validation_fraction=0.1, seed=1)
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[FusedBatchNorm()],
    )
    trainer.fit(model, data)
    trainer.test(model, data)
    print(f"after the run: {type(model.network[1]).__module__}.{type(model.network[1]).__name__}")


if __name__ == "__main__":
    main()
