"""Keeps what tells the data apart in every checkpoint, and refuses to go on with other data."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class ChangedDataError(ValueError):
    """Other data than those that a checkpoint was made with."""


class SameData(Callback):
    """Compares the SHA-256 of the data with those in the checkpoint that `fit` goes on from.

    They are those of the data module's `info["sha256"]`, of what it has read: of each file's
    decompressed payload, or of each table; of an image folder, of the names and sizes of its files
    (`list_images`). Where a data module has none, or the checkpoint was made without this callback,
    nothing is compared. Evaluating is free: a checkpoint may be tested on any data.

    Args:
        allow_changed: warn instead, and begin the epoch's batches anew: the position among those of
            other data means nothing.

    Raises:
        ChangedDataError: going on, with other data.
    """

    def __init__(self, allow_changed: bool) -> None:
        super().__init__()
        self.allow_changed = allow_changed
        self._sha256: dict[str, str] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning sets the data module up before any callback.
        info = getattr(getattr(trainer, "datamodule", None), "info", {})
        self._sha256 = info.get("sha256")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sha256": self._sha256}

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        before = checkpoint["callbacks"].get(self.state_key, {}).get("sha256")
        if before is None or self._sha256 is None or before == self._sha256:
            return
        names = sorted(before.keys() | self._sha256.keys())
        changed = [name for name in names if before.get(name) != self._sha256.get(name)]
        what = (
            "`ckpt_path` expected the data that the checkpoint was made with, got another"
            f" {', '.join(changed)} (by SHA-256)"
        )
        if not self.allow_changed:
            raise ChangedDataError(
                f"{what}; restore the data, start a new run, or set resume.allow_changed_data=true"
            )
        rank_zero_warn(f"{what}; as allow_changed_data is true, the epoch's batches begin anew")
        # Lightning then begins with the loader's first batch.
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = []
