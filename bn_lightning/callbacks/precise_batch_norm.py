"""Running statistics replaced by those of many examples under the weights of the moment."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

When = Literal["validation", "end"]


class PreciseBatchNorm(Callback):
    """Estimates the population's mean and variance anew before each validation, or at the end.

    The running averages of training mix batches that went through older weights. This takes
    `num_samples` training examples through the network as it is, in the mode it trains in and
    without gradients, and averages the mean and unbiased variance of their batches, each batch of
    equal weight, in every BatchNorm layer that trains and that the network's forward uses. The
    result replaces the running statistics, is what the validation and the checkpoints after it see,
    and is where the running averages go on from. Across ranks the statistics are averaged.

    All other buffers, `num_batches_tracked` among them, and the random streams of the run (torch's,
    NumPy's, Python's, those of the loader and its samplers) are left alone.

    It differs from `torch.optim.swa_utils.update_bn` in what it spares: frozen layers keep their
    statistics and their mode.

    Args:
        num_samples: examples on each rank, rounded up to whole batches; fewer where the data are
            fewer. 1,000 to 10,000 are enough for most networks.
        when: "validation" for before each validation of a fit, "end" for once after training, when
            `last.ckpt` may be written already, with the running averages.
        dataloader: batches as the training loader yields them; None for a second, independent pass
            over the training loader. As in `update_bn` a batch is the network's input, or a list or
            tuple that begins with it.

    Raises:
        ValueError: an argument out of range; at the start of training, a loader that cannot be read
            a second time meanwhile (several training loaders, one with persistent workers, an
            iterator).

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
        _check_readable_again(trainer.train_dataloader, self.dataloader)
        self._modules, self._modes = list(pl_module.modules()), []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        # Remembered here, because every module is in evaluation mode when a validation starts.
        self._modes = [(module, module.training) for module in self._modules]

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_a_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.when == "validation" and of_a_fit:
            self._estimate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "end":
            self._estimate(trainer, pl_module)
        self._modules, self._modes = [], []

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = [
            module
            for module, training in self._modes
            if training and isinstance(module, _BatchNorm) and _follows(module)
        ]
        if not layers:
            return
        own = self.dataloader
        loader: Any = trainer.train_dataloader if own is None else own
        with (
            # Lightning validates in inference mode, whose tensors, if the data set keeps some that
            # it makes now, could not be trained with.
            torch.inference_mode(False),
            torch.no_grad(),
            isolate_rng(include_cuda=pl_module.device.type == "cuda"),
            _same_generators(loader),
            _in_modes(self._modes),
            _averaging(pl_module, layers),
            trainer.precision_plugin.forward_context(),
        ):
            self._read(copy.copy(loader), trainer, pl_module)
        if trainer.world_size > 1:
            for layer in layers:
                for average in _averages(layer):
                    average.copy_(trainer.strategy.reduce(average.clone(), reduce_op="mean"))

    def _read(self, loader: Iterable[Any], trainer: Trainer, pl_module: LightningModule) -> None:
        seen = 0
        for batch in loader:
            # What the training loop does to a batch, in its order; no public name calls the hook.
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            x = batch[0] if isinstance(batch, list | tuple) else batch
            pl_module(x)
            seen += len(x)
            if seen >= self.num_samples:
                return
        if seen == 0:
            raise ValueError("PreciseBatchNorm expected a loader with a batch, got an empty one")


def _check_readable_again(training: Any, own: Iterable[Any] | None) -> None:
    """Refuses a loader of which a copy is not independent: `own`, or else the training loader."""
    loader = training if own is None else own
    if isinstance(loader, Iterator):
        got = "an iterator"
    elif own is None and isinstance(training, list | tuple | dict):
        got = "several"
    elif own is None and getattr(training, "persistent_workers", False):
        got = "one with persistent_workers=True"
    else:
        return
    raise ValueError(
        "PreciseBatchNorm expected a training loader that can be read a second time meanwhile, got "
        f"{got}; pass a `dataloader` that can, whose batches the network's forward takes"
    )


def _follows(layer: _BatchNorm) -> bool:
    """Whether the running statistics follow the batches in training."""
    frozen = getattr(layer, "stats_frozen", False)
    return layer.track_running_stats and layer.running_mean is not None and not frozen


def _averages(layer: _BatchNorm) -> list[Tensor]:
    return [x for x in (layer.running_mean, layer.running_var) if x is not None]


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
def _averaging(network: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Lets `layers` average over what goes through them, and keeps the buffers of all others.

    After an error, and where nothing went through, these are as before too.
    """
    momenta = [layer.momentum for layer in layers]
    # One that was made in inference mode cannot change here.
    before = [(x, x.clone()) for x in network.buffers() if not x.is_inference()]
    replaced: set[int] = set()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
        replaced = {
            id(x) for layer in layers if layer.num_batches_tracked for x in _averages(layer)
        }
    finally:
        for buffer, value in before:
            if id(buffer) not in replaced:
                buffer.copy_(value)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def _same_generators(loader: Any) -> Iterator[None]:
    """Gives a loader whose samplers draw from generators of their own the same order afterwards."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in (loader, batch_sampler, *samplers)]
    states = [(x, x.get_state()) for x in found if isinstance(x, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
