"""Compares the data with those of the checkpoint from which a fit resumes."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class ChangedDataError(ValueError):
    """Raised when a fit resumes with other data than those of its checkpoint."""


class SameData(Callback):
    """Compares the SHA-256 of the data with that in the checkpoint from which `fit` resumes.

    The hashes are the data module's `info["sha256"]`: of the decompressed content of each file, of
    each table, or of the names and sizes of an image folder's files (`list_images`). The callback
    compares nothing if the data module or the checkpoint has no hashes. It does not check
    evaluations: a checkpoint may be tested on any data.

    Args:
        allow_changed: whether to warn instead of raising, and to restart the epoch's batches,
            because the position in other data has no meaning.

    Raises:
        ChangedDataError: If `fit` resumes with other data.
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
            "expected the data of the checkpoint `ckpt_path`, got another"
            f" {', '.join(changed)} (by SHA-256)"
        )
        if not self.allow_changed:
            raise ChangedDataError(
                f"{what}; restore the data, start a new run, or set resume.allow_changed_data=true"
            )
        rank_zero_warn(f"{what}; restarting the epoch's batches, as allow_changed_data=true")
        # Makes Lightning start with the first batch.
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = []
