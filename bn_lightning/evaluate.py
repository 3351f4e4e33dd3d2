"""Test a checkpoint: `python -m bn_lightning.evaluate ckpt_path=PATH [data=OPTION]`."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.cli.error_line import format_error
from bn_lightning.cli.run_table import print_run_table
from bn_lightning.cli.trainer_builder import build_trainer, print_profile
from bn_lightning.runs.checkpoint import TrainedCheckpoint
from bn_lightning.runs.record import RunRecord, logged_numbers


def evaluate(config: DictConfig) -> dict[str, float]:
    """Test a checkpoint, write `run.json` to `paths.output_dir`, and return the metrics.

    Args:
        config: composed from `conf/evaluate.yaml`.

    Raises:
        CheckpointError: the file is not a checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build something that it may not build.
    """
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    directory = Path(config.paths.output_dir)
    checkpoint = TrainedCheckpoint.read(checkpoint_path(config), config.trusted)
    record_config = resolved | {
        "ckpt_path": checkpoint.path,
        "data": resolved.get("data") or checkpoint.config["data"],
        "model": checkpoint.config["model"],
    }
    record = RunRecord(directory, record_config)
    record.update()
    try:
        _test(resolved, checkpoint, record)
    except Exception as error:
        record.end("failed", error=format_error(error))
        raise
    print_profile(directory)
    print_run_table(record.content, directory, checkpoint.config)
    return record.content["metrics"]


def _test(config: dict[str, Any], checkpoint: TrainedCheckpoint, record: RunRecord) -> None:
    from bn_lightning.data.protocol import InfoCheck, check_data_module, data_info

    quiet_lightning()
    datamodule = checkpoint.build_data(config.get("data"))
    check_data_module(datamodule)
    model = checkpoint.build_model()
    trainer = build_trainer(
        OmegaConf.create(config["trainer"]),
        record.path.parent,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.callbacks.append(InfoCheck())
    trainer.test(model, datamodule=datamodule, verbose=False)
    record.end(
        "completed",
        data=data_info(datamodule),
        metrics=logged_numbers(trainer.callback_metrics),
        steps=checkpoint.content["global_step"],
    )


main = hydra_command(evaluate, "evaluate")

if __name__ == "__main__":
    main()
