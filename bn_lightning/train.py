"""Train a network: `python -m bn_lightning.train +experiment=mnist_bn`.

The run's directory is described in runs/record.py.
"""

import contextlib
import gc
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.batch_norm_table import print_batch_norms
from bn_lightning.cli.command import (
    hydra_command,
    in_sweep,
    is_typed,
    quiet_lightning,
)
from bn_lightning.cli.config_check import check_config
from bn_lightning.cli.error_line import format_error
from bn_lightning.cli.install_hint import install_command
from bn_lightning.cli.job import is_pruned
from bn_lightning.cli.run_table import print_run_table, print_validation_table
from bn_lightning.cli.trainer_builder import build_trainer, print_profile
from bn_lightning.runs.directory import LAST
from bn_lightning.runs.interruption import Interrupted, RankLostError
from bn_lightning.runs.record import (
    RunRecord,
    logged_numbers,
    run_outcome,
)
from bn_lightning.runs.resume import ResumePoint, read_resume_point
from bn_lightning.runs.run_log import RUN_LOG
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.sweeps.engine.processes import as_typed, is_called, typed_arguments


def train(config: DictConfig) -> dict[str, Any]:
    """Train and test as configured, write to `paths.output_dir`, and return `run_outcome`.

    Args:
        config: composed from `conf/train.yaml`.

    Raises:
        Exception: a value, the data or a checkpoint cannot be used; run.json says `failed`, unless
            the value was refused before it was written.
        TrialPruned: the pruner of a sweep ended the run; run.json says `pruned`.
        Interrupted: SIGINT or SIGTERM came; run.json says `interrupted`.
    """
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from bn_lightning.callbacks import ChangedDataError

    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_config(resolved)
    if config.extras.num_threads is not None:
        torch.set_num_threads(config.extras.num_threads)
    directory = Path(config.paths.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # set on the function
    record = RunRecord(directory, resolved, write=is_first_rank)
    if is_called():
        record.content["command"] = ["bn-train", *typed_arguments()]
    versions = record.content["versions"]
    RUN_LOG.info("seed %d, torch %s, in %s", config.seed, versions["torch"], directory)
    resume_point = None
    if config.ckpt_path is not None:
        resume_point = read_resume_point(config, record, directory)
    record.update()
    try:
        _fit_and_test(config, record, resume_point)
    except Interrupted as interrupted:
        record.end("interrupted")
        if not in_trial():
            print(f"interrupted by {interrupted}: {directory}")
            if (directory / LAST).exists():
                print("the same command with ckpt_path=last resumes it from its last checkpoint")
        raise
    except Exception as error:
        if isinstance(error, ChangedDataError) and resume_point and resume_point.record:
            record.content = resume_point.record  # leave the run as it was
            record.update()
            raise
        if not is_pruned(error):
            # On a full disk the record cannot be written either. The first error says more.
            with contextlib.suppress(OSError):
                record.end("failed", error=format_error(error))
            raise
        record.end("pruned")
        if is_first_rank:  # the other ranks end as after any run
            raise
    finally:
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            # W&B has one run in a process, which the next job of a sweep would continue.
            is_broken = record.content["status"] in ("failed", "interrupted")
            sys.modules["wandb"].finish(exit_code=int(is_broken))
        if in_sweep():
            # Reference cycles in Lightning keep the data of each job alive until a full collection.
            gc.collect()
    return run_outcome(record.content)


def _fit_and_test(config: DictConfig, record: RunRecord, resume_point: ResumePoint | None) -> None:
    from hydra.utils import instantiate
    from lightning import seed_everything
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from bn_lightning.data.protocol import check_data_module
    from bn_lightning.models.initialization import DefaultScheme, initialize_as_configured
    from bn_lightning.models.protocol import NetworkModel, check_model
    from bn_lightning.runs.checkpoint import CONFIG_KEY

    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    datamodule = instantiate(config.data)
    check_data_module(datamodule, "train_dataloader", "test_dataloader")
    model = instantiate(config.model)
    check_model(model, "training_step", "configure_optimizers", "test_step")
    scheme = instantiate(config.get("init"))  # absent after ~init
    if scheme is not None and not isinstance(scheme, DefaultScheme):
        check_model(model, "network")
    told = None
    if isinstance(model, NetworkModel):
        told = initialize_as_configured(model.network, scheme, config.seed)
    if told and resume_point is None and record.write:
        RUN_LOG.info(told)
        if in_trial():
            record.content["notice"] = told  # the sweep prints it
        else:
            print(told)
    # Lightning stores hyperparameters in every checkpoint. evaluate.py builds from them.
    model.save_hyperparameters({CONFIG_KEY: record.content["config"]}, logger=False)
    callbacks = _build_callbacks(config, record.path.parent, resume_point)
    writes = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = build_trainer(
        config.trainer,
        record.path.parent,
        callbacks=callbacks,
        logger=_build_loggers(config.logger),
        # True would make Lightning add a bar, or checkpoints, of its own.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=config.trainer.get("enable_checkpointing", writes),
    )
    _apply_typed_budget(trainer, config.trainer)
    if in_sweep() and trainer.world_size > 1:
        raise ValueError(
            "expected `trainer.devices` to be one process in a job of a multirun, got "
            f"{trainer.world_size}, of which the others would start the multirun again; use "
            "hydra/sweeper=bn_optuna, which runs such a trial as a command of its own, or leave -m "
            "out"
        )
    if is_called() and trainer.world_size > 1:
        raise ValueError(
            "expected `trainer.devices` to be one process in a run that Python called, got "
            f"{trainer.world_size}, of which the others would start this program again; type "
            f"{as_typed(['bn-train', *typed_arguments()])} and load the run by load_run"
        )
    _fit(trainer, model, datamodule, record, resume_point)
    _test(trainer, model, datamodule, record, config.extras.figures)
    if trainer.is_global_zero and not in_trial():
        print_profile(record.path.parent)
        if config.extras.batch_norms:
            print_batch_norms(model.state_dict(), record.content["config"].get("norm"))
        if config.extras.step_table:
            print_validation_table(record.path.parent)
        print_run_table(record.content, record.path.parent)


def _build_callbacks(
    config: DictConfig, directory: Path, resume_point: ResumePoint | None
) -> list[Any]:
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import LambdaCallback, ProgressBar
    from lightning.pytorch.utilities import rank_zero_only

    from bn_lightning.callbacks import RunCheckpoints
    from bn_lightning.callbacks.run_log_lines import RunLogLines
    from bn_lightning.data.protocol import InfoCheck
    from bn_lightning.runs.metrics_csv import truncate_metrics

    callbacks = [instantiate(node) for node in config.callbacks.values() if node is not None]
    callbacks += [InfoCheck(), RunLogLines()]
    if in_sweep():
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if in_trial():
        for callback in callbacks:
            if isinstance(callback, RunCheckpoints):
                # The sweeper handles Ctrl-C: it lets running trials end.
                callback.handles_signals = False
    if resume_point is not None:
        last_step = resume_point.content["global_step"]
        # After the checkpoint is loaded, so that a refused run stays as it was.
        truncate = rank_zero_only(lambda *_: truncate_metrics(directory, last_step))
        callbacks.append(LambdaCallback(on_fit_start=truncate))
    return callbacks


def _apply_typed_budget(trainer: Any, config: DictConfig) -> None:
    """Let a typed budget replace that of `fast_dev_run`, which is an epoch of so many batches."""
    typed = [key for key in ("max_steps", "max_epochs") if is_typed(f"trainer.{key}")]
    if trainer.fast_dev_run and typed:
        trainer.fit_loop.max_epochs = config.max_epochs
        trainer.fit_loop.epoch_loop.max_steps = config.max_steps if "max_steps" in typed else -1


def _build_loggers(config: Any) -> list[Any]:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    loggers = []
    for name, node in config.items():  # a logger has the name of its option and of its extra
        try:
            loggers += [] if node is None else [instantiate(node)]
        except InstantiationException as error:
            if not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            raise ValueError(
                f"expected the package of `logger={name}` to be installed, got none; "
                f"{install_command(name)}"
            ) from error
    return loggers


def _fit(
    trainer: Any, model: Any, datamodule: Any, record: RunRecord, resume_point: ResumePoint | None
) -> None:
    """Train, and write steps, time and metrics into the record whether training fails or not."""
    from bn_lightning.data.protocol import ShapedData, data_info
    from bn_lightning.models.protocol import NetworkModel
    from bn_lightning.runs.checkpoint import METRICS_KEY, SECONDS_KEY, check_fits

    directory, config = record.path.parent, record.content["config"]
    metrics_before: dict[str, float] = {}
    first_step = 0
    seconds_before: float | None = 0.0
    if resume_point is not None:
        check_fits(resume_point.content, model, resume_point.path)
        metrics_before = resume_point.content.get(METRICS_KEY, {})
        first_step = resume_point.content["global_step"]
        seconds_before = resume_point.content.get(SECONDS_KEY)
        print(f"going on from step {first_step:,}: {directory}")
        record.content["resumed_at"].append(first_step)
    elif trainer.is_global_zero and not in_sweep() and not in_trial():
        print(f"{config['task_name']}: {_budget(trainer)}, in {directory}", flush=True)
    if trainer.world_size == 1:
        # Before the clock starts. On several ranks Lightning chooses which of them download.
        datamodule.prepare_data()
        datamodule.setup("fit")
        record.update(data=data_info(datamodule))
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    started = time.perf_counter()
    try:
        trainer.fit(
            model,
            datamodule=datamodule,
            ckpt_path=None if resume_point is None else resume_point.path,
            weights_only=True,
        )
    except RuntimeError as error:
        # The messages of gloo when the other end of a collective is gone.
        if trainer.world_size > 1 and re.search(r"gloo.*(by peer|timed out)", str(error), re.I):
            raise RankLostError(
                "another rank of this run has ended, and its error is above if it had one; the "
                "same command with ckpt_path=last resumes from the last checkpoint"
            ) from error
        shape = datamodule.input_shape if isinstance(datamodule, ShapedData) else None
        if shape is not None and isinstance(model, NetworkModel):
            _check_takes(model.network, shape)
        raise
    finally:
        seconds = time.perf_counter() - started
        steps = trainer.global_step - first_step
        if seconds_before is not None:
            seconds, steps = seconds + seconds_before, trainer.global_step
        record.content.update(
            steps=trainer.global_step,
            seconds=None if seconds_before is None else round(seconds, 3),
            steps_per_second=round(steps / seconds, 1),
            metrics=metrics_before | logged_numbers(trainer.callback_metrics),
        )
    record.content["data"] = data_info(datamodule)


def _budget(trainer: Any) -> str:
    """Return how long the Trainer trains, as words."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    limits = [f"{epochs:,} epoch{'s' * (epochs > 1)}"] if epochs > 0 else []
    limits += [f"{steps:,} steps"] if steps > 0 else []
    whichever = ", whichever comes first" if len(limits) > 1 else ""
    return (" or ".join(limits) or "until trainer.max_time") + whichever


def _test(trainer: Any, model: Any, datamodule: Any, record: RunRecord, draws: bool) -> None:
    """Test unless training diverged, draw the run's figures, and end the record."""
    from bn_lightning.callbacks import DivergenceGuard
    from bn_lightning.callbacks.training_loop import early_stop_reason, planned_steps
    from bn_lightning.data.protocol import data_info
    from bn_lightning.models.protocol import ChanceModel

    guards = [guard for guard in trainer.callbacks if isinstance(guard, DivergenceGuard)]
    diverged_at = next((guard.diverged_at for guard in guards if guard.diverged_at), None)
    metrics = record.content["metrics"]
    stop_reason = early_stop_reason(trainer)
    if diverged_at is None:
        trainer.test(model, datamodule=datamodule, verbose=False)
    if draws and trainer.is_global_zero and not in_trial():
        from bn_lightning.sweeps.report.run_figures import draw_run

        draw_run(record.path.parent)
    # Written last: a run that is killed earlier can be resumed.
    if diverged_at is not None:
        chance = model.chance_metrics() if isinstance(model, ChanceModel) else {}
        record.end("diverged", metrics=metrics | dict(chance), diverged_at=diverged_at)
        return
    stop = {}
    if stop_reason is not None:
        stop = {
            "stopped_at": record.content["steps"],
            "planned_steps": planned_steps(trainer),
            "stop_reason": stop_reason,
        }
    record.end(
        "stopped early" if stop else "completed",
        data=data_info(datamodule),  # the test may have skipped images, too
        metrics=metrics | logged_numbers(trainer.callback_metrics),
        **stop,
    )


def _check_takes(network: Any, shape: Sequence[int]) -> None:
    """Refuse a network that does not take inputs of this shape."""
    import torch

    weight = next(network.parameters())
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype))
    except RuntimeError as error:
        raise ValueError(
            f"expected `model.network` to take the data's inputs of shape {tuple(shape)}, got:"
            f" {error}; set its sizes, such as model.network.in_features, or take other data"
        ) from error


main = hydra_command(train, "train")

if __name__ == "__main__":
    main()
