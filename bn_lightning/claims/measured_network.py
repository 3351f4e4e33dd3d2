"""What a measure sees: a network before or after training, with its data and its run."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bn_lightning.data.batches import Batches
from bn_lightning.models.initialization import initialize_as_configured
from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.directory import LAST
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.stack.seed_batches import loaded_data


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network of one arm, setting and seed.

    Attributes:
        config: of its run, resolved.
        directory: of its run; None for a network that was not trained.
        metrics: of its run, {} for a network that was not trained.
    """

    config: dict[str, Any]
    directory: Path | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of the weights and the batches."""
        return self.config["seed"]

    def model(self) -> Any:
        """Build the LightningModule: with the weights of the end of its run, else initial ones."""
        from hydra.utils import instantiate

        torch.manual_seed(self.seed)
        model = instantiate(self.config["model"])
        if self.directory is not None:
            model.load_state_dict(load_checkpoint(self.directory / LAST)["state_dict"])
            return model
        scheme = None if self.config.get("init") is None else instantiate(self.config["init"])
        initialize_as_configured(model.network, scheme, self.seed)
        return model

    def data(self) -> Any:
        """Return the data module, set up, whose training batches are those of the seed."""
        datamodule = copy.copy(loaded_data(self.config["data"]))
        if hasattr(datamodule, "seed"):
            datamodule.seed = self.seed
        return datamodule

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs (size, ...) and targets (size,) of the training set, fewer if it ends."""
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        for x, target in self.data().train_dataloader():
            inputs.append(x)
            targets.append(target)
            if sum(map(len, targets)) >= size:
                break
        return torch.cat(inputs)[:size], torch.cat(targets)[:size]

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of the first training batches of a run."""
        loader = self.data().train_dataloader()
        for epoch in itertools.count():
            if isinstance(loader, Batches):
                loader.set_epoch(epoch)
            for batch in loader:
                if steps == 0:
                    return
                steps -= 1
                yield batch

    def history(self, name: str) -> Sequence[tuple[int, float]]:
        """Return (step, value) pairs of a metric that the run logged, [] if it did not."""
        if self.directory is None:
            return []
        return read_metrics(self.directory).get(name, [])
