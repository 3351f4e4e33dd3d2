"""Numbers that no run can use are refused by the name under which they were typed."""

from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from bn_lightning.cli.config_check import check_config, check_nodes
from bn_lightning.sweeps.engine.environment import TRIAL

GOOD: dict[str, Any] = {
    "seed": 1,
    "data": {"batch_size": 60},
    "norm": {"eps": 1e-5, "momentum": 0.1},
    "init": {"std": 0.05},
    "optimizer": {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 50_000,
        "val_check_interval": 1000,
        "log_every_n_steps": 50,
    },
}

POSITIVE = [0, -1, -0.5, "nan", "inf", "-inf", "fast", True, [0.1]]
NOT_NEGATIVE = [-1e-9, "nan", "inf", "much", False]
COUNT = [0, -1, 1.0, 2.5, "many", True]
BAD = {
    "seed": [-1, 0.5, "today", True],
    "data.batch_size": COUNT,
    "optimizer.lr": POSITIVE,
    "optimizer.momentum": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "norm.eps": POSITIVE,
    "norm.momentum": [-0.1, 1.1, "nan", "some"],
    "init.std": NOT_NEGATIVE,
    "init.bound": NOT_NEGATIVE,
    "trainer.max_steps": COUNT,
    "trainer.val_check_interval": POSITIVE,
    "trainer.log_every_n_steps": COUNT[1:],
}
EDGE = {
    "seed": [0],
    "optimizer.lr": [1, 1e-30, 1e30],
    "optimizer.momentum": [0, 0.9],
    "norm.momentum": [0, 1, None],
    "init.std": [0, 0.0],
    "trainer.max_steps": [1],
    "trainer.log_every_n_steps": [0, 1],
    "trainer.val_check_interval": [1, 0.25],
}


def check(**changes: Any) -> None:
    config = OmegaConf.create(GOOD)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    check_config(config)


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
    with pytest.raises(ValueError, match=f"`{key}` expected ") as caught:
        check(**{key: value})
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), cases(EDGE))
def test_the_edge_of_what_is_allowed(key: str, value: Any) -> None:
    check(**{key: value})


@pytest.mark.parametrize("key", ["seed", "optimizer.lr", "data.batch_size", "trainer.max_steps"])
def test_nothing_is_no_number(key: str) -> None:
    with pytest.raises(ValueError, match=f"`{key}`"):
        check(**{key: None})


@pytest.mark.parametrize("key", ["norm", "init", "optimizer"])
def test_a_group_may_be_another(key: str) -> None:
    """`norm=none`, or a user's own optimiser without a momentum."""
    check(**{key: None})


@pytest.mark.parametrize("there", [True, False], ids=["there", "absent"])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: there))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
    if there:
        check(**{"trainer.accelerator": "gpu"})
    else:
        with pytest.raises(ValueError, match="expected a GPU, torch sees none; use trainer=cpu"):
            check(**{"trainer.accelerator": "gpu"})
    check(**{"trainer.accelerator": "cpu"})


NODES: dict[str, Any] = {
    "task_name": "train",
    "ckpt_path": None,
    "trusted": [],
    "paths": {"output_dir": "run"},
    "extras": {"num_threads": None, "figures": True, "batch_norms": False, "step_table": False},
    "data": {"_target_": "a.Data"},
    "model": {"_target_": "a.Model", "network": {"_target_": "a.Network"}},
    "norm": None,
    "init": {"_target_": "a.init", "_partial_": True},
    "optimizer": {"_target_": "a.SGD", "_partial_": True},
    "scheduler": None,
    "trainer": {"_target_": "a.Trainer"},
    "callbacks": {"a": None, "b": {"_target_": "a.B"}},
    "logger": {},
}
NO_NODES = {
    "task_name": ["", 7, None],
    "ckpt_path": ["", 7, ["a.ckpt"]],
    "trusted": [None, "os.", [7], [""]],
    "paths": [None, "logs", []],
    "paths.output_dir": [None, 7, ""],
    "extras": [None],
    "extras.num_threads": [0, -1, 1.0, True, 10**9, "all"],
    "extras.figures": [0, "yes", None],
    "data": [None, "mnist", [], {}],
    "model": [None],
    "model.network": [None, 7],
    "model.optimizer": [7],
    "norm": ["batch"],
    "init": [{"_target_": "a.init", "_partial_": 1}],
    "optimizer": [None],
    "scheduler": [{"step_size": 7}],
    "trainer": [7],
    "callbacks": [None, [], {"a": 7}, {"a": {"every": 7}}],
    "logger": ["csv"],
}


@pytest.mark.parametrize(("key", "value"), cases(NO_NODES))
def test_a_part_that_is_something_else(key: str, value: Any) -> None:
    config = OmegaConf.create(NODES)
    check_nodes(OmegaConf.to_container(config))
    OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(ValueError) as caught:
        check_nodes(OmegaConf.to_container(config))
    assert str(caught.value).startswith(f"`{key}` expected ")
    assert str(caught.value).endswith(f", got {value!r}")


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
    hydra = OmegaConf.create({"sweeper": {"metric": metric}})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: hydra))
    check(**changes)  # a run by itself
    monkeypatch.setenv(TRIAL, "0")
    if not is_refused:
        return check(**changes)
    with pytest.raises(ValueError, match="set trainer.val_check_interval=999 or less"):
        check(**changes)


def test_a_million_ranks() -> None:
    with pytest.raises(ValueError, match=r"`trainer\.devices` expected at most"):
        check(**{"trainer.devices": 10**6})
