"""Stacks trained by `train_stack`, against `bn_lightning.train` of the same configurations."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from bn_lightning.models.classifier import Classifier
from bn_lightning.models.mlp import MLP
from bn_lightning.runs.checkpoint import TrainedCheckpoint, load_checkpoint
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.stack.evaluation import evaluate_one, evaluate_stack
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.stackable import stack_key
from bn_lightning.stack.training import train_stack
from bn_lightning.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

# 21 batches an epoch, so that 32 steps cross epochs; a validation is not at the end.
SHORT = [
    "+experiment=mnist_bn",
    "data=digits",
    "+callbacks=[steps_to_accuracy,early_stopping]",
    "callbacks.steps_to_accuracy.threshold=0.5",
    "callbacks.early_stopping.patience=1",
    "callbacks.early_stopping.min_delta=0.05",
    "callbacks.activation_percentiles.points=4",
    "callbacks.activation_percentiles.probe_size=50",
    "trainer.max_steps=32",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=5",
    "extras.figures=false",
]


def composed(directory: Path, *overrides: str):
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        return compose("train", [*SHORT, f"paths.output_dir={directory}", *overrides])


def train_both(folder: Path, shared: list[str], members: list[list[str]]):
    """Directories of the stack's members and of the single runs, and the outcomes of both."""
    pairs = [(folder / f"stack{k}", folder / f"single{k}") for k in range(len(members))]
    configs = [composed(pairs[k][0], *shared, *own) for k, own in enumerate(members)]
    outcomes = train_stack(configs)
    singles = [train(composed(pairs[k][1], *shared, *own)) for k, own in enumerate(members)]
    return pairs, outcomes, singles


@pytest.fixture(scope="module")
def relu_arms(tmp_path_factory):
    """Without BatchNorm: one member ends its budget, one diverges, two stop early together."""
    members = [
        ["seed=1", "optimizer.lr=1"],
        ["seed=1", "optimizer.lr=0.1", "init=he"],
        ["seed=2", "optimizer.lr=100", "init.std=0.3"],
        ["seed=2", "optimizer.lr=0.3"],
    ]
    shared = ["norm=none", "model.network.activation=relu"]
    return train_both(tmp_path_factory.mktemp("relu"), shared, members)


def same_numbers(found, expected, tolerance):
    """Compare nested numbers; NaN is equal to NaN."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            both_nan = math.isnan(value) and math.isnan(found[name])
            assert both_nan or math.isclose(found[name], value, rel_tol=tolerance, abs_tol=1e-6)
        else:
            assert found[name] == value, name


def test_outcomes_are_those_of_single_runs(relu_arms):
    _, outcomes, singles = relu_arms
    assert ["stop_reason" in outcome for outcome in outcomes] == [True, False, False, True]
    assert [outcome["diverged"] for outcome in outcomes] == [False, False, True, False]
    assert 1 < outcomes[2]["diverged_at"] < 32
    for found, expected in zip(outcomes, singles, strict=True):
        same_numbers(found, expected, 1e-4)


@pytest.mark.parametrize("member", range(4))
def test_a_resumed_run_knows_whether_it_has_diverged(relu_arms, member):
    last = [load_checkpoint(str(d / "checkpoints/last.ckpt")) for d in relu_arms[0][member]]
    found, expected = (checkpoint["callbacks"]["DivergenceGuard"] for checkpoint in last)
    assert found == expected
    assert found["diverged_at"] == relu_arms[1][member].get("diverged_at")


@pytest.mark.parametrize("member", range(4))
def test_files_are_those_of_single_runs(relu_arms, member):
    (stacked, single), *_ = [relu_arms[0][member]]
    names = [sorted(p.relative_to(d) for p in d.rglob("*")) for d in (stacked, single)]
    assert names[0] == names[1]
    found, expected = read_metrics(stacked), read_metrics(single)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [torch.tensor([value for _, value in p]) for p in (found[name], points)]
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-5, equal_nan=True)
    record, alone = read_run(stacked), read_run(single)
    assert record["stack"] == {"size": 4, "index": member}
    assert record.keys() == alone.keys() | {"stack"}
    for key in ("status", "steps", "seed", "data", "resumed_at", "versions", "hardware", "commit"):
        assert record[key] == alone[key], key
    assert record["seconds"] > 0 and record["steps_per_second"] > 0


def test_checkpoints_are_taken_like_any_other(relu_arms):
    for member, (stacked, single) in enumerate(relu_arms[0]):
        for name in ("best.ckpt", "last.ckpt"):
            path, other = (str(d / "checkpoints" / name) for d in (stacked, single))
            checkpoint, expected = load_checkpoint(path), load_checkpoint(other)
            assert checkpoint["global_step"] == expected["global_step"], (member, name)
            weights = TrainedCheckpoint.read(path, []).build_model().state_dict()
            for key, value in expected["state_dict"].items():
                torch.testing.assert_close(
                    weights[key], value, rtol=1e-3, atol=1e-4, equal_nan=True
                )


def test_members_share_the_time(relu_arms):
    directories = [stacked for stacked, _ in relu_arms[0]]
    seconds = [read_run(directory)["seconds"] for directory in directories]
    assert seconds[1] > seconds[0] == seconds[3] > seconds[2]


def test_a_run_without_checkpoints_and_logs(config, tmp_path):
    bare = {**config, "callbacks": {}, "logger": {}}
    bare["trainer"] = {**bare["trainer"], "max_steps": 2}
    train_stack([changed(bare, "paths.output_dir", str(tmp_path / str(k))) for k in (0, 1)])
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["run.json"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A resolved configuration, for changes by `changed`."""
    directory = tmp_path_factory.mktemp("config")
    return OmegaConf.to_container(composed(directory), resolve=True)


def changed(config, key, value):
    """A copy of a configuration with another value, added if the key is new."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.precision", "16-mixed"),
        ("trainer.accumulate_grad_batches", 2),
        ("trainer.val_check_interval", 0.5),
        ("trainer.check_val_every_n_epoch", 1),
        ("trainer.devices", 2),
        ("trainer.profiler", "simple"),
        ("callbacks.own", {"_target_": "my_package.Callback"}),
        ("logger.tensorboard", {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}),
        ("ckpt_path", "some.ckpt"),
        ("model.compile", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stacked_is_named(config, key, value):
    with pytest.raises(NotStackableError, match=key):
        stack_key(changed(config, key, value))


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [
        ("seed", 2, True),
        ("data.seed", 2, True),
        ("init", None, True),
        ("optimizer.lr", 3, True),
        ("model.optimizer.lr", 3, True),
        ("optimizer.nesterov", True, False),
        ("optimizer._target_", "torch.optim.Adam", False),
        ("model.network.norm", None, False),
        ("model.network.widths", [3], False),
        ("trainer.max_steps", 3, False),
        ("data.batch_size", 3, False),
        ("extras.num_threads", 2, False),
    ],
)
def test_what_runs_of_a_stack_may_differ_in(config, key, value, is_same):
    assert (stack_key(changed(config, key, value)) == stack_key(config)) == is_same


@pytest.mark.parametrize(
    ("directories", "steps", "is_same"),
    [(("37", "53"), (37, 53), False), (("a", "SGD"), (5, 5), True)],
    ids=["a_number", "a_part_of_names"],
)
def test_directories_are_told_from_what_is_named_alike(config, directories, steps, is_same):
    runs = [
        changed(changed(config, "paths.output_dir", name), "trainer.max_steps", number)
        for name, number in zip(directories, steps, strict=True)
    ]
    assert (stack_key(runs[0]) == stack_key(runs[1])) == is_same


def test_dropout_may_differ(config):
    half, whole = (changed(config, "model.network.dropout", p) for p in (0.5, 1))
    assert stack_key(half) == stack_key(whole) != stack_key(config)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.optimizer", {"_target_": "torch.optim.RMSprop", "_partial_": True}, "RMSprop"),
        ("model._target_", "test_training.OwnStep", "training_step"),
        ("model.network._target_", "test_training.Counting", "calls"),
        ("model.network._target_", "test_training.Branching", "vmap"),
        ("model.network._target_", "test_training.Random", "vmap"),
    ],
    ids=["optimizer", "module", "counter", "branch", "random"],
)
def test_what_is_built_and_cannot_be_stacked_is_named(
    config, tmp_path, monkeypatch, key, value, named
):
    monkeypatch.setitem(sys.modules, "test_training", sys.modules[__name__])
    configs = []
    for seed in (1, 2):
        own = changed(changed(config, key, value), "seed", seed)
        configs.append(changed(own, "paths.output_dir", str(tmp_path / str(seed))))
    with pytest.raises(NotStackableError, match=named):
        train_stack(configs)
    assert not list(tmp_path.glob("*/run.json"))


class OwnStep(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class Counting(MLP):
    """Keeps a number that no stack can hold for each member."""

    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Branching(MLP):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Random(MLP):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.rand_like(y)


def test_runs_that_differ_otherwise_are_refused(config):
    with pytest.raises(NotStackableError, match="differ"):
        train_stack([config, changed(config, "model.network.norm", None)])


def test_all_members_may_diverge_at_once(config, tmp_path):
    shared = changed(config, "model.optimizer.lr", 1e30)
    shared = changed(shared, "model.network.norm", None)
    shared = changed(shared, "model.network.activation", "relu")
    shared["callbacks"] = {"guard": config["callbacks"]["divergence_guard"]}
    configs = [changed(shared, "paths.output_dir", str(tmp_path / str(k))) for k in (0, 1)]
    outcomes = train_stack(configs)
    assert [outcome["diverged_at"] for outcome in outcomes] == [2, 2]
    assert read_run(tmp_path / "0")["status"] == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared",
    [
        ["norm=batch"],
        ["norm=batch", "optimizer=adam", "trainer.gradient_clip_val=0.5"],
        ["norm=none", "trainer.gradient_clip_val=-1"],
        [
            "optimizer=momentum",
            "+scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true,"
            " step_size: 10, gamma: 0.5}",
        ],
        pytest.param(
            ["model=cnn", "model.network.dropout=0.5", "optimizer=adagrad", "data.batch_size=30"],
            marks=pytest.mark.soak,
        ),
    ],
    ids=["norm", "adam_clipped", "not_clipped", "momentum_scheduled", "cnn_dropout"],
)
def test_other_runs_in_double_precision(tmp_path, shared):
    shared = [*shared, "trainer.precision=64-true", "callbacks.activation_percentiles=null"]
    members = [["seed=1", "optimizer.lr=0.01"], ["seed=1", "optimizer.lr=0.1"], ["seed=2"]]
    pairs, outcomes, singles = train_both(tmp_path, shared, members)
    for (stacked, single), found, expected in zip(pairs, outcomes, singles, strict=True):
        same_numbers(found, expected, 1e-6)
        last = (d / "checkpoints" / "last.ckpt" for d in (stacked, single))
        weights, others = (load_checkpoint(path)["state_dict"] for path in last)
        for key, value in others.items():
            # Adam makes a step of the rate out of a gradient that is nothing but rounding.
            limit = 1e-6 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(weights[key], value, rtol=0, atol=limit)


def test_mixed_precision_is_the_trainers(tmp_path):
    """A member follows its own run as closely as bf16 can, and closer than a run in fp32 does."""
    shared = ["norm=batch", "trainer.max_steps=6", "trainer.val_check_interval=6"]
    shared += ["callbacks.early_stopping=null", "trainer.log_every_n_steps=1"]
    members = [["seed=1", "optimizer.lr=0.1"], ["seed=2", "optimizer.lr=0.5"]]
    mixed = [*shared, "trainer.precision=bf16-mixed"]
    pairs, _, _ = train_both(tmp_path, mixed, members)
    for k, (stacked, single) in enumerate(pairs):
        full = tmp_path / f"full{k}"
        train(composed(full, *shared, *members[k]))
        losses = [dict(read_metrics(d)["train/loss"]) for d in (stacked, single, full)]
        found, expected, other = (torch.tensor([*of.values()]) for of in losses)
        assert (found[0] - expected[0]).abs() < 1e-3 * expected[0]
        assert (expected[0] - other[0]).abs() > 0
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
        validated = [read_metrics(d)["val/loss"][0][1] for d in (stacked, single)]
        assert validated[0] == pytest.approx(validated[1], rel=2e-2)
        saved = load_checkpoint(str(stacked / "checkpoints" / "last.ckpt"))["state_dict"]
        assert {w.dtype for w in saved.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("evaluate", [evaluate_stack, evaluate_one])
def test_metrics_need_not_be_on_the_device_of_the_network(monkeypatch, evaluate):
    """On a GPU those of a stack stay on the CPU; here the other device is one without memory."""
    devices = []
    monkeypatch.setattr(
        Classifier,
        "update_metrics",
        lambda model, name, *tensors: devices.extend(tensor.device.type for tensor in tensors),
    )
    network = MLP(3, [4], 2, "relu", None, "before")
    model = Classifier(network, torch.optim.SGD, num_classes=2)
    model.evaluations.to("meta")
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    whole = {evaluate_stack: (StackedNetwork([network]), [model]), evaluate_one: (model,)}
    evaluate(*whole[evaluate], "val", batches)
    assert devices == ["meta", "meta"]


@pytest.mark.parametrize("curve", [True, False], ids=["with_test_curve", "without"])
def test_what_the_last_validation_has_measured_is_not_measured_again(tmp_path, monkeypatch, curve):
    measured = []

    def evaluate(network, models, name, batches):
        measured.append(name)
        evaluate_stack(network, models, name, batches)

    monkeypatch.setattr("bn_lightning.stack.training.evaluate_stack", evaluate)
    shared = ["trainer.max_steps=2", "trainer.val_check_interval=2", f"data.test_curve={curve}"]
    members = [composed(tmp_path / seed, *shared, f"seed={seed}") for seed in "12"]
    outcomes = train_stack(members)
    assert measured == ["val", "test"]
    for seed, outcome in zip("12", outcomes, strict=True):
        logged = read_metrics(tmp_path / seed)["test/accuracy"]
        assert logged == [(2, outcome["test/accuracy"])]
