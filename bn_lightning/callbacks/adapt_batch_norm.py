"""Normalizes test inputs by their own statistics instead of the training data's."""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bn_lightning.callbacks.running_statistics import (
    ForwardOverride,
    average_over_ranks,
    average_statistics,
    batch_norms,
    input_of,
    override_forward,
    reason_not_repeatable,
    second_pass,
    updates_statistics,
)
from bn_lightning.conversion.class_swap import restore_class, swap_class
from bn_lightning.kernels.reference import batch_statistics

_KEY = "adapt"
# The layers that are adapted now: of two adaptations, the first to end would leave the other's.
_adapted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def adapt_batchnorm(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    samples: int | None = None,
    mix: float = 0.0,
) -> ExitStack:
    """Make a model's BatchNorms normalize by the statistics of unlabelled inputs, in evaluation.

        mean = (mix * mean_source + n * mean_inputs) / (mix + n), and the same for the variance

    where source are the running statistics of training and n is the number of inputs.

        with adapt_batchnorm(model, loader):
            predictions = model(x)
        # the running statistics of training again

    With a `loader`, its inputs go through the model, with the BatchNorms in training mode and
    everything else in evaluation mode, and the statistics of their batches are averaged with equal
    weight. Each batch should be a random draw: the statistics of batches sorted by class are not
    those of the data. Without a `loader`, each later batch in evaluation is normalized by its own
    mean and biased variance.

    Layers without running statistics, with frozen ones, and those that the forward does not call,
    keep what they have. A model in training mode updates statistics that are dropped at the end.

    Args:
        model: any module.
        loader: yields batches: the model's input, (N, ...) or a dict of such tensors, or a list or
            tuple that starts with it. Inputs are moved to the model's device. None for each batch
            by itself.
        samples: number of inputs to take from `loader`, at least 2, rounded up to whole batches;
            None for all.
        mix: number of inputs that the running statistics count for, at least 0. 0 ignores them.
            The paper takes 8 to 256 for single batches, and 0 for many inputs.

    Returns:
        A context. Leaving it, or its `close()`, restores the model: the same tensors with the same
        values, also after an error.

    Raises:
        ValueError: `samples` or `mix` is out of range, the model has no BatchNorm to adapt, or the
            loader no batch; the model is adapted already; in a forward, one value per channel and
            `mix` 0.

    Source: Schneider et al. 2020, arXiv 2006.16971, equation 2, for `mix`; Nado et al. 2020, arXiv
    2006.10963, for each batch by itself.
    """
    _check_arguments(samples, mix)
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError(
            "expected `model` to have a BatchNorm with running statistics that are not frozen, got "
            f"{type(model).__name__} without one; there is nothing to adapt"
        )
    if not _adapted.isdisjoint(layers):
        raise ValueError(
            "expected `model` to have the statistics of training, got a model that another "
            "adapt_batchnorm or AdaptBatchNorm adapts; leave that first"
        )
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        source = stack.enter_context(_own_statistics(layers))
        stack.callback(_adapted.difference_update, layers)
        _adapted.update(layers)
        if loader is None:
            for layer, mean, var in source:
                stack.callback(restore_class, layer, _KEY)
                cls: Any = type(layer)
                by_batch = override_forward(_BatchStatistics, cls)
                swap_class(layer, by_batch, _KEY, _source=(mix, mean, var))
        else:
            modes = {module: module in layers for module in model.modules()}
            device = source[0][1].device
            inputs = (move_data_to_device(input_of(batch), device) for batch in loader)
            n = average_statistics(model, layers, inputs, num_samples=samples, modes=modes)
            if n == 0:
                raise ValueError("expected `loader` to have a batch, got none; pass one that has")
            for layer, mean, var in source:
                layer.running_mean = mean.lerp(layer.running_mean, n / (n + mix))
                layer.running_var = var.lerp(layer.running_var, n / (n + mix))
        return stack.pop_all()


class AdaptBatchNorm(Callback):
    """Normalizes the inputs of test and predict by their own statistics, in every BatchNorm.

    At the end of test or predict, and after an error, the model has the running statistics of
    training again. Fit and validate are not changed. See `adapt_batchnorm` for the formula, and for
    the layers that keep their statistics.

    The callback changes no random state (torch's, NumPy's, Python's, the loader's, its samplers').
    Across ranks, `samples` is the number per rank, and the statistics are averaged; a batch by
    itself is that of its rank.

    Args:
        samples: number of inputs of each dataloader, at least 2, whose statistics replace the
            running ones before its first batch is tested. A batch must be the input of `forward`,
            or a list or tuple that starts with it. None: each batch is normalized by its own.
        mix: number of inputs that the running statistics of training count for, at least 0.

    Raises:
        ValueError: an argument is out of range; at the start of a test, no BatchNorm to adapt, or a
            dataloader that cannot be iterated a second time (an iterator, persistent workers).

    Source: Schneider et al. 2020, arXiv 2006.16971; Nado et al. 2020, arXiv 2006.10963.
    """

    def __init__(self, samples: int | None = None, mix: float = 0.0) -> None:
        super().__init__()
        _check_arguments(samples, mix)
        self.samples = samples
        self.mix = mix
        self._adaptation = ExitStack()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.samples is None:
            self._adaptation = adapt_batchnorm(pl_module, mix=self.mix)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_test_start(trainer, pl_module)

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.samples is not None and batch_idx == 0:
            self._adapt(trainer, pl_module, trainer.test_dataloaders, dataloader_idx)

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.samples is not None and batch_idx == 0:
            self._adapt(trainer, pl_module, trainer.predict_dataloaders, dataloader_idx)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._adaptation.close()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._adaptation.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._adaptation.close()

    def _adapt(
        self, trainer: Trainer, pl_module: LightningModule, loaders: Any, dataloader_idx: int
    ) -> None:
        """Adapt to one of `loaders`, from the statistics of training."""
        self._adaptation.close()
        loader = CombinedLoader(loaders).flattened[dataloader_idx]
        if reason := reason_not_repeatable(loader):
            raise ValueError(
                "expected a dataloader that AdaptBatchNorm can iterate a second time, got "
                f"{reason}; leave `samples` out, or use `adapt_batchnorm` with a loader of its own"
            )
        with second_pass(trainer, pl_module, loader) as inputs:
            # n is the number of inputs of this rank, and the source's share is divided likewise.
            self._adaptation = adapt_batchnorm(
                pl_module, inputs, samples=self.samples, mix=self.mix / trainer.world_size
            )
            average_over_ranks(trainer, _adapted_layers(pl_module))


class _BatchStatistics(ForwardOverride):
    """The forward of the next class, by running statistics mixed with those of the batch."""

    _source: tuple[float, Tensor, Tensor]
    running_mean: Tensor
    running_var: Tensor

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training and input.numel() > 0:
            mix, mean, var = self._source
            if mix == 0 and input.numel() == input.shape[1]:
                raise ValueError(
                    "expected a batch with more than one value per channel for `mix`=0, got input "
                    f"size {tuple(input.shape)}; use a larger batch, or a `mix` above 0"
                )
            weight = input.shape[0] / (input.shape[0] + mix)
            of_batch = batch_statistics(input.detach())
            self.running_mean = mean.lerp(of_batch[0].to(mean.dtype), weight)
            self.running_var = var.lerp(of_batch[1].to(var.dtype), weight)
        return super().forward(input, *args, **kwargs)


@contextmanager
def _own_statistics(layers: list[Any]) -> Iterator[list[tuple[Any, Tensor, Tensor]]]:
    """Bind copies of buffers to `layers`, and yield each with the original mean and variance."""
    buffers = [dict(layer._buffers) for layer in layers]
    try:
        for layer, own in zip(layers, buffers, strict=True):
            for name, buffer in own.items():
                layer._buffers[name] = None if buffer is None else buffer.clone()
        source = zip(layers, buffers, strict=True)
        yield [(layer, own["running_mean"], own["running_var"]) for layer, own in source]
    finally:
        for layer, own in zip(layers, buffers, strict=True):
            layer._buffers.update(own)


def _adapted_layers(model: nn.Module) -> list[_BatchNorm]:
    layers = dict.fromkeys(batch_norms(model).values())
    return [layer for layer in layers if updates_statistics(layer)]


def _check_arguments(samples: int | None, mix: float) -> None:
    if samples is not None and samples < 2:
        raise ValueError(f"expected `samples` to be None or at least 2, got {samples}")
    if not (mix >= 0 and math.isfinite(mix)):
        raise ValueError(f"expected `mix` to be finite and at least 0, got {mix}")
