"""Swaps the class of a module in place, and restores it.

Parameters, buffers, hooks, flags and the module's identity stay. An optimizer that was created
before, a module with two parents and a checkpoint are not affected.

Several swaps may be active at once, each under its own key, and may end in any order.
"""

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import nn

_SWAPS = "_class_swaps"  # attribute of a module: its active swaps, oldest first


@dataclass(frozen=True)
class _Swap:
    """What is restored when a swap ends.

    Attributes:
        key: identifies the caller.
        cls: the class before the swap.
        attributes: name -> tuple with the value before the swap, empty if there was none.
    """

    key: str
    cls: type[nn.Module]
    attributes: dict[str, tuple[Any, ...]]


def swap_class(module: nn.Module, new_class: type[nn.Module], key: str, **attributes: Any) -> None:
    """Set the class of `module` to `new_class` until `restore_class` is called with the same key.

    Args:
        module: has all attributes that `new_class` needs besides `attributes`.
        new_class: the new class.
        key: identifies the caller.
        attributes: instance attributes to set until then; no parameters or buffers.

    Raises:
        ValueError: If the class is already swapped under `key`.
    """
    if is_swapped(module, key):
        raise ValueError(f"expected `module` not to be swapped under {key!r} yet, got {module}")
    state = module.__dict__
    before = {name: (state[name],) if name in state else () for name in attributes}
    state[_SWAPS] = [*_swaps(module), _Swap(key, type(module), before)]
    state.update(attributes)
    module.__class__ = new_class


def set_swapped_attribute(module: nn.Module, key: str, name: str, value: Any) -> None:
    """Change an attribute that `swap_class` set under `key`; later swaps still override it."""
    _set_below(module, _swaps(module)[_index(module, key) + 1 :], name, (value,))


def replace_class(
    module: nn.Module, old_class: type[nn.Module], new_class: type[nn.Module]
) -> None:
    """Replace `old_class` by `new_class`, as the module's class or as one to restore later."""
    if type(module) is old_class:
        module.__class__ = new_class
    if _SWAPS in module.__dict__:
        module.__dict__[_SWAPS] = [
            replace(swap, cls=new_class) if swap.cls is old_class else swap
            for swap in _swaps(module)
        ]


def is_swapped(module: nn.Module, key: str) -> bool:
    """Return whether the class of `module` is swapped under `key`."""
    return any(swap.key == key for swap in _swaps(module))


def restore_class(module: nn.Module, key: str) -> bool:
    """End the swap under `key`; later swaps stay active.

    Returns:
        Whether there was one.
    """
    if not is_swapped(module, key):
        return False
    swaps = _swaps(module)
    index = _index(module, key)
    ended = swaps.pop(index)
    if index == len(swaps):
        module.__class__ = ended.cls
    else:
        swaps[index] = replace(swaps[index], cls=ended.cls)
    for name, value in ended.attributes.items():
        _set_below(module, swaps[index:], name, value)
    if swaps:
        module.__dict__[_SWAPS] = swaps
    else:
        del module.__dict__[_SWAPS]
    return True


def has_instance_forward(module: nn.Module) -> bool:
    """Return whether an instance has another forward than its class.

    After a fit in several processes Lightning leaves the class's forward on the instance.
    """
    own = vars(module).get("forward")
    return own is not None and own != MethodType(type(module).forward, module)


def restore_all(module: nn.Module) -> None:
    """End all swaps of a module."""
    for swap in reversed(_swaps(module)):
        restore_class(module, swap.key)


def _swaps(module: nn.Module) -> list[_Swap]:
    return list(module.__dict__.get(_SWAPS, ()))


def _index(module: nn.Module, key: str) -> int:
    return [swap.key for swap in _swaps(module)].index(key)


def _set_below(module: nn.Module, later: list[_Swap], name: str, value: tuple[Any, ...]) -> None:
    """Set an attribute, or let the first later swap that overrides it restore the value."""
    for swap in later:
        if name in swap.attributes:
            swap.attributes[name] = value
            return
    if value:
        module.__dict__[name] = value[0]
    else:
        module.__dict__.pop(name, None)
