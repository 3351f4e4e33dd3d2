"""Every configuration composes and instantiates."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hydra_plugins.bn_optuna import register
from omegaconf import OmegaConf, open_dict
from torch import nn

import bn_lightning.train  # noqa: F401  registers the resolvers
from bn_lightning.sweeps.engine.sampling import SamplingPlan, make_pruner
from bn_lightning.sweeps.engine.space import parse_space, to_overrides

register()  # before Hydra looks for configurations

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra", "paths", "sweep", "variant")
    and path.stem != "default"
)


SWEEPS = {"lr_init": 1980, "edges": 594, "schemes": 1320, "lr": 66, "quick": 24, "tuned": 50}


@pytest.fixture(autouse=True)
def conf(tmp_path, monkeypatch):
    # A server that is asked nothing: the tables of a database would take seconds to make.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
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
    config, resolved = composed(tmp_path, option, f"paths.log_dir={tmp_path}")
    group = option.partition("=")[0]
    on_gpu = group == "trainer" and "gpu" in str(resolved["trainer"]["accelerator"])
    if on_gpu and not torch.cuda.is_available():
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


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_the_sweep_of_learning_rates(tmp_path, experiment):
    overrides = [f"+experiment={experiment}", "+sweep=lr"]
    config = compose("train", overrides, return_hydra_config=True)
    assert config.trainer.max_steps == 2000
    space = parse_space(OmegaConf.to_container(config.hydra.sweeper.params), [])
    plan = SamplingPlan(config.hydra.sweeper.sampler, space, None)
    for slot in (0, plan.n_trials - 1):
        params = plan.point(slot).params
        trial, resolved = composed(tmp_path, *overrides, *to_overrides(params))
        assert trial.optimizer.lr == params["optimizer.lr"] and trial.seed == params["seed"]
        assert (resolved["norm"] is None) == (params["norm"] == "none")


# The networks of section 4.2.2, and what 4.2.1 changes: rate, normalised, L2 weight, steps from one
# decay to the next, dropout, local response normalisation, activation, distortion, order.
VARIANTS = {
    "inception": (0.0015, False, 2e-4, 320_000, 0.4, True, "relu", 0.5, "batches"),
    "bn_baseline": (0.0015, True, 2e-4, 320_000, 0.4, True, "relu", 0.5, "batches"),
    "bn_x5": (0.0075, True, 4e-5, 53_333, 0.0, False, "relu", 0.25, "samples"),
    "bn_x30": (0.045, True, 4e-5, 53_333, 0.0, False, "relu", 0.25, "samples"),
    "bn_x5_sigmoid": (0.0075, True, 4e-5, 53_333, 0.0, False, "sigmoid", 0.25, "samples"),
}


def test_every_variant_is_known():
    assert {path.stem for path in (CONF / "variant").glob("*.yaml")} == set(VARIANTS)


@pytest.mark.parametrize(("variant", "values"), VARIANTS.items(), ids=VARIANTS)
def test_the_variants_of_inception(tmp_path, variant, values):
    config, _ = composed(tmp_path, "+experiment=imagenet_inception", f"variant={variant}")
    network = config.model.network
    assert values == (
        config.optimizer.lr,
        config.norm is not None,
        config.optimizer.weight_decay,
        config.scheduler.step_size,
        network.dropout,
        network.local_response_norm,
        network.activation,
        config.data.photometric,
        config.data.shuffle,
    )
    assert config.data.batch_size == 32
    assert config.optimizer.momentum == 0.9
    # What is typed counts more than what a variant says.
    typed = ["norm=none", "optimizer.lr=0.5"]
    if variant == "inception":
        typed[0] = "norm=torch"
    changed, _ = composed(tmp_path, "+experiment=imagenet_inception", f"variant={variant}", *typed)
    assert (changed.norm is not None) == (variant == "inception")
    assert changed.optimizer.lr == 0.5
    assert changed.model.network.dropout == network.dropout
    instantiate(changed.scheduler)(instantiate(changed.optimizer)([nn.Parameter(torch.zeros(1))]))


def test_a_residual_network_is_the_sources(tmp_path):
    config, _ = composed(tmp_path, "+experiment=cifar_resnet")
    assert config.model.network.depth == 20
    assert (config.data.batch_size, config.trainer.max_steps) == (128, 64_000)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.1, 0.9)
    assert config.optimizer.weight_decay == 1e-4
    optimizer = instantiate(config.optimizer)([nn.Parameter(torch.zeros(1))])
    scheduler = instantiate(config.scheduler)(optimizer)
    assert scheduler.milestones == {32_000: 1, 48_000: 1}
    assert scheduler.gamma == 0.1


@pytest.mark.parametrize("experiment", ["imagenet_inception", "cifar_resnet"])
def test_ways_to_run_are_ordinary_overrides(tmp_path, experiment):
    config, resolved = composed(
        tmp_path,
        f"+experiment={experiment}",
        "trainer=ddp_sim",
        "norm=sync",
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1.0",
        "model.channels_last=true",
        "model.compile=true",
    )
    assert resolved["trainer"]["strategy"] == "ddp"
    config.model.compile = False  # tests/bn_lightning/models/test_classifier.py compiles
    model = instantiate(config.model)
    convolutions = [m for m in model.network.modules() if isinstance(m, nn.Conv2d)]
    assert all(
        conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions
    )
    default, _ = composed(tmp_path, f"+experiment={experiment}")
    assert default.trainer.gradient_clip_val is None


@pytest.mark.parametrize(
    ("overrides", "directory"),
    [
        (["+sweep=quick"], "logs/mnist_bn/sweeps/quick"),
        (["+sweep=quick", "hydra.sweep.dir=there"], "there"),
        (["hydra/sweeper=bn_optuna", "hydra.sweeper.study_name=mine"], "logs/mnist_bn/sweeps/mine"),
    ],
    ids=["default", "typed", "without_a_file"],
)
def test_a_sweep_is_where_hydra_says(overrides, directory):
    config = compose("train", ["+experiment=mnist_bn", *overrides], return_hydra_config=True)
    with open_dict(config):
        config.hydra.job.num = 7
    assert config.hydra.sweeper.dir == config.hydra.sweep.dir == directory
    assert config.hydra.sweep.subdir == "7"


def test_another_multirun_is_named_by_its_time():
    config = compose("train", ["+experiment=mnist_bn"], return_hydra_config=True)
    assert config.hydra.sweep.dir.startswith("logs/mnist_bn/multiruns/20")


def test_every_sweep_is_known():
    assert {path.stem for path in (CONF / "sweep").glob("*.yaml")} == set(SWEEPS)


@pytest.mark.parametrize(("name", "n_trials"), SWEEPS.items())
def test_sweeps(tmp_path, name, n_trials):
    """The number of trials, and that the first and the last one can be built."""
    overrides = ["+experiment=mnist_bn", f"+sweep={name}"]
    config = compose("train", overrides, return_hydra_config=True)
    sweeper = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    assert sweeper["metric"] == "val/accuracy"
    assert sweeper["direction"] == "maximize"
    make_pruner(sweeper["pruner"])
    space = parse_space(sweeper["params"], [])
    plan = SamplingPlan(sweeper["sampler"], space, sweeper["n_trials"])
    assert plan.n_trials == n_trials
    for slot in (0, n_trials - 1):
        params = plan.point(slot).params or {"optimizer.lr": 0.5, "init.std": 1.0}
        trial, _ = composed(tmp_path, *overrides, *to_overrides(params))
        instantiate(trial.model)
        instantiate(trial.init)
