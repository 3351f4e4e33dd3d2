"""Percentiles of an activation's input for all members of a stack."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bn_lightning.callbacks.activation_percentiles import (
    PERCENTILES,
    ActivationPercentiles,
    first_inputs,
    last_activation,
    probe_steps,
    unit_percentiles,
)
from bn_lightning.stack.context import Placed, leading
from bn_lightning.stack.evaluation import placed_batch
from bn_lightning.stack.member import Member
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.stacked_layers import StackedLayer


class StackPercentiles:
    """Logs for each member what `ActivationPercentiles` logs for one run.

    Args:
        callback: has the settings.
        module: the LightningModule of a member.
        network: of the stack.
        loaders: of the validation, from which the probe set is taken.
        last_step: number of optimizer steps of the whole training.

    Raises:
        NotStackableError: the layer is not computed for all members at once.
    """

    def __init__(
        self,
        callback: ActivationPercentiles,
        module: nn.Module,
        network: StackedNetwork,
        loaders: Any,
        last_step: int,
    ) -> None:
        name = callback.layer or last_activation(module)
        self._layer = network.network.get_submodule(name.removeprefix("network."))
        if not isinstance(self._layer, StackedLayer):
            raise NotStackableError(f"`activation_percentiles.layer` is {name}, computed singly")
        self._network, self._unit = network, callback.unit
        probe = first_inputs(loaders, callback.probe_size)
        self._probe = placed_batch(probe, next(network.network.parameters()))
        self._steps = probe_steps(last_step, callback.points) | {0}

    def log(self, step: int, members: Sequence[Member]) -> None:
        """Log the percentiles of each member, if the step has a measurement."""
        if step not in self._steps:
            return
        context = self._network.context
        context.watched, context.seen = self._layer, []
        try:
            with torch.no_grad(), self._network.preserved():
                self._network(Placed(self._probe, None))
        finally:
            context.watched = None
        inputs = leading(context.seen[-1], context.size).movedim(2, -1)  # (K, N, ..., C)
        columns = inputs.flatten(1, -2).movedim(0, 1).flatten(1)  # (M, K * C)
        values = unit_percentiles(columns).unflatten(1, (context.size, -1))  # (P, K, C)
        if not 0 <= self._unit < values.shape[2]:
            raise ValueError(f"expected `unit` to be in [0, {values.shape[2]}), got {self._unit}")
        medians = torch.quantile(values, 0.5, dim=2).tolist()
        units = values[:, :, self._unit].tolist()
        for k, member in enumerate(members):
            metrics = {}
            for place, percentile in enumerate(PERCENTILES):
                metrics[f"activation/p{percentile}"] = units[place][k]
                metrics[f"activation/p{percentile}_median"] = medians[place][k]
            member.log(metrics, kept=False)
