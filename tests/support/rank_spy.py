"""A callback that leaves each rank's learning rate in a file of its own."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class RankSpy(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        (self.folder / f"rank{trainer.global_rank}").write_text(str(rate))
