"""Train a network: `python -m bn_lightning.train +experiment=mnist_bn`.

Composes the configuration, seeds, fits, tests, and leaves a run (see run_record.py).
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
from bn_lightning.cli.command import hydra_command, in_sweep, one_line, quiet_lightning
from bn_lightning.cli.config_check import check_config, check_nodes
from bn_lightning.cli.run_table import print_steps, print_summary
from bn_lightning.runs.directory import LAST
from bn_lightning.runs.interruption import Interrupted, RankLostError
from bn_lightning.runs.record import RunRecord, logged_numbers, run_outcome
from bn_lightning.runs.resume import Start, go_on
from bn_lightning.runs.trust import OF_CONFIGURATIONS, check_trusted
from bn_lightning.sweeps.engine.environment import in_trial


def train(config: DictConfig) -> dict[str, Any]:
    """Train as configured and return what `run_outcome` says of the run, its metrics first.

    Args:
        config: composed from `conf/train.yaml`. Everything is written to `paths.output_dir`.

    Raises:
        Exception: a value, the data or a checkpoint cannot be used; run.json says `failed`.
        Interrupted: SIGINT or SIGTERM; run.json says `interrupted`.
    """
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from bn_lightning.callbacks import ChangedDataError

    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_nodes(resolved)
    if config.extras.num_threads is not None:
        torch.set_num_threads(config.extras.num_threads)
    check_trusted(resolved, OF_CONFIGURATIONS, config.trusted, "the configuration")
    directory = Path(config.paths.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # set on the function
    record = RunRecord(directory, resolved, write=is_first_rank)
    start = None
    if config.ckpt_path is not None:
        start = go_on(config, record, directory)
    record.update()
    try:
        _fit_and_test(config, record, directory, start)
    except Interrupted as interrupted:
        record.end("interrupted")
        if not in_trial():
            print(f"interrupted by {interrupted}: {directory}")
            if (directory / LAST).exists():
                print("the same command with ckpt_path=last goes on from its last checkpoint")
        raise
    except Exception as error:
        if isinstance(error, ChangedDataError) and start is not None and start.record is not None:
            record.content = start.record  # the run stays as it was
            record.update()
            raise
        if not _is_pruned(error):
            # A disk that is full, or gone, takes no record either: the first error says more.
            with contextlib.suppress(OSError):
                record.end("failed", error=one_line(error))
            raise
        record.end("pruned")
        if is_first_rank:  # the others end as after any run
            raise
    finally:
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            # W&B has one run a process: the next job of a sweep would go on with this one.
            broken = record.content["status"] in ("failed", "interrupted")
            sys.modules["wandb"].finish(exit_code=int(broken))
        if in_sweep():
            # Lightning's reference cycles keep the data alive until a full collection, and a sweep
            # is many runs in one process.
            gc.collect()
    return run_outcome(record.content)


def _is_pruned(error: Exception) -> bool:
    if not in_trial():
        return False
    from optuna import TrialPruned

    return isinstance(error, TrialPruned)


def _fit_and_test(
    config: DictConfig, record: RunRecord, directory: Path, start: Start | None
) -> None:
    from hydra.utils import instantiate
    from lightning import seed_everything
    from lightning.pytorch.callbacks import LambdaCallback, ProgressBar
    from lightning.pytorch.utilities import rank_zero_only

    from bn_lightning.callbacks import DivergenceGuard, RunCheckpoints
    from bn_lightning.models.initialization import initialize
    from bn_lightning.runs.checkpoint import CONFIG_KEY, METRICS_KEY, check_fits
    from bn_lightning.runs.metrics_csv import truncate_metrics

    if in_sweep() and gc.get_freeze_count() == 0:
        # Libraries outlive the sweep: the collections after each run need not look at them.
        gc.freeze()
    check_config(config)
    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    datamodule = instantiate(config.data)
    model = instantiate(config.model)
    initialize(model.network, instantiate(config.init), config.seed)
    # Lightning keeps hyperparameters in every checkpoint, and evaluate.py builds from them.
    model.save_hyperparameters({CONFIG_KEY: record.content["config"]}, logger=False)
    callbacks = [instantiate(node) for node in config.callbacks.values() if node is not None]
    if in_sweep():
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if in_trial():
        for callback in callbacks:
            if isinstance(callback, RunCheckpoints):
                # Ctrl-C is the sweeper's: it lets running trials end.
                callback.handles_signals = False
    first_step = 0
    if start is not None:
        first_step = start.content["global_step"]
        # Once the checkpoint is loaded: whoever is refused leaves the run as it was.
        truncate = rank_zero_only(lambda *_: truncate_metrics(directory, first_step))
        callbacks.append(LambdaCallback(on_fit_start=truncate))
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=_loggers(config.logger),
        # Without this, Lightning adds a bar of its own.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )

    if in_sweep() and trainer.world_size > 1:
        raise ValueError(
            f"a job of a multirun expected one process, got {trainer.world_size}: the others would "
            "begin the multirun anew. Use hydra/sweeper=bn_optuna, which runs such a trial as a "
            "command of its own, or leave -m out"
        )

    metrics_before = {}
    if start is not None:
        check_fits(start.content, model, start.path)
        metrics_before = start.content.get(METRICS_KEY, {})
        print(f"going on from step {first_step:,}: {directory}")
        record.content["resumed_at"].append(first_step)
    elif trainer.is_global_zero and not in_sweep() and not in_trial():
        print(f"{config.task_name}: {trainer.max_steps:,} steps, in {directory}", flush=True)
    if trainer.world_size == 1:
        # Before the clock starts. On several ranks it is Lightning who says which one downloads.
        datamodule.prepare_data()
        datamodule.setup("fit")
        record.update(data=getattr(datamodule, "info", None))

    for logger in trainer.loggers:
        logger.log_hyperparams(record.content["config"])
    started = time.perf_counter()
    try:
        trainer.fit(
            model,
            datamodule=datamodule,
            ckpt_path=None if start is None else start.path,
            weights_only=True,
        )
    except RuntimeError as error:
        # The words of gloo for a collective whose other end is gone.
        if trainer.world_size > 1 and re.search(r"gloo.*(by peer|timed out)", str(error), re.I):
            raise RankLostError(
                "another rank of this run has ended, for the reason above if it could say one; the "
                "same command with ckpt_path=last goes on from the last checkpoint"
            ) from error
        _check_takes(model.network, getattr(datamodule, "input_shape", None))
        raise
    finally:
        seconds = time.perf_counter() - started
        record.content.update(
            steps=trainer.global_step,
            seconds=round(seconds, 3),
            steps_per_second=round((trainer.global_step - first_step) / seconds, 1),
            metrics=metrics_before | logged_numbers(trainer.callback_metrics),
        )

    record.content["data"] = getattr(datamodule, "info", None)
    metrics = record.content["metrics"]
    guards = [callback for callback in callbacks if isinstance(callback, DivergenceGuard)]
    diverged_at = next((guard.diverged_at for guard in guards if guard.diverged_at), None)
    if diverged_at is None:
        trainer.test(model, datamodule=datamodule, verbose=False)
    if config.extras.figures and trainer.is_global_zero and not in_trial():
        from bn_lightning.sweeps.report.run_matplotlib import draw_run

        draw_run(directory)
    # The last thing that a run leaves: what is killed before can be resumed.
    if diverged_at is None:
        record.end(
            "completed",
            data=getattr(datamodule, "info", None),  # the test, too, may have skipped images
            metrics=metrics | logged_numbers(trainer.callback_metrics),
        )
    else:
        record.end("diverged", metrics=metrics | model.chance_metrics(), diverged_at=diverged_at)
    if trainer.is_global_zero and not in_trial():
        if config.extras.batch_norms:
            print_batch_norms(model.state_dict(), record.content["config"].get("norm"))
        if config.extras.step_table:
            print_steps(directory)
        print_summary(record.content, directory)


def _check_takes(network: Any, shape: Sequence[int] | None) -> None:
    """Refuse a network that does not take inputs of this shape, where it is known."""
    import torch

    if shape is None:
        return
    weight = next(network.parameters())
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype))
    except RuntimeError as error:
        raise ValueError(
            f"`model.network` expected inputs of another shape than the data's, got {tuple(shape)}:"
            f" {error}; set its sizes, such as model.network.in_features, or take other data"
        ) from error


def _loggers(config: Any) -> list[Any]:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    loggers = []
    for name, node in config.items():  # the names are those of the options and of the extras
        try:
            loggers += [] if node is None else [instantiate(node)]
        except InstantiationException as error:
            if not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            raise ValueError(
                f"`logger={name}` expected its package to be installed, and it is not; pip install"
                f' -c constraints.txt -e ".[{name}]"'
            ) from error
    return loggers


main = hydra_command("train")(train)

if __name__ == "__main__":
    main()
