"""A module's class, and attributes that go with it, exchanged in place and given back.

Parameters, buffers, hooks, flags and the module's identity stay, so that an optimiser built before,
a module shared by two parents and a checkpoint notice nothing.

Several exchanges may lie over each other, each under its own key, and end in any order.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_STACK = "_exchanges"  # an attribute of the module: its exchanges, oldest first


@dataclass(frozen=True)
class _Exchange:
    """What is given back when an exchange ends.

    Attributes:
        key: who exchanged.
        cls: the class before.
        attributes: name -> a tuple with the value before, empty if there was none.
    """

    key: str
    cls: type[nn.Module]
    attributes: dict[str, tuple[Any, ...]]


def exchange_class(
    module: nn.Module, new_class: type[nn.Module], key: str, **attributes: Any
) -> None:
    """Makes `module` a `new_class`, until `restore_class` is called with the same key.

    Args:
        module: of a class with the same attributes as `new_class`.
        new_class: reads all it needs beyond them from `attributes` and from class attributes.
        key: who exchanges.
        attributes: of the instance, neither parameters nor buffers, set until then.

    Raises:
        ValueError: the class is already exchanged under `key`.
    """
    if is_exchanged(module, key):
        raise ValueError(f"expected a module not yet exchanged under {key!r}, got {module}")
    state = module.__dict__
    before = {name: (state[name],) if name in state else () for name in attributes}
    state[_STACK] = [*_exchanges(module), _Exchange(key, type(module), before)]
    state.update(attributes)
    module.__class__ = new_class


def set_exchanged(module: nn.Module, key: str, name: str, value: Any) -> None:
    """Changes an attribute that `exchange_class` set under `key`, below those set since."""
    stack = _exchanges(module)
    _give(module, stack[_place(module, key) + 1 :], name, (value,))


def replace_class(
    module: nn.Module, old_class: type[nn.Module], new_class: type[nn.Module]
) -> None:
    """Puts `new_class` where `old_class` is: the module's class, or one to be given back."""
    if type(module) is old_class:
        module.__class__ = new_class
    if _STACK in module.__dict__:
        module.__dict__[_STACK] = [
            replace(e, cls=new_class) if e.cls is old_class else e for e in _exchanges(module)
        ]


def is_exchanged(module: nn.Module, key: str) -> bool:
    """Returns whether the class of `module` is exchanged under `key`."""
    return any(exchange.key == key for exchange in _exchanges(module))


def restore_class(module: nn.Module, key: str) -> bool:
    """Takes the exchange under `key` back; others over it stay.

    Returns:
        Whether there was one.
    """
    if not is_exchanged(module, key):
        return False
    stack = _exchanges(module)
    at = _place(module, key)
    ended = stack.pop(at)
    if at == len(stack):
        module.__class__ = ended.cls
    else:
        stack[at] = replace(stack[at], cls=ended.cls)
    for name, value in ended.attributes.items():
        _give(module, stack[at:], name, value)
    if stack:
        module.__dict__[_STACK] = stack
    else:
        del module.__dict__[_STACK]
    return True


def _exchanges(module: nn.Module) -> list[_Exchange]:
    return list(module.__dict__.get(_STACK, ()))


def _place(module: nn.Module, key: str) -> int:
    return [exchange.key for exchange in _exchanges(module)].index(key)


def _give(module: nn.Module, above: list[_Exchange], name: str, value: tuple[Any, ...]) -> None:
    """Sets an attribute, or has the next exchange above that holds it give it back later."""
    for exchange in above:
        if name in exchange.attributes:
            exchange.attributes[name] = value
            return
    if value:
        module.__dict__[name] = value[0]
    else:
        module.__dict__.pop(name, None)
