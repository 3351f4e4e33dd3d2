"""A fast task to sweep, without PyTorch and Lightning."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import hydra
import optuna
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig

from bn_lightning.sweeps.engine.environment import WORKER_VARIABLE
from bn_lightning.sweeps.engine.outcome import PrunedInBatch
from bn_lightning.sweeps.engine.rungs import Rungs
from bn_lightning.sweeps.engine.trial import current_trial

# It is ignored where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("NO_WORKER_STARTS") and WORKER_VARIABLE in os.environ:
    raise SystemExit("a library is missing")

register()


def depth_of_deep(config: DictConfig, trial: optuna.Trial) -> None:
    """A conditional space."""
    if trial.params["kind"] == "deep":
        trial.suggest_int("depth", 1, 2)


def prepare(
    configs: list[dict[str, Any]], size: int, rungs: Rungs | None
) -> list[Callable[[], object] | None]:
    """What a launcher of stacks calls before the jobs: tell what it got, prune, compute those of 0.

    If there is a pruner, all are computed.
    """
    if os.environ.get("DIE_IN_BATCH") and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(3)
    if int(os.environ.get("CTRL_C", "0")) and not os.path.exists("interrupted"):
        open("interrupted", "w").close()
        for _ in range(int(os.environ["CTRL_C"])):
            os.kill(os.getpid(), signal.SIGINT)
    with open("prepared", "a") as file:
        file.write(f"{size} {[config['x'] for config in configs]}\n")
    if rungs is not None:
        pairs = list(zip(rungs.numbers, configs, strict=True))
        pruned = rungs.report({number: config["x"] for number, config in pairs}, 1, 2)
        return [partial(_pruned if number in pruned else _computed, c) for number, c in pairs]
    return [partial(_computed, config) if config["x"] == 0 else None for config in configs]


def _computed(config: dict[str, Any]) -> object:
    return {"loss": 1 + config["y"] + config["depth"], "computed": True, "pid": os.getpid()}


def _pruned(config: dict[str, Any]) -> object:
    raise PrunedInBatch("too large", {"pruned_at": 1})


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> object:
    time.sleep(config.seconds)
    if config.act == "raise":
        raise RuntimeError("asked to fail")
    if config.act == "raise_once" and not os.path.exists("raised"):
        open("raised", "w").close()
        raise RuntimeError("asked to fail once")
    if config.act == "exit":
        os._exit(3)
    if config.act == "report":
        trial = current_trial()
        assert trial is not None
        trial.report(config.x, step=1)
        if trial.should_prune():
            raise optuna.TrialPruned
    returns = {"none": None, "text": "text", "two": (1.0, 2.0), "not_a_number": float("nan")}
    if config.act in returns:
        return returns[config.act]
    loss = (config.x - 1) ** 2 + config.y + config.depth
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    result = {"loss": loss, "size": config.x, "diverged": config.x > 2, "pid": os.getpid()}
    return result if devices is None else result | {"devices": devices}


if __name__ == "__main__":
    main()
