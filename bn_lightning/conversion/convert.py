"""Converts every BatchNorm of a model to this package's, in place, and reverts it.

Only classes change (class_swap.py). Parameters, buffers, hooks, flags and the modules themselves
stay, so an optimizer that was created before, a shared module and a checkpoint are not affected.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from bn_lightning.conversion.adapted import AdaptedBatchNorm, Adapter, adapt
from bn_lightning.conversion.adapters import find_adapter, is_batchnorm, reason_not_adapted
from bn_lightning.conversion.class_swap import (
    has_instance_forward,
    is_swapped,
    replace_class,
    restore_all,
    restore_class,
    set_swapped_attribute,
    swap_class,
)
from bn_lightning.conversion.deferred import Deferral, FusionCount
from bn_lightning.conversion.model_hooks import add_hooks, remove_hooks
from bn_lightning.kernels.checks import check_backend
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

_KEY = "convert"
_OUR_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCH_CLASSES = {ours: theirs for theirs, ours in _OUR_CLASSES.items()}
_LAZY_CLASSES = {nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d}
_CLASS_ATTRIBUTES = {"__dict__", "__weakref__", "__module__", "__doc__"}  # of every class


@dataclass(frozen=True)
class Conversion:
    """What `convert_batchnorm` did to a model; names are those of modules in the model.

    Attributes:
        converted: the BatchNorms that were torch's and are now this package's.
        fusable: those whose calls may be computed together with an addition or activation that
            follows, which a forward decides; `fusion_counts` tells what forwards decided.
        skipped: name -> reason, for BatchNorms that were not converted and, with `fuse`, for those
            that cannot be fused.
    """

    converted: tuple[str, ...]
    fusable: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} BatchNorms converted, {len(self.fusable)} may be fused"]
        if self.skipped:
            lines[0] += f", {len(self.skipped)} skipped:"
        lines += [f"  {name or 'root'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_batchnorm(model: nn.Module, *, fuse: bool = False, backend: str = "auto") -> Conversion:
    """Convert every BatchNorm of a model to this package's, in place; `revert_batchnorm` undoes it.

    The modules, their parameters and buffers stay the same objects; hooks, flags, parametrizations
    and the keys of the `state_dict` stay too. A LazyBatchNorm becomes this package's when it learns
    its size. Converting a model again applies the new arguments.

    With `fuse`, a BatchNorm is computed together with the addition or activation that follows it,
    whatever forward has it (see `bn_lightning.conversion.deferred`). Until then its output is a
    tensor that is not computed yet, and that behaves as any other. What the model returns is
    computed. `fusion_counts` tells what was fused.

    Args:
        model: any module, also a BatchNorm itself.
        fuse: whether to fuse as well.
        backend: "auto", "native" or "triton", as in `bn_lightning.kernels.batch_norm`.

    Returns:
        What was converted, what may be fused, what was skipped, and why. BatchNorms of other
        classes are converted if `bn_lightning.conversion.adapters` knows what they compute.
        nn.SyncBatchNorm is skipped.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the backend is unknown.
        AdapterError: If an adapter of `register_batchnorm` is wrong; the model is unchanged.

    Warns:
        UserWarning: If the model has no BatchNorm.
    """
    return convert_model(model, fuse=fuse, backend=backend, is_temporary=False)


def convert_model(model: nn.Module, *, fuse: bool, backend: str, is_temporary: bool) -> Conversion:
    """Convert a model as `convert_batchnorm`.

    Args:
        model: any module.
        fuse: as for `convert_batchnorm`.
        backend: as for `convert_batchnorm`.
        is_temporary: whether copies and pickles of the model have torch's BatchNorms.
    """
    _check_model(model)
    check_backend(backend)
    adapters = {module: find_adapter(module) for module in model.modules()}
    _stop_deferring(model)
    converted: list[str] = []
    fusable: list[str] = []
    skipped: dict[str, str] = {}
    found = False
    for name, module in model.named_modules():
        adapter = adapters[module]
        if adapter is None and not is_batchnorm(module):
            continue
        found = True
        # Created as this package's, or synchronized.
        is_own = type(module).forward is BatchNorm2d.forward or isinstance(module, AdaptedBatchNorm)
        if _is_converted(module) or not is_own:
            if not _is_converted(module):
                reason = _reason_not_converted(module, adapter)
                if reason is not None:
                    skipped[name] = reason
                    continue
                _convert(module, adapter)
            if is_swapped(module, _KEY):
                set_swapped_attribute(module, _KEY, "backend", backend)
                set_swapped_attribute(module, _KEY, "is_copied_as_torch", is_temporary)
            else:
                module.__dict__["backend"] = backend  # LazyBatchNorm
            converted.append(name)
        if fuse and module is not model:
            if type(module) in _LAZY_CLASSES:
                skipped[name] = (
                    "it has no size yet; to fuse it, convert again after the first batch"
                )
            elif hasattr(module._parameters.get("weight"), "to_local"):
                skipped[name] = "FSDP frees its weight; to fuse it, give FSDP `ignored_params`"
            elif module.activation == "identity":
                module.__dict__["deferral"] = Deferral(module._parameters.get("weight"))
                fusable.append(name)
    if fusable:
        add_hooks(model, is_temporary)
    if not found:
        warnings.warn(
            f"expected `model` to have BatchNorm, got {type(model).__name__} without; nothing was"
            " converted",
            stacklevel=3,
        )
    return Conversion(tuple(converted), tuple(fusable), skipped)


def revert_batchnorm(model: nn.Module) -> tuple[str, ...]:
    """Restore a model's own BatchNorms, in place.

    Parameters and buffers keep their values. Modules that were never converted do not change.

    Args:
        model: any module.

    Returns:
        The names of the BatchNorms that were reverted.

    Raises:
        TypeError: If `model` is not a module.
    """
    _check_model(model)
    _stop_deferring(model)
    reverted = []
    for name, module in model.named_modules():
        if _is_converted(module):
            _revert(module)
            reverted.append(name)
    return tuple(reverted)


def fusion_counts(model: nn.Module) -> dict[str, FusionCount]:
    """Return how often each BatchNorm of a model was computed, since the model was converted.

    Args:
        model: converted with `fuse`.

    Returns:
        Name of each BatchNorm that may be fused -> number of its fused and of its other calls.

    Raises:
        TypeError: If `model` is not a module.
    """
    _check_model(model)
    deferrals = ((name, m.__dict__.get("deferral")) for name, m in model.named_modules())
    return {name: FusionCount(d.fused, d.separate) for name, d in deferrals if d is not None}


def is_converted(model: nn.Module) -> bool:
    """Return whether `revert_batchnorm` would change the model."""
    return any(_is_converted(m) or "deferral" in m.__dict__ for m in model.modules())


def _stop_deferring(model: nn.Module) -> None:
    remove_hooks(model)
    for module in model.modules():
        module.__dict__.pop("deferral", None)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected `model` to be a torch.nn.Module, got {type(model).__name__}")


def _is_converted(module: nn.Module) -> bool:
    return is_swapped(module, _KEY) or "cls_to_become" in module.__dict__


def _reason_not_converted(module: nn.Module, adapter: Adapter | None) -> str | None:
    if type(module) in _LAZY_CLASSES:
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "nn.SyncBatchNorm synchronizes by itself; for both, use torch's plain BatchNorm with"
            " the Lightning plugin bn_lightning.FusedSyncBatchNorm"
        )
    if has_instance_forward(module):
        return "the instance has its own forward"
    if adapter is None and parametrize.type_before_parametrizations(module) not in _OUR_CLASSES:
        return reason_not_adapted(module)
    return None


def _convert(module: Any, adapter: Adapter | None) -> None:
    if type(module) in _LAZY_CLASSES:
        # The class that torch gives a lazy module when it learns its size.
        module.cls_to_become = _OUR_CLASSES[type(module).cls_to_become]
        return
    attributes: dict[str, Any] = {}
    if adapter is None:
        ours = _OUR_CLASSES[parametrize.type_before_parametrizations(module)]
    else:
        ours, attributes = adapt(module, adapter)
    attributes |= {"backend": "auto", "torch_twin": _torch_twin, "is_copied_as_torch": False}
    swap_class(module, _parametrized_like(type(module), ours), _KEY, **attributes)


def _torch_twin(module: nn.Module) -> nn.Module:
    """Return a module of the class before, with the same parameters, buffers, hooks and flags."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("deferral", None)
    restore_all(twin)
    return twin


def _revert(module: nn.Module) -> None:
    if "cls_to_become" in module.__dict__:
        ours = module.__dict__.pop("cls_to_become")
        module.__dict__.pop("backend")
        replace_class(module, ours, _TORCH_CLASSES[ours])
        return
    converted = type(module)
    restore_class(module, _KEY)
    restored = type(module)
    # Parametrizations, which torch stores in the class, were added or removed meanwhile.
    if restored is not converted and _parametrized(restored) != _parametrized(converted):
        plain = restored.__bases__[0] if _parametrized(restored) else restored
        module.__class__ = _parametrized_like(converted, plain)


def _parametrized(cls: type[nn.Module]) -> set[str]:
    """Return the names of the tensors that are parametrized in a class."""
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _parametrized_like(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return `base`, as a parametrized subclass if `cls` is parametrized."""
    if not _parametrized(cls):
        return base
    body = {name: value for name, value in vars(cls).items() if name not in _CLASS_ATTRIBUTES}
    return type(f"Parametrized{base.__name__}", (base,), body)
