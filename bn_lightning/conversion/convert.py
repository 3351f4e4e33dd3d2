"""Every BatchNorm of a model exchanged for this package's, in place, and given back.

Only classes change (class_swap.py): parameters, buffers, hooks, flags and the modules themselves
stay, so that an optimiser built before, a shared module and a checkpoint notice nothing.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bn_lightning.conversion.class_swap import (
    exchange_class,
    is_exchanged,
    replace_class,
    restore_class,
    set_exchanged,
)
from bn_lightning.conversion.fusion import fuse as fuse_model
from bn_lightning.conversion.fusion import is_fused, unfuse
from bn_lightning.conversion.fusion.fused_call import is_fusable
from bn_lightning.conversion.tracing import has_own_forward
from bn_lightning.kernels.checks import check_backend
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

_KEY = "convert"
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_LAZY = {nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d}


@dataclass(frozen=True)
class Conversion:
    """What `convert_batchnorm` made of a model; modules by their names in it.

    Attributes:
        converted: the BatchNorms that are this package's now, and were torch's.
        fused: those whose addition or activation is computed with them, at one call at least.
        skipped: what was left alone, and why: BatchNorms that were not converted, and, with `fuse`,
            those that were not fused with what follows them, or not at every call.
    """

    converted: tuple[str, ...]
    fused: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} BatchNorms converted, {len(self.fused)} of them fused"]
        if self.skipped:
            lines[0] += f", {len(self.skipped)} left alone:"
        return "\n".join(
            lines + [f"  {name or 'root'}: {why}" for name, why in self.skipped.items()]
        )


def convert_batchnorm(model: nn.Module, *, fuse: bool = False, backend: str = "auto") -> Conversion:
    """Makes every BatchNorm of a model this package's, in place; `revert_batchnorm` undoes it.

    Parameters and buffers are the same objects afterwards, and so are the modules; hooks, flags,
    parametrisations and the keys of the `state_dict` stay. LazyBatchNorm becomes this package's
    when it learns its size. Converting again brings the model to what this call asks for.

    With `fuse`, BatchNorm is computed in one with an activation or an addition that follows it, in
    nn.Sequential and in forwards that torch.fx can trace (see `bn_lightning.conversion.fusion`).
    Hooks that are there are respected, hooks added later as well. Shallow copies of a fused module,
    which nn.DataParallel makes, are not supported; deep copies and pickles are.

    Args:
        model: any module; may be a BatchNorm itself.
        fuse: whether to fuse as well.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Returns:
        What was converted, fused, and left alone, and why. Left alone are nn.SyncBatchNorm and
        subclasses of torch's BatchNorm, whose own forwards would be lost.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend.

    Warns:
        UserWarning: the model has no BatchNorm.
    """
    _check_model(model)
    check_backend(backend)
    unfuse(model)
    converted: list[str] = []
    skipped: dict[str, str] = {}
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        found = True
        if not _is_converted(module):
            if is_fusable(module):
                continue  # made by this package
            why = _why_not(module)
            if why is not None:
                skipped[name] = why
                continue
            _exchange(module)
        if is_exchanged(module, _KEY):
            set_exchanged(module, _KEY, "backend", backend)
        else:
            module.__dict__["backend"] = backend  # a lazy one
        converted.append(name)
        if fuse and type(module) in _LAZY:
            skipped[name] = "it has no size yet; to fuse it, convert again after a first batch"
    if not found:
        warnings.warn(
            f"expected a model with BatchNorm, found none in {type(model).__name__}: nothing was "
            f"converted",
            stacklevel=2,
        )
    fused: list[str] = []
    if fuse:
        fused, left = fuse_model(model)
        skipped |= left
    return Conversion(tuple(converted), tuple(fused), skipped)


def revert_batchnorm(model: nn.Module) -> tuple[str, ...]:
    """Gives a model its own BatchNorms and forwards back, in place.

    Parameters and buffers keep their values. What was never converted stays as it is.

    Args:
        model: any module.

    Returns:
        The names of the BatchNorms that were given back.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model(model)
    unfuse(model)
    reverted = []
    for name, module in model.named_modules():
        if _is_converted(module):
            _give_back(module)
            reverted.append(name)
    return tuple(reverted)


def is_converted(model: nn.Module) -> bool:
    """Returns whether there is something for `revert_batchnorm` to give back."""
    return any(_is_converted(module) or is_fused(module) for module in model.modules())


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected `model` to be a torch.nn.Module, got {type(model).__name__}")


def _is_converted(module: nn.Module) -> bool:
    return is_exchanged(module, _KEY) or "cls_to_become" in module.__dict__


def _why_not(module: nn.Module) -> str | None:
    """Says why a BatchNorm is left alone."""
    cls = type(module)
    if cls in _LAZY:
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "nn.SyncBatchNorm synchronises by itself; use torch's plain BatchNorm with Lightning's "
            "plugin bn_lightning.FusedSyncBatchNorm to have both"
        )
    if has_own_forward(module):
        return "the instance has a forward of its own"
    if parametrize.type_before_parametrizations(module) not in _OURS:
        return f"{cls.__module__}.{cls.__qualname__} is not torch's, and may do something else"
    return None


def _exchange(module: Any) -> None:
    if type(module) in _LAZY:
        # What torch's lazy modules become when they learn their size.
        module.cls_to_become = _OURS[type(module).cls_to_become]
    else:
        ours = _OURS[parametrize.type_before_parametrizations(module)]
        exchange_class(module, _parametrized_like(type(module), ours), _KEY, backend="auto")


def _give_back(module: nn.Module) -> None:
    if "cls_to_become" in module.__dict__:
        ours = module.__dict__.pop("cls_to_become")
        module.__dict__.pop("backend")
        replace_class(module, ours, _TORCHS[ours])
        return
    present = type(module)
    restore_class(module, _KEY)
    before = type(module)
    # Parametrisations came or went meanwhile, and they are kept in the class.
    if before is not present and _parametrized(before) != _parametrized(present):
        plain = before.__bases__[0] if _parametrized(before) else before
        module.__class__ = _parametrized_like(present, plain)


def _parametrized(cls: type[nn.Module]) -> set[str]:
    """The names of the tensors that a class of torch.nn.utils.parametrize computes."""
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _parametrized_like(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Makes of `base` what torch.nn.utils.parametrize made of the base of `cls`, if it did."""
    if not _parametrized(cls):
        return base
    body = {name: value for name, value in vars(cls).items() if name not in _OF_EVERY_CLASS}
    return type(f"Parametrized{base.__name__}", (base,), body)


_OF_EVERY_CLASS = {"__dict__", "__weakref__", "__module__", "__doc__"}
