"""Values that no run can use are refused by the name under which they were typed."""

from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from bn_lightning.cli.config_check import check_config, check_trial
from bn_lightning.sweeps.engine.environment import TRIAL_VARIABLE

GOOD: dict[str, Any] = {
    "task_name": "train",
    "seed": 1,
    "ckpt_path": None,
    "paths": {"output_dir": "run"},
    "extras": {"num_threads": None, "figures": True, "batch_norms": False, "step_table": False},
    "data": {"_target_": "a.Data"},
    "model": {"_target_": "a.Model", "network": {"_target_": "a.Network"}},
    "norm": None,
    "init": {"_target_": "a.init", "_partial_": True, "std": 0.05},
    "optimizer": {"_target_": "a.SGD", "_partial_": True, "lr": 1.0},
    "scheduler": None,
    "trainer": {
        "_target_": "a.Trainer",
        "accelerator": "cpu",
        "max_steps": 50_000,
        "val_check_interval": 1000,
    },
    "callbacks": {"a": None, "b": {"_target_": "a.B"}},
    "logger": {},
}

POSITIVE = [0, -1, -0.5, "nan", "inf", "-inf", "fast", True, [0.1]]
NOT_NEGATIVE = [-1e-9, "nan", "inf", "much", False]
COUNT = [0, -1, 1.0, 2.5, "many", True]
BAD = {
    "task_name": ["", 7, None],
    "seed": [-1, 0.5, "today", True, None],
    "ckpt_path": ["", 7, ["a.ckpt"]],
    "paths.output_dir": [None, 7, ""],
    "extras.num_threads": [0, -1, 1.0, True, 10**9, "all"],
    "extras.figures": [0, "yes", None],
    "data": [None, "mnist", [], {}],
    "model": [None],
    "model.network": [None, 7],
    "norm": ["batch"],
    "init": [{"_target_": "a.init", "_partial_": 1}],
    "init.std": NOT_NEGATIVE,
    "init.bound": NOT_NEGATIVE,
    "optimizer": [None],
    "optimizer.lr": [*POSITIVE, None],
    "scheduler": [{"step_size": 7}],
    "trainer": [7],
    "trainer.max_steps": [*COUNT, -2, None],
    "trainer.max_epochs": [0, -2, 1.5],
    "trainer.val_check_interval": POSITIVE,
    "callbacks": [None, [], {"a": 7}, {"a": {"every": 7}}],
    "logger": ["csv"],
}
EDGE = {
    "seed": [0],
    "extras.num_threads": [1],
    "norm": [{"_target_": "a.BatchNorm", "_partial_": True}],
    "optimizer.lr": [1, 1e-30, 1e30],
    "init.std": [0, 0.0],
    "init": [{"_target_": "a.zeros"}],
    "trainer.max_steps": [1],
    "trainer.max_epochs": [1, -1, None],
    "trainer.val_check_interval": [1, 0.25],
}


def changed(**changes: Any) -> Any:
    config = OmegaConf.create(GOOD)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return OmegaConf.to_container(config)


def check(**changes: Any) -> None:
    check_config(changed(**changes))


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(k, v, id=f"{k}={v}") for k, values in table.items() for v in values]


def number(value: Any) -> Any:
    """As Hydra reads what is typed: nan and inf are numbers."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def test_a_configuration_as_it_comes() -> None:
    check()


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_refused_by_name(key: str, value: Any) -> None:
    value = number(value)
    with pytest.raises(ValueError, match=f"expected `{key}` to be ") as caught:
        check(**{key: value})
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), cases(EDGE))
def test_the_edge_of_what_is_allowed(key: str, value: Any) -> None:
    check(**{key: value})


@pytest.mark.parametrize(
    "end", [{"max_epochs": 3}, {"max_time": "00:00:10:00"}, {"fast_dev_run": 20}], ids=str
)
def test_no_limit_of_steps_where_something_else_ends_the_run(end: dict[str, Any]) -> None:
    changes = {f"trainer.{key}": value for key, value in end.items()}
    check(**{"trainer.max_steps": -1, **changes})


@pytest.mark.parametrize("key", ["task_name", "seed", "paths", "extras", "data", "logger"])
def test_absent(key: str) -> None:
    config = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ValueError, match=f"expected `{key}"):
        check_config(config)


@pytest.mark.parametrize("there", [True, False], ids=["there", "absent"])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: there))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
    if there:
        check(**{"trainer.accelerator": "gpu"})
    else:
        with pytest.raises(ValueError, match="use trainer=cpu"):
            check(**{"trainer.accelerator": "gpu"})
    check(**{"trainer.accelerator": "cpu"})


@pytest.mark.parametrize(
    ("metric", "trainer", "is_refused"),
    [
        ("val/accuracy", {}, True),
        (["test/loss", "val/accuracy"], {}, True),
        ("test/accuracy", {}, False),
        (None, {}, False),
        ("val/accuracy", {"max_steps": 1000}, False),
        ("val/accuracy", {"val_check_interval": 0.5}, False),
        ("val/accuracy", {"check_val_every_n_epoch": 1}, False),
        ("val/accuracy", {"fast_dev_run": 20}, False),
    ],
)
def test_a_trial_that_ends_before_what_it_is_chosen_by(
    monkeypatch: pytest.MonkeyPatch, metric: Any, trainer: dict[str, Any], is_refused: bool
) -> None:
    given = {"max_steps": 999, "check_val_every_n_epoch": None, **trainer}
    changes = {f"trainer.{key}": value for key, value in given.items()}
    hydra = OmegaConf.create({"sweeper": {"metric": metric}, "overrides": {"task": []}})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: hydra))
    check(**changes)  # a run by itself
    monkeypatch.setenv(TRIAL_VARIABLE, "0")
    for function in (check_config, check_trial):  # in each trial, and before the first
        if is_refused:
            with pytest.raises(ValueError, match="set trainer.val_check_interval=999 or less"):
                function(changed(**changes))
        else:
            function(changed(**changes))


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"max_steps": 999, "check_val_every_n_epoch": None}, "set trainer.val_check_interval=999"),
        ({"max_epochs": 2, "check_val_every_n_epoch": 3}, "set trainer.check_val_every_n_epoch=2"),
        ({"limit_val_batches": 0}, "`trainer.limit_val_batches` to be above 0"),
        ({"max_epochs": 3, "check_val_every_n_epoch": 3}, None),
        ({"limit_val_batches": 0, "fast_dev_run": True}, None),
    ],
    ids=["steps", "epochs", "no_batches", "last_epoch", "debug"],
)
def test_early_stopping_without_a_validation(trainer: dict[str, Any], words: str | None) -> None:
    changes = {f"trainer.{key}": value for key, value in trainer.items()}
    stop = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}
    check(**changes)
    check(**changes, callbacks={"stop": {**stop, "monitor": "train/loss"}})
    if words is None:
        check(**changes, callbacks={"stop": stop})
    else:
        with pytest.raises(
            ValueError, match="callbacks.stop stops the run by its val/loss"
        ) as error:
            check(**changes, callbacks={"stop": stop})
        assert words in str(error.value)


def test_a_schedule_over_steps_that_have_no_limit() -> None:
    scheduler = {"_target_": "a.Cosine", "_partial_": True, "T_max": -1}
    with pytest.raises(ValueError, match=r"`scheduler\.T_max` to be a positive number, got -1"):
        check(scheduler=scheduler)


def test_a_million_ranks() -> None:
    with pytest.raises(ValueError, match=r"`trainer\.devices` to be at most"):
        check(**{"trainer.devices": 10**6})
