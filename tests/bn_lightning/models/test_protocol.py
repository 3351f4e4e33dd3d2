"""The contract of models: this package's own fulfil it, and others are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from bn_lightning import Classifier, landscape, train
from bn_lightning.models.protocol import (
    ChanceModel,
    LossModel,
    ModelError,
    NetworkModel,
    check_model,
    network_of,
)

pytestmark = pytest.mark.usefixtures("empty_pictures")

FIT_AND_TEST = ("training_step", "configure_optimizers", "test_step")


def test_the_packages_own_model() -> None:
    network = nn.Linear(2, 3)
    model = Classifier(network, torch.optim.SGD, num_classes=3)
    for protocol in (NetworkModel, LossModel, ChanceModel):
        assert isinstance(model, protocol)
    check_model(model, *FIT_AND_TEST, "loss")
    assert network_of(model) is network


def test_a_plain_model() -> None:
    model = BoringModel()
    check_model(model, *FIT_AND_TEST)
    assert not isinstance(model, NetworkModel) and not isinstance(model, ChanceModel)
    with pytest.raises(ModelError, match="`network`, got `BoringModel`"):
        network_of(model)


def test_no_model() -> None:
    with pytest.raises(ModelError, match="LightningModule, got `Linear`"):
        check_model(nn.Linear(2, 2))


def test_methods_that_lightning_only_declares_are_missing() -> None:
    class Mine(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ModelError, match="`configure_optimizers`, `test_step`, got `.*Mine`"):
        check_model(Mine(), *FIT_AND_TEST)


MODULE = """
import torch
from lightning import LightningModule
from torch import nn


class Whole(LightningModule):
    def __init__(self, broken=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Sigmoid())
        self.broken = broken

    def training_step(self, batch, batch_idx):
        x, target = batch[:2]
        loss = nn.functional.cross_entropy(self.layers(x), target)
        return loss / (not self.broken or loss * 0)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, target = batch[:2]
        error = (self.layers(x).argmax(1) != target).float().mean()
        self.log("val/error", error, add_dataloader_idx=False)

    def test_step(self, batch, batch_idx):
        x, target = batch[:2]
        self.log("test/accuracy", (self.layers(x).argmax(1) == target).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Untested(Whole):
    test_step = LightningModule.test_step
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of `train`, for a model around no `network` that logs a metric of its own."""
    (tmp_path / "foreign_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "own.yaml").write_text("_target_: foreign_model.Whole\n")
    own = [f"--config-dir={tmp_path / 'conf'}", "model=own", "data=digits", "data.test_curve=false"]
    monitor = ["callbacks.checkpoints.monitor=val/error", "callbacks.checkpoints.mode=min"]
    refused = ["~callbacks.activation_percentiles"]  # it calls `forward`
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
    return [*own, *monitor, *refused, *steps, "hydra.run.dir=run"]


def test_a_model_without_a_network_is_trained(command: Any, arguments: list[str]) -> None:
    result = command(train.main, *arguments)
    assert (result.code, "test/accuracy" in result.out) == (0, True), result.err
    assert Path("run/checkpoints/best.ckpt").is_file()
    at = ["ckpt_path=run/checkpoints/last.ckpt", "trusted=[foreign_model.]"]
    refused = command(landscape.main, *at)
    assert refused.code == 1
    assert "expected `model` to have `network`, `loss`, got `Whole` without" in refused.err


@pytest.mark.parametrize(
    ("override", "missing"),
    [("model._target_=foreign_model.Untested", "test_step"), ("init=he", "network")],
    ids=["test_step", "init"],
)
def test_train_refuses_what_it_needs_before_it_trains(
    command: Any, arguments: list[str], override: str, missing: str
) -> None:
    result = command(train.main, *arguments, override)
    assert result.code == 1 and result.err.count("\n") == 1
    assert f"expected `model` to have `{missing}`, got `" in result.err
    assert not list(Path.cwd().rglob("*.ckpt")), "nothing was trained"


def test_a_default_callback_refuses_what_it_cannot_call(command: Any, arguments: list[str]) -> None:
    result = command(train.main, *(a for a in arguments if not a.startswith("~")))
    assert result.code == 1
    assert "`forward`" in result.err and "by ~callbacks.activation_percentiles" in result.err


def test_a_divergence_without_metrics_of_guessing(command: Any, arguments: list[str]) -> None:
    result = command(train.main, *arguments, "+model.broken=true")
    assert result.code == 0, result.err
    assert "diverged" in result.out
