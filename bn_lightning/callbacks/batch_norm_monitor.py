"""Statistics of each BatchNorm layer during training."""

from typing import Any

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

Channels = Float[Tensor, "C"]


class BatchNormMonitor(Callback):
    """Logs five statistics of each BatchNorm layer, every `every_n_steps` training steps.

    `batch_norm/LAYER/scale`: mean of |weight| over the channels; 1 without weight.
    `batch_norm/LAYER/shift`: mean of |bias| over the channels; 0 without bias.
    `batch_norm/LAYER/mean_distance`: root mean square over the channels of
        (batch mean - running mean) / running std.
    `batch_norm/LAYER/log_std_distance`: root mean square over the channels of
        ln(batch std / running std).
    `batch_norm/LAYER/dead`: fraction of channels, in [0, 1], whose output in the batch is nowhere
        positive, so that a ReLU zeroes it, or constant.

    std is sqrt(biased var + eps) for the batch and sqrt(running_var + eps) for the running
    statistics. The two distances measure how far the normalization in evaluation is from that in
    training; layers without running statistics log neither. The callback measures the first call of
    a layer in the step, in fp32, on this rank's batch, with the running statistics before the call.
    Weight and bias are those after the optimizer step.

    The layers have forward hooks only in the steps that are measured. A hooked layer runs unfused.
    A network compiled by torch.compile logs scale and shift only, because it does not call hooks
    that are added after compilation.

    Args:
        every_n_steps: optimizer steps between two measurements; the first step is measured too.

    Raises:
        ValueError: If `every_n_steps` is not positive; at the start of training, if the module has
            no BatchNorm.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(
                f"expected `every_n_steps` to be a positive integer, got {every_n_steps}"
            )
        self.every_n_steps = every_n_steps
        self._hooks: list[RemovableHandle] = []
        # Layer -> statistic -> value, of the step that is being measured.
        self._measured: dict[str, dict[str, Tensor]] | None = None
        self._next_step = 1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _layers(pl_module):
            raise ValueError(
                "expected a module with BatchNorm for BatchNormMonitor, got "
                f"{type(pl_module).__name__} without one; remove the callback"
            )
        self._measured = None
        step = trainer.global_step
        self._next_step = 1 if step == 0 else self._next_multiple(step)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation, the first batch of the step is measured.
        if trainer.global_step + 1 >= self._next_step and self._measured is None:
            self._measured = {}
            for name, layer in _layers(pl_module).items():
                self._add_hooks(layer, self._measured.setdefault(name, {}))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._remove_hooks()
        if self._measured is not None and trainer.global_step >= self._next_step:
            self._log(pl_module, self._measured)
            self._measured = None
            self._next_step = self._next_multiple(trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()

    def _next_multiple(self, step: int) -> int:
        return (step // self.every_n_steps + 1) * self.every_n_steps

    def _add_hooks(self, layer: _BatchNorm, measured: dict[str, Tensor]) -> None:
        def is_done() -> bool:
            # A graph that was compiled with the hooks keeps calling them.
            return torch.compiler.is_compiling() or "dead" in measured

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            mean, var = layer.running_mean, layer.running_var
            if is_done() or mean is None or var is None or x.numel() == 0:
                return
            measured["mean_distance"], measured["log_std_distance"] = distances(
                x.detach(), mean, var, layer.eps
            )

        def after(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> None:
            if not is_done() and y.numel():
                measured["dead"] = dead_fraction(y.detach())

        self._hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _log(self, pl_module: LightningModule, measured: dict[str, dict[str, Tensor]]) -> None:
        values = {}
        one = torch.ones(1, device=pl_module.device)
        for name, layer in _layers(pl_module).items():
            weight = one if layer.weight is None else layer.weight.detach()
            bias = 0 * one if layer.bias is None else layer.bias.detach()
            values[f"{name}/scale"] = weight.float().abs().mean()
            values[f"{name}/shift"] = bias.float().abs().mean()
            values |= {f"{name}/{key}": x for key, x in measured.get(name, {}).items()}
        # One device synchronization for all layers.
        numbers = torch.stack(list(values.values())).tolist()
        metrics = {f"batch_norm/{name}": x for name, x in zip(values, numbers, strict=True)}
        for logger in pl_module.loggers:
            logger.log_metrics(metrics, step=pl_module.global_step)
            logger.save()


def distances(
    x: Float[Tensor, "N C ..."], running_mean: Channels, running_var: Channels, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `mean_distance` and `log_std_distance` of `BatchNormMonitor`, scalars in fp32.

    Tensors may have any float dtype; `x`, the input of the layer, must not be empty.
    """
    var_C, mean_C = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
    scale_C = running_var.float() + eps
    mean_distance_C = (mean_C - running_mean.float()) / scale_C.sqrt()
    log_std_C = ((var_C + eps) / scale_C).log() / 2
    return mean_distance_C.square().mean().sqrt(), log_std_C.square().mean().sqrt()


def dead_fraction(y: Float[Tensor, "N C ..."]) -> Tensor:
    """Return the fraction of channels of `y` that are nowhere positive or constant, in fp32."""
    low_C, high_C = y.movedim(1, 0).flatten(1).aminmax(dim=1)
    return ((high_C <= 0) | (high_C == low_C)).float().mean()


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
