"""Every experiment of conf/experiment, on data at hand: run, resumed, evaluated, swept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig, OmegaConf

from bn_lightning.evaluate import evaluate
from bn_lightning.models.initialization import initialize
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.train import train

register()  # before Hydra looks for configurations

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

EXPERIMENTS = sorted(
    path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml")
)

# What lets an experiment run here in a second. One without a line runs on the digits, as it is.
DIGITS = ("data=digits",)
FEW_CHANNELS = (*DIGITS, "model.network.channels=[4,8]")
# What image folders have and the digits have not; tests/bn_lightning/test_image_experiments.py runs
# the same on a folder.
ONE_CHANNEL = (*DIGITS, "model.network.in_channels=1")
NOT_OF_DIGITS = ("~data.photometric", "~data.shuffle")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "cifar_resnet": (*ONE_CHANNEL, "model.network.depth=8", "optimizer.lr=0.01"),
    "imagenet_inception": (*ONE_CHANNEL, *NOT_OF_DIGITS, "data.batch_size=4"),
    "mnist_cnn": FEW_CHANNELS,
    "mnist_cnn_source": FEW_CHANNELS,
    "placement": ("scheduler.T_max=20",),  # not max_steps, which a resumed run may raise
}

TWENTY_STEPS = (
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "callbacks.activation_percentiles.probe_size=20",
    "callbacks.activation_percentiles.points=2",
    "extras.figures=false",
)


@pytest.fixture(autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def composed(folder: Path, experiment: str, *overrides: str) -> DictConfig:
    here = OVERRIDES.get(experiment, DIGITS)
    return compose(
        "train",
        [
            f"+experiment={experiment}",
            f"paths.output_dir={folder}",
            *here,
            *TWENTY_STEPS,
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("imagenet_inception", "cifar_resnet")
        else name
        for name in EXPERIMENTS
    ],
)
def test_it_runs_goes_on_and_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], experiment: str
) -> None:
    run = tmp_path / "run"
    train(composed(run, experiment, "trainer.max_steps=10"))
    outcome = train(composed(run, experiment, "ckpt_path=last"))
    record = read_run(run)
    assert (record["status"], record["steps"], record["resumed_at"]) == ("completed", 20, [10])
    assert record["config"]["task_name"] == experiment
    assert [step for step, _ in read_metrics(run)["val/accuracy"]] == [10, 20]
    printed = capsys.readouterr().out
    assert ("│   20 │" in printed) is record["config"]["extras"]["step_table"]
    overrides = [f"ckpt_path={run}/checkpoints/last.ckpt", f"paths.output_dir={tmp_path}/again"]
    (tmp_path / "again").mkdir()
    metrics = evaluate(compose("evaluate", overrides))
    assert metrics == {name: outcome[name] for name in metrics}
    assert "test/loss (log loss)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_norm_changes_nothing_but_normalisation(tmp_path: Path, experiment: str) -> None:
    """The arms start from the same weights, and one of them has no normalisation at all."""
    arms = []
    for norm in ("batch", "torch", "none"):
        config = composed(tmp_path, experiment, f"norm={norm}")
        network = instantiate(config.model).network
        initialize(network, instantiate(config.init), config.seed)
        arms.append(network)
    *normalised, plain = arms
    assert not list(plain.buffers())
    for network in normalised:
        assert list(network.buffers())
        weights = network.state_dict()
        for name, weight in plain.state_dict().items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_takes_a_sweep_of_learning_rates(tmp_path: Path, experiment: str) -> None:
    names = [f"+experiment={experiment}", "+sweep=lr", f"paths.output_dir={tmp_path}"]
    config = compose(
        "train", [*names, "optimizer.lr=0.0316", "norm=none"], return_hydra_config=True
    )
    assert "optimizer.lr" in config.hydra.sweeper.params
    # The sweep chooses by validation, which therefore comes within its budget.
    assert config.trainer.val_check_interval <= config.trainer.max_steps == 2000
    del config.hydra
    OmegaConf.resolve(config)
    optimizer: Any = instantiate(config.optimizer)([torch.zeros(1, requires_grad=True)])
    assert optimizer.param_groups[0]["lr"] == 0.0316
