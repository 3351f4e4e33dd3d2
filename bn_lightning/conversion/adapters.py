"""BatchNorms of other classes that compute what torch's compute, and how they are converted.

    y = last(... first(act(batch_norm(x))))

An `Adapter` says which child modules and which activation such a BatchNorm applies, and whether its
statistics are frozen. Without an import of their packages these are recognized:

    BatchNormAct2d, SyncBatchNormAct          timm: the children `drop` and `act` follow
    FrozenBatchNorm2d, FrozenBatchNormAct2d   torchvision, timm, detectron2, transformers
    ABN                                       inplace_abn's plain class, with its activation
    subclasses of torch's BatchNorm           if they have torch's own forward

A class is recognized by the name of the class that defines its forward. Whether it computes what
its adapter says is then tried: both forwards run on one small input, in training and in evaluation,
and outputs and statistics must agree. `register_batchnorm` adds a class of one's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from bn_lightning.conversion.adapted import AdaptedBatchNorm, Adapter
from bn_lightning.conversion.adapter_trial import (
    PLAIN,
    clone_detached,
    copy_without_hooks,
    find_difference,
    have_same_state,
)
from bn_lightning.modules.batch_norm import _BackendMixin


class AdapterError(ValueError):
    """A registered adapter raises, changes the state, or describes another computation."""


_REGISTERED: dict[type[nn.Module], Adapter | Callable[[Any], Adapter]] = {}
_TRIED: dict[tuple[Any, ...], Adapter | None] = {}


def register_batchnorm(
    cls: type[nn.Module], adapter: Adapter | Callable[[Any], Adapter] | None
) -> None:
    """Let `convert_batchnorm` and `FusedSyncBatchNorm` convert the BatchNorms of a class.

        register_batchnorm(BatchNormSwish, Adapter(activation="silu"))
        register_batchnorm(BatchNormAct, lambda bn: Adapter(after=("act",), eps=bn.epsilon))

    The class has torch's names: `running_mean` and `running_var`, each (C,); `weight` and `bias` if
    it is affine; `momentum` if it updates the statistics. A conversion raises an AdapterError, and
    leaves the model as it is, if the adapter raises or changes the state of the copy that it
    receives, or if the class computes something else.

    Args:
        cls: a class of modules. Subclasses that have its forward are converted, too.
        adapter: what all its instances compute, or a function from an instance to that. None
            removes the adapter of `cls`.

    Raises:
        TypeError: if `cls` is not a class of modules, or `adapter` is neither.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(
            f"expected `cls` to be a class of torch.nn.Modules, got {cls!r}; give the class itself"
        )
    if not (adapter is None or isinstance(adapter, Adapter) or callable(adapter)):
        raise TypeError(
            f"expected `adapter` to be an Adapter or a function that returns one, got {adapter!r};"
            " see bn_lightning.conversion.adapters.Adapter"
        )
    if adapter is None:
        _REGISTERED.pop(cls, None)
    else:
        _REGISTERED[cls] = adapter


def is_batchnorm(module: nn.Module) -> bool:
    """Return whether a module is one of torch's BatchNorms, or has running statistics like one."""
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False  # TorchScript has compiled what it computes
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return (
        mean is not None
        and var is not None
        and mean.dim() == 1
        and mean.shape == var.shape
        and not isinstance(module, _InstanceNorm)
    )


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter of a module, None if it is torch's, this package's, or unknown.

    Args:
        module: not modified; may be converted.

    Raises:
        AdapterError: a registered adapter cannot be used.
    """
    if isinstance(module, AdaptedBatchNorm):
        return module._adapter
    if isinstance(module, LazyModuleMixin | torch.jit.ScriptModule):
        return None
    cls = parametrize.type_before_parametrizations(module)
    owner = _owner_of_forward(cls)
    for ancestor in cls.__mro__[: cls.__mro__.index(owner) + 1]:
        if ancestor in _REGISTERED:
            return _find_registered(module, ancestor)
    if not is_batchnorm(module) or issubclass(cls, _BackendMixin):
        return None
    if owner.__module__ == _BatchNorm.__module__:
        return None if cls.__module__ == _BatchNorm.__module__ else Adapter()
    describe = next((d for end, d in _KNOWN.items() if owner.__name__.endswith(end)), None)
    if describe is None or _uses_absolute_weight(owner):
        return None
    # All that may decide what the forward computes.
    plain = tuple((k, v) for k, v in vars(module).items() if isinstance(v, PLAIN))
    children = tuple((name, child is None) for name, child in module._modules.items())
    key = (cls, plain, *module._parameters, *module._buffers, children)
    if key not in _TRIED:
        _TRIED[key] = _try_known(module, describe)
    return _TRIED[key]


def reason_not_adapted(module: nn.Module) -> str:
    """Return, for a BatchNorm that `find_adapter` does not know, why it is left alone."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.startswith("torch.ao."):
        return f"{name} is part of a quantized model"
    if _uses_absolute_weight(_owner_of_forward(cls)):
        return f"{name} is not torch's: it normalizes by the absolute value of its weight"
    return (
        f"{name} is not torch's, and may compute something else; if it does not, "
        "bn_lightning.register_batchnorm says so"
    )


def _uses_absolute_weight(cls: type[nn.Module]) -> bool:
    """Return whether a class is inplace_abn's InPlaceABN, InPlaceABNSync, or timm's InplaceAbn."""
    return cls.__name__.lower().startswith("inplaceabn")


def _owner_of_forward(cls: type[nn.Module]) -> type[nn.Module]:
    return next(ancestor for ancestor in cls.__mro__ if "forward" in vars(ancestor))


def _find_registered(module: nn.Module, cls: type[nn.Module]) -> Adapter:
    adapter: Any = _REGISTERED[cls]
    name = f"the adapter of {cls.__module__}.{cls.__qualname__}"
    if not isinstance(adapter, Adapter):
        function, untouched = adapter, copy_without_hooks(module, clone_detached)
        given = copy_without_hooks(module, clone_detached)
        try:
            adapter = function(given)
        except Exception as error:
            raise AdapterError(
                f"expected {name} to return an Adapter, got {type(error).__name__}: {error};"
                " correct it, or remove it by register_batchnorm(cls, None)"
            ) from error
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"expected {name} to return an Adapter, got {adapter!r}; correct it, or remove it"
                " by register_batchnorm(cls, None)"
            )
        if not have_same_state(given, untouched):
            raise AdapterError(
                f"expected {name} to leave the module as it is, got one that changes its state;"
                " return what the module computes, and change nothing"
            )
    try:
        difference = find_difference(module, adapter)
    except Exception as error:
        raise AdapterError(
            f"expected {name} to describe what the module computes, got"
            f" {type(error).__name__} when it was tried: {error}; correct it, or remove it by"
            " register_batchnorm(cls, None)"
        ) from error
    if difference is not None:
        raise AdapterError(
            f"expected {name} to describe what the module computes, got another {difference};"
            " correct it, or remove it by register_batchnorm(cls, None)"
        )
    return adapter


def _try_known(
    module: nn.Module, describe: Callable[[nn.Module], Adapter | None]
) -> Adapter | None:
    """Return the description of a module whose class has a known name, None if it is wrong."""
    try:
        adapter = describe(module)
        return None if adapter is None or find_difference(module, adapter) else adapter
    except Exception:  # a class that has no more than the name in common may raise anything
        return None


def _describe_activated(module: nn.Module) -> Adapter:
    return Adapter(after=_children(module, "drop", "act"))


def _describe_frozen(module: nn.Module) -> Adapter:
    """Find eps, which some copies write into their forward, and the dtype of the output."""
    probe = copy_without_hooks(
        module, lambda tensor: torch.zeros_like(tensor, device="cpu").double()
    )
    if probe.weight is not None:
        probe.weight.fill_(1)
    x = torch.ones(1, probe.running_mean.numel(), 1, 1, dtype=torch.float64)
    for name in _children(module, "drop", "act"):
        probe._modules[name] = nn.Identity()
    eps = float(f"{1 / probe(x).flatten()[0].item() ** 2:.9g}")
    promoted = probe.float()(x.bfloat16()).dtype == torch.float32
    return Adapter(_children(module, "drop", "act"), eps=eps, frozen=True, scale_and_shift=promoted)


def _describe_abn(module: nn.Module) -> Adapter | None:
    state = vars(module)
    name = str(state.get("activation", "identity"))
    parameter = state.get("activation_param", state.get("slope", 0.01))
    if name == "elu" and parameter != 1:
        return None
    return Adapter(
        activation="identity" if name == "none" else name, negative_slope=float(parameter)
    )


# Ends of the names of the classes that define the forward.
_KNOWN: dict[str, Callable[[nn.Module], Adapter | None]] = {
    "FrozenBatchNorm2d": _describe_frozen,
    "FrozenBatchNormAct2d": _describe_frozen,
    "BatchNormAct2d": _describe_activated,
    "SyncBatchNormAct": _describe_activated,
    "ABN": _describe_abn,
}


def _children(module: nn.Module, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if module._modules.get(name) is not None)
