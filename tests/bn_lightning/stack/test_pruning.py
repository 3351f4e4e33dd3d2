"""Stacks whose members are trials of a study, pruned after validations."""

import math

import optuna
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from optuna.pruners import MedianPruner, NopPruner
from optuna.trial import TrialState

from bn_lightning import train_stack
from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import end_sentence, read_run
from bn_lightning.sweeps.engine.rungs import Hyperband, Rungs, SuccessiveHalving

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

# From too small to good, in no order. The last of them diverges, on its way to a validation.
RATES = [0.3, 1e-6, 0.1, 1e-5, 1.0, 1e-4, 1e30]
SHORT = [
    "+experiment=mnist_bn",
    "data=digits",
    "norm=none",
    "model.network.activation=relu",
    "callbacks.activation_percentiles=null",
    "trainer.precision=64-true",
    "trainer.max_steps=40",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=5",
    "extras.figures=false",
]


@pytest.fixture(scope="module")
def config():
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        return compose("train", [*SHORT, "paths.output_dir=???"])


def stack_of(config, folder, pruner):
    """A study, what its trials' stack returned, and the directories of the members."""
    study = optuna.create_study(direction="maximize", pruner=pruner, study_name="rates")
    configs, trials, directories = [], [], []
    for k, rate in enumerate(RATES):
        directories.append(folder / str(k))
        own = {"optimizer": {"lr": rate}, "paths": {"output_dir": str(directories[-1])}}
        configs.append(OmegaConf.merge(config, own))
        trials.append(study.ask())
    return study, train_stack(configs, trials), directories


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return stack_of(config, tmp_path_factory.mktemp("whole"), NopPruner())


@pytest.fixture(
    scope="module",
    params=[
        MedianPruner(n_startup_trials=5),
        SuccessiveHalving(min_resource=10, reduction_factor=2),
        Hyperband(min_resource=10, max_resource=40, reduction_factor=2),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def pruned(request, config, tmp_path_factory):
    return stack_of(config, tmp_path_factory.mktemp("pruned"), request.param)


def test_a_study_without_a_pruner_gets_the_values_only(whole):
    study, outcomes, _ = whole
    assert not any("pruned_at" in outcome for outcome in outcomes)
    for trial, outcome in zip(study.trials[:-1], outcomes[:-1], strict=True):
        assert list(trial.intermediate_values) == [10, 20, 30, 40]
        assert trial.intermediate_values[40] == outcome["val/accuracy"]
    assert outcomes[-1]["diverged_at"] < 10 and not study.trials[-1].intermediate_values


def verdicts_on(study, pruner):
    """Trial -> step, by a pruner that is told the values of a study that pruned nobody."""
    curves = {t.number: t.intermediate_values for t in study.trials if t.intermediate_values}
    told = optuna.create_study(direction="maximize", pruner=pruner, study_name="rates")
    rungs = Rungs([told.ask() for _ in study.trials])
    pruned = {}
    for step in (10, 20, 30, 40):
        alive = {number: curves[number][step] for number in curves.keys() - pruned.keys()}
        pruned |= dict.fromkeys(rungs.report(alive, step, 40), step)
    return pruned


def test_the_worst_leave_the_stack(pruned, whole):
    study, outcomes, directories = pruned
    steps = {
        k: outcome["pruned_at"] for k, outcome in enumerate(outcomes) if "pruned_at" in outcome
    }
    assert steps == verdicts_on(whole[0], study.pruner)
    assert 10 in steps.values() and len(steps) < len(RATES) - 1 and outcomes[-1]["diverged"]
    for k, step in steps.items():
        record = read_run(directories[k])
        assert study.trials[k].last_step == record["steps"] == record["pruned_at"] == step
        assert record["status"] == "pruned" and record["ended"] and record["seconds"] > 0
        assert type(study.pruner).__name__ in record["prune_reason"]
        assert f"pruned at step {step}: " in end_sentence(record)
        assert load_checkpoint(directories[k] / "checkpoints" / "last.ckpt")["global_step"] == step
    for k in set(range(len(RATES))) - steps.keys():
        assert read_run(directories[k])["status"] in ("completed", "diverged")


def test_the_others_are_those_of_a_stack_that_prunes_nobody(pruned, whole):
    """To the last bit until a member leaves; a product of other shapes may round differently."""
    _, outcomes, directories = pruned
    first = min(outcome.get("pruned_at", 40) for outcome in outcomes)
    for k, (found, directory) in enumerate(zip(outcomes, directories, strict=True)):
        curves, others = read_metrics(directory), read_metrics(whole[2][k])
        for name, points in others.items():
            kept = [(step, value) for step, value in points if step <= found["steps"]]
            if name.startswith("test/") and "pruned_at" not in found:
                kept = points
            own = curves.get(name, [])
            assert [step for step, _ in own] == [step for step, _ in kept], (k, name)
            for (step, value), (_, other) in zip(own, kept, strict=True):
                limit = 0 if step <= first else 1e-10
                assert math.isclose(value, other, rel_tol=limit) or math.isnan(other), (k, name)
        if "pruned_at" not in found and not found["diverged"]:
            weights, same = (
                load_checkpoint(d / "checkpoints" / "last.ckpt")["state_dict"]
                for d in (directory, whole[2][k])
            )
            torch.testing.assert_close(weights, same, rtol=1e-10, atol=1e-12)


def test_the_caller_tells_the_study(pruned):
    study, outcomes, _ = pruned
    for trial, outcome in zip(study.trials, outcomes, strict=True):
        if "pruned_at" in outcome:
            study.tell(trial.number, state=TrialState.PRUNED)
            # Optuna takes the last value.
            assert study.trials[trial.number].value == outcome["val/accuracy"]


def test_a_trial_for_each_member(config):
    study = optuna.create_study()
    with pytest.raises(ValueError, match="`trials`"):
        train_stack([OmegaConf.merge(config, {"paths": {"output_dir": "."}})], [study.ask()] * 2)


def test_trials_need_the_callback(config):
    bare = OmegaConf.merge(config, {"callbacks": {"optuna_pruning": None}})
    with pytest.raises(ValueError, match="`callbacks`"):
        train_stack([OmegaConf.merge(bare, {"paths": {"output_dir": "."}})], [None])


def test_a_metric_that_is_not_logged_is_named(config, tmp_path):
    other = OmegaConf.merge(config, {"callbacks": {"optuna_pruning": {"monitor": "val/acc"}}})
    with pytest.raises(ValueError, match="monitor.*'val/acc'"):
        stack_of(other, tmp_path, NopPruner())
    assert read_run(tmp_path / "0")["status"] == "failed"
