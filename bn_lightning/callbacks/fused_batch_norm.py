"""Converts and fuses a model's BatchNorms for the duration of a run."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from bn_lightning.conversion.convert import (
    Conversion,
    convert_model,
    fusion_counts,
    is_converted,
    revert_batchnorm,
)


class FusedBatchNorm(Callback):
    """Converts the model's BatchNorms to this package's at the start, and reverts them at the end.

    Works in fit, validate, test and predict. Parameters, optimizers and the keys of the
    `state_dict` are those of the original model, so checkpoints load with and without this
    callback; a copy or a pickle of the model made during the run has torch's BatchNorms. Prints one
    line about what it converted, and one after the first batch about what ran fused; the attribute
    `conversion` has the details of the former (None before), `fusion_counts` of the latter.
    A model is converted at setup, or after its `configure_model` if it has one.

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
        self._is_due = False
        self._reverts = False
        self._has_printed = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_due = True
        if not is_overridden("configure_model", pl_module):
            self._convert(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._convert(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._convert(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._convert(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._convert(pl_module)

    def _convert(self, pl_module: LightningModule) -> None:
        if not self._is_due:
            return
        self._is_due = False
        # `_reverts` is still set if an earlier setup of this callback had no teardown.
        self._reverts = self.revert and (self._reverts or not is_converted(pl_module))
        self.conversion = convert_model(
            pl_module, fuse=self.fuse, backend=self.backend, is_temporary=self._reverts
        )
        self._has_printed = not self.conversion.fusable
        skipped = self.conversion.skipped
        message = (
            f"BatchNorm: {len(self.conversion.converted)} converted, {len(self.conversion.fusable)}"
            f" may be fused, {len(skipped)} skipped"
        )
        if skipped:
            name, reason = next(iter(skipped.items()))
            message += f"; first {name or 'the model itself'}: {reason}"
        rank_zero_info(message)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._print_counts(pl_module)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        self._print_counts(pl_module)

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._print_counts(pl_module)

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._print_counts(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._revert(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._revert(pl_module)

    def _print_counts(self, pl_module: LightningModule) -> None:
        if not self._has_printed:
            self._has_printed = True
            counts = fusion_counts(pl_module).values()
            fused = sum(count.fused > 0 for count in counts)
            rank_zero_info(f"BatchNorm: {fused} of {len(counts)} ran fused in the first batch")

    def _revert(self, pl_module: LightningModule) -> None:
        if self._reverts:
            revert_batchnorm(pl_module)
            self._reverts = False
