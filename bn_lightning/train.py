"""Train a network: `python -m bn_lightning.train +experiment=mnist_bn`.

Composes the configuration, seeds, fits, tests, and leaves a run (see run_record.py).
"""

import gc
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.batch_norm_table import print_batch_norms
from bn_lightning.command import hydra_command, in_sweep, one_line, quiet_lightning
from bn_lightning.config_check import check_config, check_nodes
from bn_lightning.interruption import Interrupted
from bn_lightning.run_directory import LAST
from bn_lightning.run_record import RunRecord, logged_numbers, read_run, run_outcome
from bn_lightning.summary import print_steps, print_summary
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.trust import OF_CONFIGURATIONS, check_trusted

# A run is one configuration: resuming may change how it is run and watched, not what is trained.
_FREE_ON_RESUME = {
    "callbacks",
    "ckpt_path",
    "extras",
    "logger",
    "paths",
    "task_name",
    "trainer",
    "trusted",
}

_KEPT_ON_RESUME = ("started", "resumed_at", "data", "metrics", "steps", "seconds")


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

    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_nodes(resolved)
    if config.extras.num_threads is not None:
        torch.set_num_threads(config.extras.num_threads)
    check_trusted(resolved, OF_CONFIGURATIONS, config.trusted, "the configuration")
    directory = Path(config.paths.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # set on the function
    record = RunRecord(directory, resolved, write=is_first_rank)
    ckpt_path = None
    if config.ckpt_path is not None:
        ckpt_path = directory / LAST if config.ckpt_path == "last" else Path(config.ckpt_path)
        _go_on(record, directory, ckpt_path, config.trainer.max_steps)
    record.update()
    try:
        _fit_and_test(config, record, directory, ckpt_path)
    except Interrupted as interrupted:
        record.end("interrupted")
        if not in_trial():
            print(f"interrupted by {interrupted}: {directory}")
            if (directory / LAST).exists():
                print("the same command with ckpt_path=last goes on from its last checkpoint")
        raise
    except Exception as error:
        if not _is_pruned(error):
            record.end("failed", error=one_line(error))
            raise
        record.end("pruned")
        if is_first_rank:  # the others end as after any run
            raise
    finally:
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
    config: DictConfig, record: RunRecord, directory: Path, ckpt_path: Path | None
) -> None:
    from hydra.utils import instantiate
    from lightning import seed_everything
    from lightning.pytorch.callbacks import ProgressBar

    from bn_lightning.callbacks import DivergenceGuard, RunCheckpoints
    from bn_lightning.checkpoint import CONFIG_KEY, check_fits, load_checkpoint
    from bn_lightning.metrics_csv import truncate_metrics
    from bn_lightning.models.initialization import initialize

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
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=[instantiate(node) for node in config.logger.values() if node is not None],
        # Without this, Lightning adds a bar of its own.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )

    if in_sweep() and trainer.world_size > 1:
        raise ValueError(
            f"a job of a multirun expected one process, got {trainer.world_size}: the others would "
            "begin the multirun anew. Use hydra/sweeper=bn_optuna, which runs such a trial as a "
            "command of its own, or leave -m out"
        )

    first_step = 0
    if ckpt_path is not None:
        checkpoint = load_checkpoint(ckpt_path)
        check_fits(checkpoint, model, ckpt_path)
        first_step = checkpoint["global_step"]
        print(f"going on from step {first_step:,}: {directory}")
        truncate_metrics(directory, first_step)
        record.content["resumed_at"].append(first_step)
    if trainer.world_size == 1:
        # Before the clock starts. On several ranks it is Lightning who says which one downloads.
        datamodule.prepare_data()
        datamodule.setup("fit")
        record.update(data=getattr(datamodule, "info", None))

    started = time.perf_counter()
    try:
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    finally:
        seconds = time.perf_counter() - started
        record.content.update(
            steps=trainer.global_step,
            seconds=round(seconds, 3),
            steps_per_second=round((trainer.global_step - first_step) / seconds, 1),
            metrics=logged_numbers(trainer.callback_metrics),
        )

    record.content["data"] = getattr(datamodule, "info", None)
    metrics = record.content["metrics"]
    guards = [callback for callback in callbacks if isinstance(callback, DivergenceGuard)]
    diverged_at = next((guard.diverged_at for guard in guards if guard.diverged_at), None)
    if diverged_at is None:
        trainer.test(model, datamodule=datamodule, verbose=False)
        record.end(
            "completed",
            data=getattr(datamodule, "info", None),  # the test, too, may have skipped images
            metrics=metrics | logged_numbers(trainer.callback_metrics),
        )
    else:
        record.end("diverged", metrics=metrics | model.chance_metrics(), diverged_at=diverged_at)
    if trainer.is_global_zero and not in_trial():
        if config.extras.figures:
            from bn_lightning.sweeps.figures import draw_run

            draw_run(directory)
        if config.extras.batch_norms:
            print_batch_norms(model.state_dict(), record.content["config"].get("norm"))
        if config.extras.step_table:
            print_steps(directory)
        print_summary(record.content, directory)


def _go_on(record: RunRecord, directory: Path, ckpt_path: Path, max_steps: int) -> None:
    """Take over what the run's record already holds, if there is something to go on with.

    Raises:
        ValueError: the checkpoint has all the steps already, or the configuration is another one.
    """
    from bn_lightning.checkpoint import load_checkpoint

    steps = load_checkpoint(ckpt_path)["global_step"]
    if steps >= max_steps:
        raise ValueError(
            f"`ckpt_path` expected a checkpoint with less than trainer.max_steps={max_steps} "
            f"steps, got {steps} in {ckpt_path}; raise trainer.max_steps, or leave ckpt_path out "
            "to start a new run"
        )
    if not (directory / "run.json").exists():
        return  # The checkpoint lies outside a run: a new one starts from it.
    before = read_run(directory)
    old, new = (
        {key: value for key, value in content["config"].items() if key not in _FREE_ON_RESUME}
        for content in (before, record.content)
    )
    for config in (old, new):
        # The same files may lie elsewhere by now; their hashes are in the record.
        free = ("root", "num_workers")
        config["data"] = {k: v for k, v in config["data"].items() if k not in free}
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(
            f"`ckpt_path` expected the configuration that the run in {directory} began with, got "
            f"another {', '.join(changed)}; repeat its overrides, or leave ckpt_path out to start "
            "a new run"
        )
    record.content.update({key: before[key] for key in _KEPT_ON_RESUME if key in before})


main = hydra_command("train")(train)

if __name__ == "__main__":
    main()
