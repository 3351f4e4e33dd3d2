"""What each BatchNorm layer has learnt, and how far its batches lie from its running statistics."""

from typing import Any

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

Channels = Float[Tensor, "C"]

_OF_THE_BATCH = ("mean_distance", "log_std_distance", "dead")


class BatchNormMonitor(Callback):
    """Logs five numbers of each BatchNorm layer, every `every_n_steps` training steps.

    `batch_norm/LAYER/scale`: mean of |weight| over the channels; 1 without weight.
    `batch_norm/LAYER/shift`: mean of |bias|; 0 without bias.
    `batch_norm/LAYER/mean_distance`: root mean square over the channels of
        (batch mean - running mean) / running deviation, in deviations.
    `batch_norm/LAYER/log_std_distance`: root mean square of ln(batch deviation / running
        deviation).
    `batch_norm/LAYER/dead`: share of the channels, in [0, 1], whose output is not positive anywhere
        in the batch, so that a ReLU makes it zero, or is one and the same number.

    Deviations are sqrt(variance + eps). The two distances say how far evaluation normalises from
    what training does; a layer without running statistics logs none. A layer is looked at the first
    time that the step's forward uses it, its running statistics before they take in the batch, in
    fp32 and on this rank's part of the batch; parameters are those after the optimiser's step.

    Between looks the layers are untouched. For a look they carry forward hooks, so that a layer
    which is fused with what follows it runs unfused. A network compiled by torch.compile logs scale
    and shift alone: it does not call hooks that come after its compilation.

    Args:
        every_n_steps: optimiser steps from one look to the next; the first step is looked at too.

    Raises:
        ValueError: `every_n_steps` is not positive; at the start of training, no BatchNorm at all.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` expected a positive integer, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._hooks: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] | None = None  # of a look that has begun
        self._next = 1  # the optimiser step that is looked at next

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _layers(pl_module):
            raise ValueError(
                "BatchNormMonitor expected a module with a BatchNorm layer, got "
                f"{type(pl_module).__name__} without one; leave the callback out"
            )
        self._seen = None
        self._next = 1 if trainer.global_step == 0 else self._multiple_after(trainer.global_step)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A step that accumulates gradients has several batches, of which the first is watched.
        if trainer.global_step + 1 >= self._next and self._seen is None:
            self._seen = {}
            for name, layer in _layers(pl_module).items():
                self._watch(name, layer, self._seen)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._remove_hooks()
        if self._seen is not None and trainer.global_step >= self._next:
            self._log(pl_module, self._seen)
            self._seen = None
            self._next = self._multiple_after(trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()

    def _multiple_after(self, step: int) -> int:
        return (step // self.every_n_steps + 1) * self.every_n_steps

    def _watch(self, name: str, layer: _BatchNorm, seen: dict[str, Tensor]) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            mean, var = layer.running_mean, layer.running_var
            if is_done() or mean is None or var is None or x.numel() == 0:
                return
            seen[f"{name}/mean_distance"], seen[f"{name}/log_std_distance"] = distances(
                x.detach(), mean, var, layer.eps
            )

        def after(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> None:
            if not is_done() and y.numel():
                seen[f"{name}/dead"] = dead_share(y.detach())

        def is_done() -> bool:
            # What is compiled with a hook keeps it, so that it does nothing there.
            return torch.compiler.is_compiling() or f"{name}/dead" in seen

        self._hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _log(self, pl_module: LightningModule, seen: dict[str, Tensor]) -> None:
        values = {}
        one = torch.ones(1, device=pl_module.device)
        for name, layer in _layers(pl_module).items():
            weight = one if layer.weight is None else layer.weight.detach()
            bias = 0 * one if layer.bias is None else layer.bias.detach()
            values[f"{name}/scale"] = weight.float().abs().mean()
            values[f"{name}/shift"] = bias.float().abs().mean()
            for number in _OF_THE_BATCH:
                if f"{name}/{number}" in seen:
                    values[f"{name}/{number}"] = seen[f"{name}/{number}"]
        # One wait for the device, however many layers there are.
        numbers = torch.stack(list(values.values())).tolist()
        metrics = {f"batch_norm/{name}": x for name, x in zip(values, numbers, strict=True)}
        for logger in pl_module.loggers:
            logger.log_metrics(metrics, step=pl_module.global_step)
            logger.save()


def distances(
    x: Float[Tensor, "N C ..."], running_mean: Channels, running_var: Channels, eps: float
) -> tuple[Tensor, Tensor]:
    """How far a batch's statistics lie from the running ones, both as a scalar in fp32.

    Args:
        x: the input of the layer, any float dtype, not empty.
        running_mean: any float dtype.
        running_var: any float dtype.
        eps: added to the variances.

    Returns:
        The root mean square over the channels of (batch mean - running mean) / sqrt(running var +
        eps), and of ln(sqrt(batch var + eps) / sqrt(running var + eps)), batch var biased.
    """
    var_C, mean_C = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
    scale_C = running_var.float() + eps
    mean_distance_C = (mean_C - running_mean.float()) / scale_C.sqrt()
    log_std_C = ((var_C + eps) / scale_C).log() / 2
    return mean_distance_C.square().mean().sqrt(), log_std_C.square().mean().sqrt()


def dead_share(y: Float[Tensor, "N C ..."]) -> Tensor:
    """The share of the channels of `y` that are nowhere positive, or constant; a scalar in fp32."""
    low_C, high_C = y.movedim(1, 0).flatten(1).aminmax(dim=1)
    return ((high_C <= 0) | (high_C == low_C)).float().mean()


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
