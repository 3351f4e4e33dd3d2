"""StepsToAccuracy: the first step at which validation reaches an accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from bn_lightning.callbacks import RunCheckpoints, StepsToAccuracy
from bn_lightning.data.batches import TensorBatches
from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.metrics_csv import read_metrics

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning warns when a resumed run reuses a folder.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty.*"),
]

NAME = "val/steps_to_72.2"


class Scripted(LightningModule):
    """Validates with given accuracies, by optimizer step."""

    def __init__(self, accuracies: dict[int, float]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.accuracies = accuracies

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", self.accuracies.get(self.global_step, 0.0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    accuracies: dict[int, float],
    callback: StepsToAccuracy,
    max_steps: int = 7,
    **options: Any,
) -> Trainer:
    batches = TensorBatches(torch.randn(8, 2), torch.zeros(8), 2)  # four steps an epoch
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback, RunCheckpoints(folder, "val/accuracy", "max")],
        logger=MetricsCSVLogger(folder),
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **options},
    )
    ckpt_path = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
    trainer.fit(Scripted(accuracies), batches, batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def watching(threshold: float = 0.722) -> StepsToAccuracy:
    return StepsToAccuracy(threshold, "val/accuracy")


@pytest.mark.parametrize(
    ("accuracies", "step"),
    [({1: 0.721, 3: 0.722, 4: 0.9}, 3), ({7: 0.8}, 7), ({5: 0.8, 6: 0.1}, 5)],
    ids=["first", "last_step", "lost_again"],
)
def test_the_first_validation_that_reaches_it(
    tmp_path: Path, accuracies: dict[int, float], step: int
) -> None:
    trainer = fit(tmp_path, accuracies, watching())
    assert trainer.callback_metrics[NAME] == step
    assert read_metrics(tmp_path)[NAME][-1][1] == step


def test_never_reached(tmp_path: Path) -> None:
    trainer = fit(tmp_path, {1: 0.7219}, watching())
    assert NAME not in trainer.callback_metrics
    assert NAME not in read_metrics(tmp_path)


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    fit(tmp_path, {2: 0.8}, watching(), max_steps=3)
    trainer = fit(tmp_path, {6: 0.9}, watching())
    assert trainer.callback_metrics[NAME] == 2


def test_a_sanity_check_does_not_count(tmp_path: Path) -> None:
    trainer = fit(tmp_path, {0: 0.9, 5: 0.8}, watching(), num_sanity_val_steps=1)
    assert trainer.callback_metrics[NAME] == 5


@pytest.mark.parametrize(
    ("threshold", "name"), [(0.5, "val/steps_to_50"), (0.999, "val/steps_to_99.9")], ids=str
)
def test_the_name_contains_the_threshold(threshold: float, name: str) -> None:
    assert watching(threshold).name == name
    assert StepsToAccuracy(threshold, "accuracy").name == name.removeprefix("val/")


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, 72.2, float("nan")], ids=str)
def test_a_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"`threshold`.*\(0, 1\]"):
        watching(threshold)


def test_an_accuracy_that_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`monitor`.*val/accuracy, got 'test/acc'"):
        fit(tmp_path, {}, StepsToAccuracy(0.5, "test/acc"))
