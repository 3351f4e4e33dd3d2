"""Test a checkpoint: `python -m bn_lightning.evaluate ckpt_path=PATH [data=OPTION]`."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.command import hydra_command, one_line, quiet_lightning
from bn_lightning.cli.run_table import print_summary
from bn_lightning.runs.checkpoint import check_data, load_checkpoint, trained_model, trusted_config
from bn_lightning.runs.record import RunRecord, logged_numbers
from bn_lightning.runs.trust import OF_CONFIGURATIONS, check_trusted


def evaluate(config: DictConfig) -> dict[str, float]:
    """Print and write the test metrics of a checkpoint; return them.

    Args:
        config: composed from `conf/evaluate.yaml`. `run.json` is written to `paths.output_dir`.

    Raises:
        CheckpointError: the file is no checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build what it may not.
    """
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_trusted(resolved, OF_CONFIGURATIONS, config.trusted, "the configuration")
    directory = Path(config.paths.output_dir)
    checkpoint = load_checkpoint(config.ckpt_path)
    run_config = trusted_config(checkpoint, config.trusted, config.ckpt_path)
    resolved["data"] = resolved.get("data") or run_config["data"]
    resolved["model"] = run_config["model"]
    record = RunRecord(directory, resolved)
    record.update()
    try:
        _test(resolved, checkpoint, record)
    except Exception as error:
        record.end("failed", error=one_line(error))
        raise
    print_summary(record.content, directory)
    return record.content["metrics"]


def _test(config: dict[str, Any], checkpoint: dict[str, Any], record: RunRecord) -> None:
    from hydra.utils import instantiate

    quiet_lightning()
    datamodule = instantiate(config["data"])
    model = trained_model(checkpoint, config, config["ckpt_path"])
    check_data(checkpoint, datamodule)
    trainer = instantiate(
        config["trainer"], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.test(model, datamodule=datamodule, verbose=False)
    record.end(
        "completed",
        data=getattr(datamodule, "info", None),
        metrics=logged_numbers(trainer.callback_metrics),
        steps=checkpoint["global_step"],
    )


main = hydra_command("evaluate")(evaluate)

if __name__ == "__main__":
    main()
