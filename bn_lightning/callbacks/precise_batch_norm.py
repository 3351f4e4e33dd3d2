"""Replaces running statistics by those of many examples under the current weights."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bn_lightning.callbacks.running_statistics import (
    average_over_ranks,
    average_statistics,
    reason_not_repeatable,
    second_pass,
    updates_statistics,
)

When = Literal["validation", "end"]


class PreciseBatchNorm(Callback):
    """Recomputes BatchNorm's running statistics before each validation, or at the end of training.

    The running averages of training mix batches that older weights processed. This callback runs
    `num_samples` training examples through the current network, in its training mode and without
    gradients, and averages the mean and the unbiased variance of their batches with equal weight
    per batch, in every BatchNorm layer that is training and that the forward calls. Across ranks it
    averages the statistics. The result replaces the running statistics in the validation, in the
    checkpoints after it, and in the further training.

    With gradient accumulation the batches are micro-batches, as in training, and the averages are
    exact for them. The gradients of training cannot be made exact afterwards: each micro-batch was
    normalized by its own statistics, not by those of the whole step (docs/plugin.md).

    The callback changes no other buffer (nor `num_batches_tracked`) and no random state (torch's,
    NumPy's, Python's, the loader's, its samplers'). Unlike `torch.optim.swa_utils.update_bn` it
    changes neither statistics nor mode of frozen layers.

    Args:
        num_samples: number of examples per rank, at least 2, rounded up to whole batches, and at
            most one pass over the data. For most networks 1,000 to 10,000 are enough.
        when: "validation" for before each validation in fit; "end" for once after training, which
            may be after `last.ckpt` is written with the running averages.
        dataloader: yields batches as the training loader does; None for a second, independent pass
            over the training loader. As in `update_bn`, a batch is the network's input, or a list
            or tuple that starts with it.

    Raises:
        ValueError: If an argument is out of range; at the start of training, if the loader cannot
            be iterated a second time during an epoch (several training loaders, persistent
            workers, an iterator).

    Source: Wu & Johnson 2021, arXiv 2105.07576, section 3.
    """

    def __init__(
        self, num_samples: int, when: When = "validation", dataloader: Iterable[Any] | None = None
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"expected `num_samples` to be at least 2, got {num_samples}")
        if when not in get_args(When):
            raise ValueError(f"expected `when` to be validation or end, got {when!r}")
        self.num_samples = num_samples
        self.when = when
        self.dataloader = dataloader
        self._training_modes: dict[nn.Module, bool] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_loader(trainer.train_dataloader, self.dataloader)
        # The modules themselves are kept because going through them takes long for each batch.
        self._modules = list(pl_module.modules())
        self._training_modes = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        # When validation starts, every module is in evaluation mode already.
        self._training_modes = {module: module.training for module in self._modules}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.when == "validation" and is_fit:
            self._recompute(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "end":
            self._recompute(trainer, pl_module)
        self._modules, self._training_modes = [], {}

    def _recompute(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = [
            module
            for module, training in self._training_modes.items()
            if training and isinstance(module, _BatchNorm) and updates_statistics(module)
        ]
        if not layers:
            return
        loader: Any = trainer.train_dataloader if self.dataloader is None else self.dataloader
        with second_pass(trainer, pl_module, loader) as inputs:
            count = average_statistics(
                pl_module, layers, inputs, num_samples=self.num_samples, modes=self._training_modes
            )
        if count == 0:
            raise ValueError("expected PreciseBatchNorm's loader to have a batch, got none")
        average_over_ranks(trainer, layers)


def _check_loader(training: Any, own: Iterable[Any] | None) -> None:
    """Check that a copy of `own`, or else of the training loader, can be iterated independently."""
    if own is not None:
        got = "an iterator" if isinstance(own, Iterator) else None
    elif isinstance(training, list | tuple | dict):
        got = "several"
    else:
        got = reason_not_repeatable(training)
    if got is None:
        return
    raise ValueError(
        "expected a training loader that PreciseBatchNorm can iterate a second time during an"
        f" epoch, got {got}; pass such a `dataloader`, whose batches the network's forward takes"
    )
