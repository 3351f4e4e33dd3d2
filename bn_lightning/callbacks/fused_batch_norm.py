"""Runs a model that has torch's BatchNorm with this package's, and gives it back as it was."""

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
    """Converts the model's BatchNorms at setup, and gives the model back as it was at the end.

    In fit, validate, test and predict. Parameters, optimisers and the keys of the `state_dict` are
    the model's own: checkpoints are those of the model without this callback, and load both ways.
    Says in one line what it did; `conversion` holds all of it, and is None before. Layers that
    `configure_model` makes come after setup, and are not converted.

    Args:
        fuse: whether to compute BatchNorm in one with the activation or addition that follows it.
        revert: whether to give the model back at the end, or when an error ends the run. A model
            that was converted before stays converted.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.
    """

    def __init__(self, fuse: bool = True, revert: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.fuse = fuse
        self.revert = revert
        self.backend = backend
        self.conversion: Conversion | None = None
        self._reverts = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # An earlier setup of this callback, not ended: what it converted is still to be reverted.
        self._reverts = self.revert and (self._reverts or not is_converted(pl_module))
        self.conversion = convert_batchnorm(pl_module, fuse=self.fuse, backend=self.backend)
        skipped = self.conversion.skipped
        said = (
            f"BatchNorm: {len(self.conversion.converted)} converted, {len(self.conversion.fused)} "
            f"fused, {len(skipped)} left alone"
        )
        if skipped:
            name, why = next(iter(skipped.items()))
            said += f"; first {name or 'the model itself'}: {why}"
        rank_zero_info(said)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back(pl_module)

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._reverts:
            revert_batchnorm(pl_module)
            self._reverts = False
