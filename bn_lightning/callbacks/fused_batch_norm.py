"""Converts and fuses a model's BatchNorms for the duration of a run."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bn_lightning.conversion.convert import (
    Conversion,
    convert_batchnorm,
    is_converted,
    revert_batchnorm,
)


class FusedBatchNorm(Callback):
    """Converts the model's BatchNorms to this package's at setup, and reverts them at the end.

    Works in fit, validate, test and predict. Parameters, optimizers and the keys of the
    `state_dict` are those of the original model, so checkpoints load with and without this
    callback. Prints one line about what it converted; the attribute `conversion` has the details
    (None before setup). Layers that `configure_model` creates after setup are not converted.

    Args:
        fuse: whether to fuse each BatchNorm with the addition and activation that follow it.
        revert: whether to revert the model at the end, or after an error. A model that was already
            converted before stays converted.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.
    """

    def __init__(self, *, fuse: bool = True, revert: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.fuse = fuse
        self.revert = revert
        self.backend = backend
        self.conversion: Conversion | None = None
        self._reverts = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # `_reverts` is still set if an earlier setup of this callback had no teardown.
        self._reverts = self.revert and (self._reverts or not is_converted(pl_module))
        self.conversion = convert_batchnorm(pl_module, fuse=self.fuse, backend=self.backend)
        skipped = self.conversion.skipped
        message = (
            f"BatchNorm: {len(self.conversion.converted)} converted, {len(self.conversion.fused)} "
            f"fused, {len(skipped)} skipped"
        )
        if skipped:
            name, reason = next(iter(skipped.items()))
            message += f"; first {name or 'the model itself'}: {reason}"
        rank_zero_info(message)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._revert(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._revert(pl_module)

    def _revert(self, pl_module: LightningModule) -> None:
        if self._reverts:
            revert_batchnorm(pl_module)
            self._reverts = False
