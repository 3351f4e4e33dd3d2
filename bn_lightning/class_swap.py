"""A module's class exchanged in place, and given back.

Only the class changes: parameters, buffers, hooks, flags and the module's identity stay, so that an
optimiser built before, a module shared by two parents and a checkpoint notice nothing.

Several exchanges may lie over each other, each under its own key, and end in any order.
"""

from torch import nn

_STACK = "_exchanged_classes"  # an attribute of the module: (key, class before), oldest first


def exchange_class(module: nn.Module, new_class: type[nn.Module], key: str) -> None:
    """Makes `module` a `new_class`, until `restore_class` is called with the same key.

    Args:
        module: of a class with the same attributes as `new_class`.
        new_class: reads all it needs beyond them from class attributes.
        key: who exchanges.

    Raises:
        ValueError: the class is already exchanged under `key`.
    """
    stack = list(module.__dict__.get(_STACK, ()))
    if any(key == other for other, _ in stack):
        raise ValueError(f"expected a module not yet exchanged under {key!r}, got {module}")
    module.__dict__[_STACK] = [*stack, (key, type(module))]
    module.__class__ = new_class


def replace_class(
    module: nn.Module, old_class: type[nn.Module], new_class: type[nn.Module]
) -> None:
    """Puts `new_class` where `old_class` is: the module's class, or one to be given back."""
    if type(module) is old_class:
        module.__class__ = new_class
    stack = module.__dict__.get(_STACK)
    if stack:
        module.__dict__[_STACK] = [
            (key, new_class if before is old_class else before) for key, before in stack
        ]


def is_exchanged(module: nn.Module, key: str) -> bool:
    """Returns whether the class of `module` is exchanged under `key`."""
    return any(key == other for other, _ in module.__dict__.get(_STACK, ()))


def restore_class(module: nn.Module, key: str) -> bool:
    """Takes the exchange under `key` back; others over it stay.

    Returns:
        Whether there was one.
    """
    stack = list(module.__dict__.get(_STACK, ()))
    at = next((i for i, (other, _) in enumerate(stack) if other == key), None)
    if at is None:
        return False
    _, before = stack.pop(at)
    if at == len(stack):
        module.__class__ = before
    else:
        stack[at] = (stack[at][0], before)
    if stack:
        module.__dict__[_STACK] = stack
    else:
        del module.__dict__[_STACK]
    return True
