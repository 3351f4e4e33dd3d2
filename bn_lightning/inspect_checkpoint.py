"""Show the BatchNorms of a checkpoint: `python -m bn_lightning.inspect_checkpoint ckpt_path=PATH`.

Takes any Lightning checkpoint: only tensors and plain values are read, and nothing is built.
"""

from omegaconf import DictConfig

from bn_lightning.cli.batch_norm_table import print_batch_norms
from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.cli.command import hydra_command
from bn_lightning.runs.checkpoint import CONFIG_KEY, load_checkpoint


def inspect_checkpoint(config: DictConfig) -> None:
    """Print what each BatchNorm of a checkpoint holds for each of its channels.

    Args:
        config: composed from `conf/inspect.yaml`.

    Raises:
        CheckpointError: there is no such file, or it is not a Lightning checkpoint.
    """
    checkpoint = load_checkpoint(checkpoint_path(config))
    # momentum and eps are not tensors. A checkpoint of bn_lightning.train has them in its config.
    hyper_parameters = checkpoint.get("hyper_parameters") or {}
    run_config = hyper_parameters.get(CONFIG_KEY)
    norm = run_config.get("norm") if isinstance(run_config, dict) else None
    print_batch_norms(checkpoint["state_dict"], norm)


main = hydra_command(inspect_checkpoint, "inspect")

if __name__ == "__main__":
    main()
