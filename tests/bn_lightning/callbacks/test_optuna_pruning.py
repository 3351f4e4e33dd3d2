"""OptunaPruning: reported values, pruning, and no effect outside a sweep."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import run_process
import torch
from lightning import LightningModule, Trainer
from optuna.trial import TrialState
from torch import Tensor
from torch.utils.data import DataLoader

from bn_lightning import train
from bn_lightning.callbacks import OptunaPruning
from bn_lightning.sweeps.engine import trial as trial_module
from bn_lightning.sweeps.engine.environment import TRIAL_VARIABLE
from bn_lightning.sweeps.engine.storage import open_storage, storage_url

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning recommends worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Accuracies(LightningModule):
    """Logs the given accuracies, one per validation; the last one repeats."""

    def __init__(self, *accuracies: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.accuracies = list(accuracies)
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        at = min(self.validations, len(self.accuracies) - 1)
        self.log("val/accuracy", self.accuracies[at])
        if not self.trainer.sanity_checking:
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, module: LightningModule, monitor: str = "val/accuracy") -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[OptunaPruning(monitor)],
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    loader = DataLoader([torch.ones(2)] * 5, batch_size=None)
    trainer.fit(module, loader, DataLoader([torch.ones(2)], batch_size=None))
    return trainer


@pytest.fixture
def study(monkeypatch) -> optuna.Study:
    """A study with two good trials, whose median the third must reach from step 8 on."""
    study = optuna.create_study(
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=7),
    )
    for _ in range(2):
        trial = study.ask()
        for step in (5, 10, 15, 20):
            trial.report(0.5, step)
        study.tell(trial, 0.5)
    trial = study.ask()
    monkeypatch.setenv(TRIAL_VARIABLE, str(trial.number))
    monkeypatch.setattr(trial_module, "current_trial", lambda: trial)
    return study


def test_each_validation_is_reported_at_its_step(tmp_path, study):
    trainer = fit(tmp_path, Accuracies(0.625, 0.75, 0.875))
    assert study.trials[2].intermediate_values == {5: 0.625, 10: 0.75, 15: 0.875, 20: 0.875}
    assert trainer.global_step == 20


def test_a_trial_below_the_median_is_pruned_there(tmp_path, study):
    module = Accuracies(0.25, 0.125)
    with pytest.raises(optuna.TrialPruned, match="val/accuracy at step 10"):
        fit(tmp_path, module)
    assert module.validations == 2
    assert study.trials[2].intermediate_values == {5: 0.25, 10: 0.125}


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # in Optuna
def test_nan_is_pruned(tmp_path, study):
    with pytest.raises(optuna.TrialPruned, match="at step 10"):
        fit(tmp_path, Accuracies(float("nan")))


def test_outside_a_sweep_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    assert fit(tmp_path, Accuracies(0.0), monitor="no such metric").global_step == 20


def test_a_metric_that_is_not_logged_is_an_error_that_names_those_that_are(tmp_path, study):
    with pytest.raises(ValueError, match="`monitor`.*got 'val/acc'; there are val/accuracy"):
        fit(tmp_path, Accuracies(0.5), monitor="val/acc")


@pytest.mark.parametrize("trainer", ["cpu", pytest.param("ddp_sim", marks=pytest.mark.soak)])
def test_a_sweep_of_runs_is_pruned(tmp_path, command, trainer):
    """The first trial learns; the learning rate of the second is too small."""
    arguments = [
        *("-m", "+experiment=mnist_bn", "data=digits", f"trainer={trainer}"),
        *("trainer.max_steps=60", "trainer.val_check_interval=20", "extras.figures=false"),
        "optimizer.lr=1.0,1e-6",
        *("hydra/sweeper=bn_optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null"),
        *("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1"),
        "hydra.sweeper.study_name=pruned",
    ]
    if trainer == "cpu":
        assert command(train.main, *arguments).code == 0
    else:  # the ranks run the command again
        run_process.run(tmp_path, *arguments)
    directory = tmp_path / "logs" / "mnist_bn" / "sweeps" / "pruned"
    study = optuna.load_study(
        study_name="pruned", storage=open_storage(storage_url("journal", directory), 5)
    )
    trained, pruned = study.trials
    assert (trained.state, pruned.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert list(trained.intermediate_values) == [20, 40, 60]
    assert list(pruned.intermediate_values) == [20]
    record = json.loads((directory / "1" / "run.json").read_text())
    assert record["status"] == "pruned" and record["steps"] == 20
