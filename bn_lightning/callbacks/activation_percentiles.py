"""Percentiles of an activation's input during training, as in the paper's Figure 1(b, c)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from bn_lightning.modules.preserve_state import preserve_generators, preserve_state

PERCENTILES = (15, 50, 85)

_REMOVE = "remove the callback, from bn-train by ~callbacks.activation_percentiles"
_MAX_ROWS = 2**24  # limit of torch.quantile
_MAX_COUNT = 1_000_000


class ActivationPercentiles(Callback):
    """Logs the 15th, 50th and 85th percentile of the input of one activation.

    The callback runs a fixed probe set, the first inputs of the validation set, through the network
    in its training mode, so BatchNorm normalizes with the probe's own statistics. (Running
    statistics would distort the early part of the curve.) Network, validation loader and random
    states stay as they were (`preserve_state`).

    Logs, in units of the activation's input, at step 0 and at each of `probe_steps`:
        `activation/p15`, `activation/p50`, `activation/p85`: percentiles of one unit, as in the
            paper's figure.
        `activation/p15_median`, `activation/p50_median`, `activation/p85_median`: their medians
            over the layer's units.

    Args:
        probe_size: number of inputs in the probe set, from 1 to 1,000,000. If the validation set is
            smaller, all of it.
        points: maximum number of measurements in the whole run, from 1 to 1,000,000.
        unit: index of the unit to follow.
        layer: name of the activation module in the LightningModule; None for the last one. If one
            forward calls it several times, the last call counts.

    Raises:
        ValueError: If `probe_size` or `points` is out of range; at the start of training, if the
            model lacks `forward`, `layer` or `unit`, or there is no validation loader.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.1 and Figure 1(b, c).
    """

    def __init__(
        self, probe_size: int, points: int, unit: int = 0, layer: str | None = None
    ) -> None:
        super().__init__()
        for name, value in (("probe_size", probe_size), ("points", points)):
            if type(value) is not int or not 1 <= value <= _MAX_COUNT:
                raise ValueError(
                    f"expected `{name}` to be an integer from 1 to {_MAX_COUNT}, got {value!r}"
                )
        self.probe_size = probe_size
        self.points = points
        self.unit = unit
        self.layer = layer
        self._steps: set[int] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Infinite for a run without a maximum number of steps or epochs.
        self._steps = probe_steps(
            int(min(trainer.estimated_stepping_batches, _MAX_COUNT)), self.points
        )
        if not is_overridden("forward", pl_module):
            raise ValueError(
                "expected the model to have `forward`, by which ActivationPercentiles calls it, got"
                f" `{type(pl_module).__qualname__}` without; add it, or {_REMOVE}"
            )
        self._name = self.layer or last_activation(pl_module)
        with preserve_state(pl_module):  # a DataLoader draws a seed when iterated
            probe = first_inputs(trainer.val_dataloaders, self.probe_size)
        self._probe = trainer.precision_plugin.convert_input(probe).to(pl_module.device)
        if trainer.global_step == 0:
            self._log(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step in self._steps:
            self._steps.remove(trainer.global_step)  # several batches may have the same global_step
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        percentiles_PC = unit_percentiles(activation_inputs(pl_module, self._name, self._probe))
        units = percentiles_PC.shape[1]
        if not 0 <= self.unit < units:
            raise ValueError(f"expected `unit` to be in [0, {units}), got {self.unit}")
        metrics = {}
        for percentile, value_C in zip(PERCENTILES, percentiles_PC, strict=True):
            metrics[f"activation/p{percentile}"] = value_C[self.unit].item()
            metrics[f"activation/p{percentile}_median"] = value_C.quantile(0.5).item()
        for logger in pl_module.loggers:
            logger.log_metrics(metrics, step=pl_module.global_step)
            logger.save()


def probe_steps(max_steps: int, points: int) -> set[int]:
    """Return at most `points` steps in 1..max_steps, half spaced evenly and half geometrically.

    The geometric half gives more points to the first steps, which change most. The number of
    measurements, and so their cost, does not grow with the length of the run.
    """
    half = max(points // 2, 1)
    even = torch.linspace(max_steps / half, max_steps, half, dtype=torch.float64)
    ratio = torch.logspace(0, 1, points - half, base=max(max_steps, 2), dtype=torch.float64)
    return {min(max(int(step), 1), max_steps) for step in torch.cat([even, ratio]).round().tolist()}


def last_activation(network: nn.Module) -> str:
    """Return the name of the network's last module from `torch.nn.modules.activation`.

    Raises:
        ValueError: If there is none.
    """
    names = [
        name
        for name, module in network.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    ]
    if not names:
        raise ValueError(
            "expected `layer` to be the name of a module, got None, and the network has no"
            f" activation module; name another module, or {_REMOVE}"
        )
    return names[-1]


def first_inputs(loaders: Any, size: int) -> Float[Tensor, "N ..."]:
    """Return the first `size` inputs of the first of `loaders`, or all if there are fewer.

    Raises:
        ValueError: If there is no loader.
    """
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    if loader is None:
        raise ValueError(
            "expected a validation loader, from which ActivationPercentiles takes its probe set,"
            f" got none; add one, or {_REMOVE}"
        )
    batches: list[Tensor] = []
    with preserve_generators(loader):
        for inputs, _ in loader:
            batches.append(inputs)
            if sum(map(len, batches)) >= size:
                break
    return torch.cat(batches)[:size]


def activation_inputs(
    network: nn.Module, layer: str, x: Float[Tensor, "N ..."]
) -> Float[Tensor, "M C"]:
    """Return the input of `layer` when the network, in its current mode, is called with `x`.

    Columns are the channels (dimension 1), rows the batch and spatial positions. The network does
    not change (`preserve_state`). One that torch.compile compiled runs uncompiled, because compiled
    graphs do not call hooks that are added later.
    """
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())

    handle = network.get_submodule(layer).register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), preserve_state(network), torch.compiler.set_stance("force_eager"):
            network(x)
    finally:
        handle.remove()
    return inputs[-1].movedim(1, -1).flatten(0, -2)


def unit_percentiles(inputs: Float[Tensor, "M C"]) -> Float[Tensor, "P C"]:
    """Return the percentiles `PERCENTILES` of each column in fp32, with linear interpolation.

    A column with a NaN has NaN percentiles. Above the limit of torch.quantile only evenly spaced
    rows are used.
    """
    inputs = inputs[:: -(-len(inputs) // _MAX_ROWS)].float()
    q = torch.tensor(PERCENTILES, device=inputs.device, dtype=torch.float32) / 100
    if not inputs.is_cpu:
        return torch.quantile(inputs, q, dim=0)
    # The same values in a tenth of the time, because NumPy sorts with vector instructions.
    ordered = torch.from_numpy(np.sort(inputs.numpy(), axis=0))
    ranks = q * (len(ordered) - 1)
    below, above = ranks.floor(), ranks.ceil()
    values = torch.lerp(ordered[below.long()], ordered[above.long()], (ranks - below)[:, None])
    values[:, ordered[-1].isnan()] = torch.nan  # NaN comes last
    return values
