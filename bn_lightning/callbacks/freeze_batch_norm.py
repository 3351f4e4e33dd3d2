"""Freezes the running statistics of BatchNorm layers from a step or an epoch on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from bn_lightning.callbacks.running_statistics import (
    ForwardOverride,
    batch_norms,
    override_forward,
)
from bn_lightning.conversion.class_swap import restore_class, swap_class


class FreezeBatchNorm(Callback):
    """Freezes BatchNorm's running statistics from a step or an epoch of training on.

    A frozen layer normalizes by its running statistics in training too, and does not update them.
    That holds whatever `.train()`, Lightning's `BaseFinetuning` or a resumed run do to the layer,
    and for statistics that `StochasticWeightAveraging` would reset. At the end of the fit, or after
    an error, the layers are as before. Weight and bias are trained, unless `affine`.

    All subclasses of torch's BatchNorm are supported, if their forward reads `self.training` as
    torch's does; nn.SyncBatchNorm and this package's too. The callback prints one line when it
    freezes, and logs nothing.

    Args:
        from_step: number of optimizer steps (`trainer.global_step`) after which the layers are
            frozen; 0 for the whole training.
        from_epoch: first epoch, counted from 0, in which they are frozen; instead of `from_step`.
        modules: names of modules, as in `named_modules` of the LightningModule; their BatchNorms
            are frozen. None for all BatchNorms.
        affine: whether weight and bias are frozen too: their gradients are dropped before each
            optimizer step, so that the optimizer leaves them alone.

    Raises:
        ValueError: `from_step` or `from_epoch` is negative, or both are given; `modules` is one
            name; at the start of training, a name without BatchNorm, or a BatchNorm without running
            statistics.
    """

    def __init__(
        self,
        from_step: int = 0,
        from_epoch: int | None = None,
        modules: Sequence[str] | None = None,
        *,
        affine: bool = False,
    ) -> None:
        super().__init__()
        if from_step < 0:
            raise ValueError(f"expected `from_step` to be at least 0, got {from_step}")
        if from_epoch is not None and (from_epoch < 0 or from_step > 0):
            raise ValueError(
                "expected `from_epoch` to be None or at least 0 with `from_step`=0, got "
                f"{from_epoch} with {from_step}; give one of them"
            )
        if isinstance(modules, str):
            raise ValueError(
                f"expected `modules` to be a list of names, got {modules!r}; give [{modules!r}]"
            )
        self.from_step = from_step
        self.from_epoch = from_epoch
        self.modules = modules
        self.affine = affine
        self._layers: list[_BatchNorm] = []
        self._frozen: list[_Frozen] = []
        self._key = f"freeze {id(self)}"  # several of these callbacks may freeze one layer

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = _find_layers(pl_module, self.modules)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._frozen and self._is_due(trainer):
            for layer in self._layers:
                self._frozen.append(_freeze(layer, self._key))
            rank_zero_info(
                f"BatchNorm: statistics of {len(self._frozen)} layers frozen from step "
                f"{trainer.global_step} on"
            )
        for frozen in self._frozen:
            frozen.bind_statistics()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.affine:
            for frozen in self._frozen:
                for name, parameter in frozen.layer.named_parameters():
                    if name.partition(".")[0] in ("weight", "bias", "parametrizations"):
                        parameter.grad = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._thaw()

    def _is_due(self, trainer: Trainer) -> bool:
        if self.from_epoch is not None:
            return trainer.current_epoch >= self.from_epoch
        return trainer.global_step >= self.from_step

    def _thaw(self) -> None:
        for frozen in self._frozen:
            restore_class(frozen.layer, self._key)
        self._layers, self._frozen = [], []


class _Frozen(NamedTuple):
    """A frozen layer, and its running statistics (C,) when it was frozen."""

    layer: _BatchNorm
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def bind_statistics(self) -> None:
        """Undo what StochasticWeightAveraging does before its last epoch: it binds new statistics.

        It also sets the count to 0, in place.
        """
        layer = self.layer
        if layer.running_mean is self.running_mean and layer.running_var is self.running_var:
            return
        layer.running_mean, layer.running_var = self.running_mean, self.running_var
        if layer.num_batches_tracked is not None and self.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(self.num_batches_tracked)


class _EvaluationForward(ForwardOverride):
    """The forward of the next class, in evaluation mode."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training = self.training
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def _freeze(layer: Any, key: str) -> _Frozen:
    cls: Any = type(layer)
    # This package's layers have the flag, which keeps them fused and compiled.
    if not (hasattr(cls, "freeze_stats") or issubclass(cls, _EvaluationForward)):
        cls = override_forward(_EvaluationForward, cls)
    swap_class(layer, cls, key, stats_frozen=True)
    count = layer.num_batches_tracked
    count = None if count is None else count.clone()
    return _Frozen(layer, layer.running_mean, layer.running_var, count)


def _find_layers(module: nn.Module, names: Sequence[str] | None) -> list[_BatchNorm]:
    """Return the BatchNorms in the modules of these names, each once; all of them for None."""
    layers = batch_norms(module)
    found = dict(layers) if names is None else {}
    for name in names or ():
        inside = {key: layers[key] for key in layers if f"{key}.".startswith(f"{name}.")}
        if not inside:
            raise ValueError(
                f"expected `modules` to be names of modules with BatchNorm, got {name!r}; the "
                f"BatchNorms of {type(module).__name__} are {', '.join(layers) or 'none'}"
            )
        found |= inside
    if not found:
        raise ValueError(
            "expected a module with BatchNorm for FreezeBatchNorm, got "
            f"{type(module).__name__} without one; remove the callback"
        )
    without = [name for name, layer in found.items() if not _has_statistics(layer)]
    if without:
        raise ValueError(
            "expected the BatchNorms that FreezeBatchNorm freezes to have running statistics, got "
            f"{', '.join(without)} without (track_running_stats=False, or a lazy layer that has "
            "had no batch); name the other modules in `modules`"
        )
    return list(dict.fromkeys(found.values()))


def _has_statistics(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and not is_lazy(layer.running_mean)
