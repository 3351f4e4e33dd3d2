"""The forward of a converted BatchNorm whose class is neither torch's nor this package's."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bn_lightning.kernels.activations import activate
from bn_lightning.kernels.checks import check_activation
from bn_lightning.kernels.dispatch import uses_triton
from bn_lightning.modules.batch_norm import _BackendMixin


@dataclass(frozen=True)
class Adapter:
    """What a BatchNorm of a class other than torch's computes.

    Attributes:
        after: names of the child modules that are applied to the output, in this order.
        activation: as in `bn_lightning.kernels.batch_norm`, applied before them.
        negative_slope: slope of "leaky_relu" below zero.
        eps: value added to the variance, at least 0; None for the module's attribute `eps`.
        frozen: whether training, too, normalizes by the running statistics and leaves them as they
            are.
        scale_and_shift: whether a frozen one computes x * scale + shift. Then the output has the
            promoted dtype of the input and `weight`, otherwise the input's; and where no Triton
            kernel runs, ours has the same bits.
    """

    after: tuple[str, ...] = ()
    activation: str = "identity"
    negative_slope: float = 0.01
    eps: float | None = None
    frozen: bool = False
    scale_and_shift: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)


def adapt(
    module: nn.Module, adapter: Adapter, engine: Any = _BackendMixin
) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the class and the attributes that convert a module, for `class_swap.swap_class`.

    Args:
        module: not modified; may be converted already, with another engine.
        adapter: what it computes.
        engine: the class whose forward computes the BatchNorm, `_BackendMixin` or a subclass.
    """
    cls: Any = parametrize.type_before_parametrizations(module)
    if issubclass(cls, AdaptedBatchNorm):
        cls = cls._original
    attributes: dict[str, Any] = {
        "_adapter": adapter,
        "activation": adapter.activation,
        "negative_slope": adapter.negative_slope,
    }
    if adapter.frozen:
        attributes["stats_frozen"] = True
    if adapter.eps is not None:
        attributes["eps"] = adapter.eps
    for name, value in _DEFAULTS.items():
        if not hasattr(module, name):
            attributes.setdefault(name, value)
    return adapted_class(cls, engine), attributes


# What our forward reads of torch's BatchNorm, and a class of another package may lack.
_DEFAULTS = {
    "momentum": 0.1,
    "track_running_stats": True,
    "num_batches_tracked": None,
    "weight": None,
    "bias": None,
}


class AdaptedBatchNorm(nn.Module):
    """Computes a BatchNorm of another class by the forward of `engine`.

    It comes before `engine` and the original class in the bases of a class that `adapted_class`
    makes, so all else is as in the original class.
    """

    _original: type[nn.Module]
    _engine: Any
    _adapter: Adapter

    def forward(self, input: Any) -> Any:
        """Return what the original forward returns."""
        if isinstance(input, fx.Proxy):
            return self._engine.forward(self, input)  # one node for the whole module
        adapter = self._adapter
        if adapter.scale_and_shift:
            weight: Any = self.weight
            input = input.to(torch.promote_types(input.dtype, weight.dtype))
        output = self._engine.forward(self, input)
        for name in adapter.after:
            output = self._modules[name](output)  # type: ignore[misc]  # never None
        return output

    def _batch_norm(self, input: Tensor, *state: Any, **options: Any) -> Tensor:
        if not self._adapter.scale_and_shift or uses_triton(input, options["backend"]):
            return self._engine._batch_norm(self, input, *state, **options)
        weight, bias, mean, var = state
        scale = weight * (var + options["eps"]).rsqrt()
        shape = (-1, *(1 for _ in input.shape[2:]))
        y = input * scale.view(shape) + (bias - mean * scale).view(shape)
        if options["residual"] is not None:
            y = y + options["residual"]
        return activate(y, options["activation"], options["negative_slope"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.__dict__.get("is_copied_as_torch"):
            twin: Any = self.torch_twin
            return twin(self).__reduce_ex__(1)
        return _new_adapted, (self._original, self._engine), self.__getstate__()


class _AdaptedForeign(AdaptedBatchNorm):
    """The same for a class that is not a subclass of torch's BatchNorm, and does not become one."""

    def forward(self, input: Any) -> Any:
        """Return what the original forward returns."""
        # FrozenBatchNorm2d broadcasts an image without a batch, (C, H, W), to (1, C, H, W).
        if not isinstance(input, fx.Proxy) and input.dim() < (4 if self._adapter.frozen else 2):
            return self._original.forward(self, input)
        return super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@functools.cache
def adapted_class(cls: Any, engine: Any) -> Any:
    """Return the class that an instance of `cls` has while `engine` computes it."""
    body = {"_original": cls, "_engine": engine, "__module__": __name__}
    if issubclass(cls, _BatchNorm):
        return type(cls.__name__, (AdaptedBatchNorm, engine, cls), body)
    # Our modules' class attributes, without their class.
    for ancestor in reversed(engine.__mro__[: engine.__mro__.index(_BatchNorm)]):
        for name, value in vars(ancestor).items():
            if not name.startswith("__") and not callable(value):
                body[name] = value
    return type(cls.__name__, (_AdaptedForeign, cls), body)


def _new_adapted(cls: Any, engine: Any) -> nn.Module:
    adapted = adapted_class(cls, engine)
    return adapted.__new__(adapted)
