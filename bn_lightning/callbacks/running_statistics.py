"""What the callbacks share that replace running statistics or keep them."""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from bn_lightning.modules.preserve_state import preserve_generators, preserve_state


def batch_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of a network by name; a shared one has each of its names."""
    modules = network.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, _BatchNorm)}


def updates_statistics(layer: _BatchNorm) -> bool:
    """Return whether training batches change the running statistics of a layer."""
    frozen = getattr(layer, "stats_frozen", False)
    return layer.track_running_stats and layer.running_mean is not None and not frozen


def average_statistics(
    network: nn.Module,
    layers: list[_BatchNorm],
    inputs: Iterable[Any],
    *,
    num_samples: int | None,
    modes: Mapping[nn.Module, bool],
) -> int:
    """Replace the running statistics of `layers` by their averages over the batches of `inputs`.

    The mean and the unbiased variance of each batch have equal weight. Layers that the forward does
    not call keep their statistics. Nothing else of the network changes, no random state does, and
    after an error nothing at all.

    Args:
        network: its forward takes an input.
        layers: BatchNorms of the network that update their statistics.
        inputs: each (N, ...), or a dict of such tensors.
        num_samples: number of samples to use, rounded up to whole batches; None for all.
        modes: `training` of modules during the forwards.

    Returns:
        The number of samples used.
    """
    momenta = [layer.momentum for layer in layers]
    count = 0
    with torch.no_grad(), preserve_state(network):
        try:
            for module, training in modes.items():
                module.training = training
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
            for x in inputs:
                network(x)
                count += next(len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
                if num_samples is not None and count >= num_samples:
                    break
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        used = [layer for layer in layers if layer.num_batches_tracked]
        averages = [x.clone() for x in _running_statistics(used)]
    for x, average in zip(_running_statistics(used), averages, strict=True):
        x.copy_(average)
    return count


def average_over_ranks(trainer: Trainer, layers: Iterable[_BatchNorm]) -> None:
    """Replace the running statistics of layers by their averages over the ranks."""
    if trainer.world_size > 1:
        for x in _running_statistics(layers):
            x.copy_(trainer.strategy.reduce(x.clone(), reduce_op="mean"))


def _running_statistics(layers: Iterable[_BatchNorm]) -> list[Tensor]:
    both = [x for layer in layers for x in (layer.running_mean, layer.running_var)]
    return [x for x in both if x is not None]


def reason_not_repeatable(loader: Any) -> str | None:
    """Return why a loader that is being iterated cannot be iterated anew; None if it can."""
    if isinstance(loader, Iterator):
        return "an iterator"
    if getattr(loader, "persistent_workers", False):
        return "one with persistent_workers=True"
    return None


@contextmanager
def second_pass(
    trainer: Trainer, pl_module: LightningModule, loader: Any
) -> Iterator[Iterator[Tensor]]:
    """Yield the network's inputs from an independent pass over a loader, without gradients.

    The batches are prepared as the Trainer prepares them. The generators of the loader and its
    samplers keep their states.

    Args:
        trainer: runs `pl_module`.
        pl_module: the module, on its device.
        loader: yields inputs, or lists or tuples that start with the input.
    """
    with (
        # Lightning evaluates in inference mode. If the data set caches tensors now, training could
        # not use inference tensors.
        torch.inference_mode(False),
        torch.no_grad(),
        preserve_generators(loader),
        trainer.precision_plugin.forward_context(),
    ):
        yield _prepared_inputs(trainer, pl_module, _copied(loader))


def input_of(batch: Any) -> Any:
    """Return the network's input of a batch: the batch, or its first element."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def _copied(loader: Any) -> Any:
    """Copy a loader so that iterating the copy does not move the original."""
    copied = copy.copy(loader)
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        # In predict it is a sampler of Lightning's that is its own iterator.
        vars(copied)["batch_sampler"] = copy.copy(loader.batch_sampler)
    return copied


def _prepared_inputs(trainer: Trainer, pl_module: LightningModule, loader: Any) -> Iterator[Tensor]:
    for batch in loader:
        # The loops' order. There is no public function for the hook.
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch)
        yield input_of(trainer.strategy.batch_to_device(batch))


class ForwardOverride(nn.Module):
    """Base of classes whose `forward` comes before that of a layer's own class.

    `override_forward` combines the two; `super().forward` is the layer's own. The combined class is
    made at run time, but its instances can be copied and pickled.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_overridden, type(self).__bases__, self.__getstate__()


@functools.cache
def override_forward(override: Any, cls: Any) -> Any:
    """Return a subclass of `cls` with the forward of `override`, a `ForwardOverride`."""
    return type(cls.__name__, (override, cls), {"__module__": override.__module__})


def _new_overridden(override: Any, cls: Any) -> nn.Module:
    combined = override_forward(override, cls)
    return combined.__new__(combined)
