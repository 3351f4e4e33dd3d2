"""A network of torch's own BatchNorm layers, and a run of it that can be repeated exactly.

As a script, `python boring.py STRATEGY FOLDER VARIANT...`, it fits each variant on two processes;
rank 0 leaves its losses and the classes of the layers in FOLDER, in JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FIT_WARNINGS = [
    # Lightning 2.6 uses a class that torch 2.13 has deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
]
"""The marks of tests that fit these networks."""


class Block(nn.Module):
    """A basic residual block with one ReLU module for both of its activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Boring(LightningModule):
    """Lightning's BoringModel with something to normalise: (N, 4, 6) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(4, 5, 3, bias=False), nn.BatchNorm1d(5), nn.ReLU())
        self.block = Block(5)
        self.head = nn.Linear(5, 3)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.features(x)).mean(2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def loader(shuffle: bool = False, samples: int = 48, workers: int = 0) -> DataLoader:
    """Batches of 8, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 4, 6, generator=generator) * 2 + 1
    y = torch.randint(3, (samples,), generator=generator)
    order = torch.Generator().manual_seed(6) if shuffle else None
    data = TensorDataset(x, y)
    return DataLoader(data, 8, shuffle=shuffle, generator=order, num_workers=workers)


def boring(network: type[Boring] = Boring) -> Boring:
    """The same weights in every call."""
    seed_everything(3, verbose=False)
    return network()


def trainer(folder: str | Path, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **options})


def classes(module: nn.Module) -> dict[str, str]:
    """Name of each submodule -> its class."""
    return {
        name: f"{type(child).__module__}.{type(child).__qualname__}"
        for name, child in module.named_modules()
    }


class Report(Callback):
    """Writes what rank 0 saw to a file: spawned processes keep their memory to themselves."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            content = {"losses": pl_module.losses, "during": classes(pl_module)}
            Path(self.path).write_text(json.dumps(content))


def main(strategy: str, folder: str, *variants: str) -> None:
    """Fits each variant, "plain", "fused" or "fused+sync", on two processes."""
    from bn_lightning import FusedBatchNorm, FusedSyncBatchNorm

    torch.set_num_threads(1)
    for variant in variants:
        module = boring()
        before = classes(module)
        callbacks = [FusedBatchNorm()] if "fused" in variant else []
        run = trainer(
            folder,
            [Report(f"{folder}/{variant}.json"), *callbacks],
            plugins=[FusedSyncBatchNorm()] if "sync" in variant else [],
            strategy=strategy,
            devices=2,
            max_epochs=2,
        )
        run.fit(module, loader())
        Path(folder, f"{variant}.after.json").write_text(json.dumps(classes(module) == before))


if __name__ == "__main__":
    main(*sys.argv[1:])
