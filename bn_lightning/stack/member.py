"""One run of a stack: how it is built, and what it leaves."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bn_lightning.callbacks.steps_to_accuracy import StepsToAccuracy
from bn_lightning.callbacks.training_loop import early_stop_reason
from bn_lightning.models.initialization import initialize_as_configured
from bn_lightning.plugins.checkpoint_io import AtomicCheckpointIO
from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.checkpoint import CONFIG_KEY, METRICS_KEY, SECONDS_KEY
from bn_lightning.runs.directory import LAST
from bn_lightning.runs.record import RunRecord, logged_numbers
from bn_lightning.stack.builder import Builder
from bn_lightning.stack.stackable import (
    EARLY_STOPPING,
    RUN_CHECKPOINTS,
    STEPS_TO_ACCURACY,
    check_module,
)


class Member:
    """One run of a stack, in its directory.

    Args:
        config: of the run, resolved.
        like: the record of another member of this process, whose versions and hardware are this
            one's too; None reads them.
        builder: of the objects of all members.

    Raises:
        NotStackableError: the LightningModule trains in its own way.
    """

    def __init__(self, config: dict[str, Any], like: RunRecord | None, builder: Builder) -> None:
        self.config = config
        self._builder = builder
        self.directory = Path(config["paths"]["output_dir"])
        self.directory.mkdir(parents=True, exist_ok=True)
        self.record = _record_like(like, self.directory, config)
        # The order of a run, in which the network's constructor draws random numbers.
        seed_everything(config["seed"], workers=True, verbose=False)
        self.model = check_module(builder.build(config["model"]))
        scheme = builder.build(config.get("init"))
        initialize_as_configured(self.model.network, scheme, config["seed"])
        self.random_state = torch.get_rng_state()
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self.steps = 0
        self.epoch = 0
        self.validated_at = 0  # a step
        self.validations = 0  # in the current epoch
        self.planned_steps = 0  # of the whole budget
        self.stop_reason: str | None = None  # why a callback ended training before that
        self.trial: int | None = None  # number of the trial that this run is
        nodes = config["callbacks"].values()
        targets = {node["_target_"]: node for node in nodes if node is not None}
        self._checkpoints = targets.get(RUN_CHECKPOINTS)
        self._best: tuple[float, dict[str, Any]] | None = None
        self._callbacks = [
            builder.build(targets[name])
            for name in (STEPS_TO_ACCURACY, EARLY_STOPPING)
            if name in targets
        ]
        self._logger = MetricsCSVLogger(self.directory) if any(config["logger"].values()) else None

    def log(self, values: Mapping[str, float], *, kept: bool = True) -> None:
        """Log metrics at the current step; `kept` ones are metrics of the run, too."""
        if kept:
            self.metrics |= values
        if self._logger is not None:
            self._logger.log_metrics(dict(values), self.steps)

    def end_validation(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Call the callbacks after a validation, keep the best state, and write the metrics.

        Args:
            state: returns copies of the network's tensors, for the best checkpoint.
        """
        self.validated_at = self.steps
        self.validations += 1
        trainer = self._as_trainer()
        for callback in self._callbacks:
            callback.on_validation_end(trainer, self.model)
        self.stop_reason = early_stop_reason(trainer)
        if self._checkpoints is not None:
            monitor, mode = self._checkpoints["monitor"], self._checkpoints["mode"]
            value = self.metrics.get(monitor)
            if value is None:
                raise ValueError(
                    f"expected `callbacks.checkpoints.monitor` to be one of"
                    f" {', '.join(self.metrics)}, got {monitor!r}; name one of them"
                )
            score = -value if mode == "min" else value
            score = score if score == score else float("-inf")  # NaN is worst
            if self._best is None or score > self._best[0]:
                self._best = score, self._checkpoint(state())
        if self._logger is not None:
            self._logger.save()

    def begin_epoch(self, epoch: int) -> None:
        """Count from the start of an epoch."""
        self.epoch = epoch
        self.validations = 0

    def end_epoch(self) -> None:
        """Log what callbacks log after an epoch."""
        for callback in self._callbacks:
            if isinstance(callback, StepsToAccuracy) and callback.reached_at is not None:
                value = {callback.name: float(callback.reached_at)}
                self.metrics |= value
                if self._logger is not None:
                    # Lightning counts the last step only after the hook that logs this.
                    self._logger.log_metrics({**value, "epoch": self.epoch}, self.steps - 1)

    def save(
        self, state: Mapping[str, Tensor], of_last: Mapping[str, Any], of_both: Mapping[str, Any]
    ) -> None:
        """Write the checkpoints of the best validation and of now.

        Args:
            state: copies of the network's tensors.
            of_last: what a run that goes on needs; the callbacks of the member are added.
            of_both: name of the data module's class -> its state.
        """
        if self._checkpoints is None:
            return
        folder = Path(self._checkpoints["dirpath"])
        writer = AtomicCheckpointIO()
        if self._best is not None:
            writer.save_checkpoint({**self._best[1], **of_both}, folder / "best.ckpt")
        callbacks = {callback.state_key: callback.state_dict() for callback in self._callbacks}
        callbacks |= self._state_of_checkpoints()
        last = {**self._checkpoint(state), **of_last}
        last["callbacks"] = {**of_last.get("callbacks", {}), **callbacks}
        writer.save_checkpoint({**last, **of_both}, folder / LAST.name)
        self._best = None

    def _state_of_checkpoints(self) -> dict[str, dict[str, Any]]:
        """Return the state of `RunCheckpoints`, which keeps the best checkpoint in a longer run."""
        callback = self._builder.build(self._checkpoints)
        if self._best is not None:
            score, path = self._best[0], str(Path(callback.dirpath, "best.ckpt"))
            value = torch.tensor(-score if callback.mode == "min" else score)
            callback.best_model_score = callback.current_score = callback.kth_value = value
            callback.best_model_path = callback.kth_best_model_path = path
            callback.best_k_models = {path: value}
        return {callback.state_key: callback.state_dict()}

    def end_trained(self) -> None:
        """Write the metrics and the record of a member that was trained and tested."""
        if self.stop_reason is None:
            self.end("completed")
        else:
            self.end(
                "stopped early",
                stopped_at=self.steps,
                planned_steps=self.planned_steps,
                stop_reason=self.stop_reason,
            )

    def end(self, status: str, **content: Any) -> None:
        """Write the metrics and the record.

        Args:
            status: how the run ended.
            content: other keys of the record; its `metrics` replace those that were logged.
        """
        if self._logger is not None:
            self._logger.save()
        metrics = self.metrics | content.pop("metrics", {})
        seconds = round(self.seconds, 3)
        self.record.end(
            status,
            steps=self.steps,
            seconds=seconds,
            steps_per_second=round(self.steps / seconds, 1) if seconds else None,
            metrics=metrics,
            **content,
        )

    def _checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a checkpoint like Lightning's, without what only resuming needs."""
        return {
            "epoch": self.epoch,
            "global_step": self.steps,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": {f"network.{name}": tensor for name, tensor in state.items()},
            "hparams_name": None,
            "hyper_parameters": {CONFIG_KEY: self.config},
            METRICS_KEY: logged_numbers(self.metrics),
            SECONDS_KEY: self.seconds,
        }

    def _as_trainer(self) -> Any:
        """Return what callbacks read of a Trainer after a validation."""
        return SimpleNamespace(
            callbacks=self._callbacks,
            callback_metrics={name: torch.tensor(value) for name, value in self.metrics.items()},
            current_epoch=self.epoch,
            estimated_stepping_batches=self.planned_steps,
            fast_dev_run=False,
            global_step=self.steps,
            sanity_checking=False,
            should_stop=False,
            state=SimpleNamespace(fn=TrainerFn.FITTING),
            strategy=SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop),
            world_size=1,
        )


def _record_like(like: RunRecord | None, directory: Path, config: dict[str, Any]) -> RunRecord:
    if like is None:
        return RunRecord(directory, config)
    record = copy.copy(like)
    record.path = directory / like.path.name
    record.content = {**like.content, "config": config, "seed": config.get("seed")}
    return record
