"""Percentiles of what an activation receives as training goes on: the paper's Figure 1b, c."""

from typing import Any

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

PERCENTILES = (15, 50, 85)

_MAX_ROWS = 2**24
_MOST = 1_000_000  # looks, and inputs


class ActivationPercentiles(Callback):
    """Logs the 15th, 50th and 85th percentile of what an activation of the network receives.

    A fixed probe set, the first inputs of the validation set, goes through the network in the mode
    it trains in, so BatchNorm normalises with the probe's own statistics: with running averages the
    early part of the trace is wrong. Neither the running averages nor the random streams of the run
    are touched.

    Logs, in units of the activation's input, for every point of `probe_steps`:
        `activation/p15`, `activation/p50`, `activation/p85`: of one unit, as the paper draws them;
        `activation/p15_median`, ...: each the median over the layer's units.

    Args:
        probe_size: inputs in the probe set, at most a million; fewer where the validation set is
            smaller.
        points: how often to look in the whole run, at most a million times; `probe_steps` spaces
            them.
        unit: index of the unit that is followed.
        layer: name of the activation module inside the LightningModule, whose last use in a forward
            counts; None for its last one.

    Raises:
        ValueError: a count is out of its range; when training begins, `layer` or `unit` is none of
            the network's, or there is no validation loader.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.1 and Figure 1(b, c).
    """

    def __init__(
        self, probe_size: int, points: int, unit: int = 0, layer: str | None = None
    ) -> None:
        super().__init__()
        for name, value in (("probe_size", probe_size), ("points", points)):
            if type(value) is not int or not 1 <= value <= _MOST:
                raise ValueError(f"`{name}` expected an integer from 1 to {_MOST}, got {value!r}")
        self.probe_size = probe_size
        self.points = points
        self.unit = unit
        self.layer = layer
        self._steps: set[int] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run without max_steps is as long as its epochs; one without end, a million steps.
        self._steps = probe_steps(int(min(trainer.estimated_stepping_batches, _MOST)), self.points)
        self._name = self.layer or last_activation(pl_module)
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for each iteration
            probe = first_inputs(trainer.val_dataloaders, self.probe_size)
        self._probe = probe.to(pl_module.device)
        if trainer.global_step == 0:
            self._log(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step in self._steps:
            self._steps.remove(trainer.global_step)  # a step may have several batches
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        percentiles_PC = unit_percentiles(activation_inputs(pl_module, self._name, self._probe))
        units = percentiles_PC.shape[1]
        if not 0 <= self.unit < units:
            raise ValueError(f"`unit` expected to be in [0, {units}), got {self.unit}")
        metrics = {}
        for percentile, value_C in zip(PERCENTILES, percentiles_PC, strict=True):
            metrics[f"activation/p{percentile}"] = value_C[self.unit].item()
            metrics[f"activation/p{percentile}_median"] = value_C.quantile(0.5).item()
        for logger in pl_module.loggers:
            logger.log_metrics(metrics, step=pl_module.global_step)
            logger.save()


def probe_steps(max_steps: int, points: int) -> set[int]:
    """At most `points` steps in 1..max_steps, half evenly spaced and half by equal ratios.

    The first steps change most, so they are looked at most often; the number of looks depends on
    `points` alone, so a run of 50,000 steps pays no more for them than one of 500.
    """
    half = max(points // 2, 1)
    even = torch.linspace(max_steps / half, max_steps, half, dtype=torch.float64)
    ratio = torch.logspace(0, 1, points - half, base=max(max_steps, 2), dtype=torch.float64)
    return {min(max(int(step), 1), max_steps) for step in torch.cat([even, ratio]).round().tolist()}


def last_activation(network: nn.Module) -> str:
    """The name of the last module of `torch.nn.modules.activation` in the network.

    Raises:
        ValueError: there is none.
    """
    names = [
        name
        for name, module in network.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    ]
    if not names:
        raise ValueError(
            "`layer` expected the name of a module, got null, and the network has no activation;"
            " name one, or leave the callback out"
        )
    return names[-1]


def first_inputs(loaders: Any, size: int) -> Float[Tensor, "N ..."]:
    """The first `size` inputs of the first validation loader, or all if there are fewer.

    Raises:
        ValueError: there is no validation loader.
    """
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    if loader is None:
        raise ValueError(
            "ActivationPercentiles expected a validation loader to take its probe set from, got "
            "none; add one or leave the callback out"
        )
    batches: list[Tensor] = []
    for inputs, _ in loader:
        batches.append(inputs)
        if sum(map(len, batches)) >= size:
            break
    return torch.cat(batches)[:size]


def activation_inputs(
    network: nn.Module, layer: str, x: Float[Tensor, "N ..."]
) -> Float[Tensor, "M C"]:
    """What `layer` receives when the network, in the mode it is in, is given `x`.

    Channels in dimension 1 become the columns; batch and space become the rows.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    handle = network.get_submodule(layer).register_forward_pre_hook(keep)
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            functional_call(network, buffers, (x,))
    finally:
        handle.remove()
    return seen[-1].movedim(1, -1).flatten(0, -2)


def unit_percentiles(inputs: Float[Tensor, "M C"]) -> Float[Tensor, "P C"]:
    """The percentiles `PERCENTILES` of each column, in fp32, interpolated linearly.

    A column with a NaN gives NaN. Of more rows than torch.quantile takes, evenly spaced ones count.
    """
    inputs = inputs[:: -(-len(inputs) // _MAX_ROWS)]
    q = torch.tensor(PERCENTILES, device=inputs.device, dtype=torch.float32) / 100
    return torch.quantile(inputs.float(), q, dim=0)
