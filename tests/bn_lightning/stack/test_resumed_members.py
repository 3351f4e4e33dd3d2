"""A member of a stack goes on from its last.ckpt as a run of its own does."""

import pytest
import torch
from hydra import compose, initialize_config_module

from bn_lightning.runs.checkpoint import load_checkpoint
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.stack.training import train_stack
from bn_lightning.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

# 21 batches an epoch.
SHORT = [
    "+experiment=mnist_bn",
    "data=digits",
    "trainer.precision=64-true",
    "+callbacks=[steps_to_accuracy]",
    "callbacks.steps_to_accuracy.threshold=0.6",
    "callbacks.activation_percentiles=null",
    "trainer.log_every_n_steps=5",
    "extras.figures=false",
]
SCHEDULED = [
    "optimizer=momentum",
    "+scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 10,"
    " gamma: 0.5}",
]
# The settings, steps until the checkpoint, steps between validations, and all steps.
CASES = {
    "momentum_within_an_epoch": (SCHEDULED, 32, 10, 44),
    "adam_after_an_epoch": (["optimizer=adam"], 42, 21, 50),
}
# Of 50 steps; Adam makes a step of the rate out of a gradient that is nothing but rounding.
TOLERANCES = {"momentum_within_an_epoch": 1e-11, "adam_after_an_epoch": 1e-6}


def composed(directory, *overrides):
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        return compose("train", [*SHORT, f"paths.output_dir={directory}", *overrides])


def last_of(directory):
    return load_checkpoint(directory / "checkpoints" / "last.ckpt")


def assert_close(found, expected, tolerance, where=""):
    """Compare nested values: numbers and tensors up to a share of the largest."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, tolerance, f"{where}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        if expected.numel():
            limit = tolerance * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=max(tolerance, 1e-6)), where
    else:
        assert found == expected, where


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("adam"), id=name)
        for name in CASES
    ],
)
def both(request, tmp_path_factory):
    """A member and a run of its own at the end of the first part, and after more steps."""
    settings, steps, every, more = CASES[request.param]
    folder = tmp_path_factory.mktemp("both")
    first = [*settings, f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}"]
    train_stack(
        [
            composed(folder / "other", *first, "seed=1", "optimizer.lr=0.02"),
            composed(folder / "member", *first, "seed=2"),
        ]
    )
    train(composed(folder / "single", *first, "seed=2"))
    before, after = [], []
    for name in ("member", "single"):
        before.append(last_of(folder / name))
        goes_on = ["seed=2", *first, f"trainer.max_steps={more}"]
        train(composed(folder / name, *goes_on, f"ckpt_path={folder / name}"))
        after.append(last_of(folder / name))
    return folder, TOLERANCES[request.param], before, after


def test_the_checkpoint_is_that_of_a_run(both):
    folder, tolerance, (found, expected), _ = both
    assert found.keys() == expected.keys()
    fit_loop = expected["loops"]["fit_loop"]
    for name, value in found["loops"]["fit_loop"].items():
        assert value == fit_loop[name], name
    for name in ("epoch", "global_step", "lr_schedulers", "optimizer_states", "state_dict"):
        assert_close(found[name], expected[name], tolerance, name)
    moved = {str(folder / "single"): str(folder / "member")}
    assert_close(found["callbacks"], renamed(expected["callbacks"], moved), 1e-6, "callbacks")


def renamed(content, names):
    if isinstance(content, dict):
        return {renamed(k, names): renamed(v, names) for k, v in content.items()}
    if isinstance(content, str):
        for before, after in names.items():
            content = content.replace(before, after)
    return content


def test_the_member_goes_on_as_the_run(both):
    folder, tolerance, _, (found, expected) = both
    for name in ("epoch", "global_step", "lr_schedulers", "optimizer_states"):
        assert_close(found[name], expected[name], tolerance, name)
    assert found["loops"]["fit_loop"] == expected["loops"]["fit_loop"]
    assert_close(found["state_dict"], expected["state_dict"], tolerance)
    metrics = [read_metrics(folder / name) for name in ("member", "single")]
    assert_close(*metrics, 1e-5)
    record, alone = (read_run(folder / name) for name in ("member", "single"))
    assert record["stack"] == {"size": 2, "index": 1}
    for key in ("status", "steps", "resumed_at", "metrics"):
        assert_close(record[key], alone[key], 1e-5, key)


def test_the_best_checkpoint_is_kept_or_replaced_as_in_the_run(both):
    folder, *_ = both
    best, expected = (
        load_checkpoint(folder / name / "checkpoints" / "best.ckpt")
        for name in ("member", "single")
    )
    assert best["global_step"] == expected["global_step"]
