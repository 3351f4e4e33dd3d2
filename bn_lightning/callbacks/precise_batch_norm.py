"""Replaces running statistics by those of many examples under the current weights."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bn_lightning.modules.preserve_state import preserve_generators, preserve_state

When = Literal["validation", "end"]


class PreciseBatchNorm(Callback):
    """Recomputes BatchNorm's running statistics before each validation, or at the end of training.

    The running averages of training mix batches that older weights processed. This callback runs
    `num_samples` training examples through the current network, in its training mode and without
    gradients, and averages the mean and the unbiased variance of their batches with equal weight
    per batch, in every BatchNorm layer that is training and that the forward calls. Across ranks it
    averages the statistics. The result replaces the running statistics in the validation, in the
    checkpoints after it, and in the further training.

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
            if training and isinstance(module, _BatchNorm) and _updates_statistics(module)
        ]
        if not layers:
            return
        loader: Any = trainer.train_dataloader if self.dataloader is None else self.dataloader
        with (
            # Lightning validates in inference mode. If the data set caches tensors now, training
            # could not use inference tensors.
            torch.inference_mode(False),
            torch.no_grad(),
            preserve_state(pl_module),
            preserve_generators(loader),
            _cumulative_average(layers),
            trainer.precision_plugin.forward_context(),
        ):
            for module, training in self._training_modes.items():
                module.training = training
            self._forward_batches(copy.copy(loader), trainer, pl_module)
            used = [layer for layer in layers if layer.num_batches_tracked]
            averages = [x.clone() for x in _running_statistics(used)]
        for x, average in zip(_running_statistics(used), averages, strict=True):
            x.copy_(average)
        if trainer.world_size > 1:
            for x in _running_statistics(layers):
                x.copy_(trainer.strategy.reduce(x.clone(), reduce_op="mean"))

    def _forward_batches(
        self, loader: Iterable[Any], trainer: Trainer, pl_module: LightningModule
    ) -> None:
        count = 0
        for batch in loader:
            # The training loop's order. There is no public function for the hook.
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            x = batch[0] if isinstance(batch, list | tuple) else batch
            pl_module(x)
            count += len(x)
            if count >= self.num_samples:
                return
        if count == 0:
            raise ValueError("expected PreciseBatchNorm's loader to have a batch, got none")


def _check_loader(training: Any, own: Iterable[Any] | None) -> None:
    """Check that a copy of `own`, or else of the training loader, can be iterated independently."""
    if isinstance(training if own is None else own, Iterator):
        got = "an iterator"
    elif own is None and isinstance(training, list | tuple | dict):
        got = "several"
    elif own is None and getattr(training, "persistent_workers", False):
        got = "one with persistent_workers=True"
    else:
        return
    raise ValueError(
        "expected a training loader that PreciseBatchNorm can iterate a second time during an"
        f" epoch, got {got}; pass such a `dataloader`, whose batches the network's forward takes"
    )


def _updates_statistics(layer: _BatchNorm) -> bool:
    """Return whether training batches change the running statistics."""
    frozen = getattr(layer, "stats_frozen", False)
    return layer.track_running_stats and layer.running_mean is not None and not frozen


def _running_statistics(layers: Iterable[_BatchNorm]) -> list[Tensor]:
    both = [x for layer in layers for x in (layer.running_mean, layer.running_var)]
    return [x for x in both if x is not None]


@contextmanager
def _cumulative_average(layers: list[_BatchNorm]) -> Iterator[None]:
    """Average the statistics of all batches in `layers`, and restore their momentum."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
