"""Every configuration composes and instantiates."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra", "paths", "extras") and path.stem != "default"
)


@pytest.fixture(autouse=True)
def conf(tmp_path):
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        yield


def composed(tmp_path, *overrides):
    config = compose("train", [f"paths.output_dir={tmp_path}", *overrides])
    return config, OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments(tmp_path, experiment):
    config, _ = composed(tmp_path, f"+experiment={experiment}")
    assert config.task_name == experiment
    assert instantiate(config.model).network is not None


@pytest.mark.parametrize("option", OPTIONS)
def test_options(tmp_path, option):
    config, resolved = composed(tmp_path, option)
    group = option.partition("=")[0]
    if group == "trainer" and "gpu" in str(resolved["trainer"]["accelerator"]):
        pytest.importorskip("torch")
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
    if group in ("callbacks", "logger"):
        for node in config[group].values():
            instantiate(node)
    elif config[group] is not None:
        instantiate(config[group])
    instantiate(config.model)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("callbacks=[default]", set()),
        ("callbacks=[default,batch_norm_monitor]", {"batch_norm_monitor"}),
        ("+callbacks=batch_norm_monitor", {"batch_norm_monitor"}),
        (
            "+callbacks=[batch_norm_monitor,precise_batch_norm]",
            {"batch_norm_monitor", "precise_batch_norm"},
        ),
    ],
    ids=["default", "list", "added", "two_added"],
)
def test_callbacks_are_a_list(tmp_path, override, names):
    default, _ = composed(tmp_path)
    config, _ = composed(tmp_path, override)
    assert set(config.callbacks) == set(default.callbacks) | names
    for node in config.callbacks.values():
        instantiate(node)


@pytest.mark.parametrize("override", ["callbacks=none", "callbacks=[none]", "callbacks=[]"])
def test_no_callbacks(tmp_path, override):
    config, _ = composed(tmp_path, override)
    assert len(config.callbacks) == 0


def test_a_callback_is_set_by_its_name(tmp_path):
    config, _ = composed(
        tmp_path,
        "+callbacks=[batch_norm_monitor,precise_batch_norm]",
        "callbacks.batch_norm_monitor.every_n_steps=7",
        "callbacks.precise_batch_norm.when=end",
        "callbacks.divergence_guard.max_loss=4.5",
    )
    callbacks = {name: instantiate(node) for name, node in config.callbacks.items()}
    assert callbacks["batch_norm_monitor"].every_n_steps == 7
    assert callbacks["precise_batch_norm"].when == "end"
    assert callbacks["divergence_guard"].max_loss == 4.5


def test_the_paper_experiment_is_the_paper(tmp_path):
    config, _ = composed(tmp_path, "+experiment=mnist_bn")
    assert config.model.network.widths == [100, 100, 100]
    assert config.model.network.activation == "sigmoid"
    assert config.model.network.norm_position == "before"
    assert config.init.std == 0.05
    assert config.optimizer.lr == 1.0
    assert config.data.batch_size == 60
    assert config.trainer.max_steps == 50_000
