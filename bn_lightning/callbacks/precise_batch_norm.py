"""Running statistics replaced by those of many examples under the weights of the moment."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

When = Literal["validation", "end"]


class PreciseBatchNorm(Callback):
    """Estimates the population's mean and variance anew before each validation, or at the end.

    The running averages of training mix batches that went through older weights. This takes
    `num_samples` training examples through the network as it is, in the mode it trains in and
    without gradients, and averages the mean and unbiased variance of their batches, each batch of
    equal weight, in every BatchNorm layer that trains. The result replaces the running statistics,
    is what the validation and the checkpoints after it see, and is where the running averages go on
    from. `num_batches_tracked` and the random streams of the run are left alone. Across ranks the
    statistics are averaged.

    It differs from `torch.optim.swa_utils.update_bn` in what it spares: frozen layers keep their
    statistics and their mode.

    Args:
        num_samples: examples on each rank; fewer where the data are fewer. 1,000 to 10,000 are
            enough for most networks.
        when: "validation" for before each validation of a fit, "end" for once after training.
        dataloader: batches as the training loader yields them; None for a second, independent pass
            over the training loader. As in `update_bn` a batch is the network's input, or a list or
            tuple that begins with it.

    Raises:
        ValueError: an argument out of range; at the start of training, a training loader that
            cannot be read a second time meanwhile (several loaders, or persistent workers).

    Source: Wu & Johnson 2021, arXiv 2105.07576, section 3.
    """

    def __init__(
        self, num_samples: int, when: When = "validation", dataloader: Iterable[Any] | None = None
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"`num_samples` expected at least 2, got {num_samples}")
        if when not in get_args(When):
            raise ValueError(f"`when` expected one of {', '.join(get_args(When))}, got {when!r}")
        self.num_samples = num_samples
        self.when = when
        self.dataloader = dataloader
        self._modules: list[nn.Module] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = _second_reader(trainer.train_dataloader, self.dataloader)
        self._modules = list(pl_module.modules())

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        # Remembered here, because every module is in evaluation mode when a validation starts.
        self._modes = [(module, module.training) for module in self._modules]

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "validation" and self._modes and not trainer.sanity_checking:
            self._estimate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "end" and self._modes:
            self._estimate(trainer, pl_module)
        self._modes, self._modules = [], []

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = [
            module
            for module, training in self._modes
            if training and isinstance(module, _BatchNorm) and _follows(module)
        ]
        if not layers:
            return
        with (
            _in_modes(self._modes),
            _averaging(layers),
            isolate_rng(),
            _same_generator(self._batches),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            seen = 0
            for batch in copy.copy(self._batches):
                batch = trainer.strategy.batch_to_device(batch)
                x = batch[0] if isinstance(batch, list | tuple) else batch
                pl_module(x)
                seen += len(x)
                if seen >= self.num_samples:
                    break
            if seen == 0:
                raise ValueError(
                    "PreciseBatchNorm expected a loader with a batch, got an empty one"
                )
        if trainer.world_size > 1:
            for layer in layers:
                for buffer in layer.buffers(recurse=False):
                    if buffer.is_floating_point():
                        buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


def _second_reader(training: Any, own: Iterable[Any] | None) -> Any:
    """What to iterate over: `own`, else the training loader where a copy of it is independent."""
    if own is not None:
        return own
    several = isinstance(training, list | tuple | dict)
    if several or getattr(training, "persistent_workers", False):
        raise ValueError(
            "PreciseBatchNorm expected a training loader that can be read a second time meanwhile, "
            f"got {'several' if several else 'one with persistent_workers=True'}; pass "
            "`dataloader`, whose batches the network's forward takes"
        )
    return training


def _follows(layer: _BatchNorm) -> bool:
    """Whether the running statistics follow the batches in training."""
    frozen = getattr(layer, "stats_frozen", False)
    return layer.track_running_stats and layer.running_mean is not None and not frozen


@contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    before = [module.training for module, _ in modes]
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for (module, _), training in zip(modes, before, strict=True):
            module.training = training


@contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[None]:
    """Lets `layers` average over what goes through them; after an error they are as before."""
    momenta = [layer.momentum for layer in layers]
    buffers = [
        [(buffer, buffer.clone()) for buffer in layer.buffers(recurse=False)] for layer in layers
    ]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    except BaseException:
        for buffer, before in chain(*buffers):
            buffer.copy_(before)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for buffer, before in chain(*buffers):
        if not buffer.is_floating_point():  # num_batches_tracked
            buffer.copy_(before)


@contextmanager
def _same_generator(loader: Any) -> Iterator[None]:
    """Gives a loader that shuffles by a generator of its own the same order afterwards."""
    generator = getattr(loader, "generator", None)
    if generator is None:
        yield
        return
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
