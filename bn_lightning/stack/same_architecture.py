"""Check that networks can be the members of one stack: only the values of tensors may differ."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized


class NotStackableError(ValueError):
    """Something of a run that cannot be stacked.

    Attributes:
        reason: what, as the end of a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"expected runs that can be one stack, got some that cannot: {reason}; train each by"
            " `bn_lightning.train`"
        )
        self.reason = reason


def check_same_architecture(networks: Sequence[nn.Module]) -> None:
    """Check that networks differ in the values of parameters and buffers, and in dropout, only.

    Raises:
        NotStackableError: they differ in more, or one has what a stack does not follow: hooks,
            parametrizations, state that is not in tensors, a module that is compiled or in
            evaluation mode, parameters of several dtypes or without a shape.
    """
    for network in networks:
        _check_parameters(network)
        _check_modules(network)
    first = networks[0]
    for kind, describe in _DESCRIPTIONS.items():
        described = describe(first)
        if any(describe(other) != described for other in networks[1:]):
            raise NotStackableError(f"the networks differ in {kind}")
    attributes = attributes_of(first)
    for other in networks[1:]:
        if (name := first_difference(attributes, attributes_of(other))) is not None:
            raise NotStackableError(f"the networks differ in the attribute `{name}`")


def attributes_of(network: nn.Module) -> dict[str, Any]:
    """Return attributes of all modules by name: tensors, copied, and Python's own values, as text.

    Left out are parameters, buffers, and the probabilities of dropout.
    """
    return {
        f"{name}.{key}".lstrip("."): (
            value.detach().clone() if isinstance(value, Tensor) else repr(value)
        )
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, _COMPARED)
        and key not in _OF_EACH_MODULE
        and not (type(module) is nn.Dropout and key == "p")
    }


_COMPARED = (bool, int, float, str, list, tuple, dict, set, deque, np.ndarray, type(None), Tensor)
_OF_EACH_MODULE = vars(nn.Module()).keys()


def first_difference(left: dict[str, Any], right: dict[str, Any]) -> str | None:
    """Return the first name whose value differs, or that one of both lacks."""
    for name in {**left, **right}:
        a, b = left.get(name), right.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            same = same and torch.equal(a, b)
        else:
            same = type(a) is type(b) and a == b
        if not same:
            return name
    return None


def _check_modules(network: nn.Module) -> None:
    for name, module in network.named_modules():
        where = f"`{name}`" if name else "the network"
        if any(len(getattr(module, hooks)) for hooks in _HOOKS):
            raise NotStackableError(f"{where} has hooks, which would see all members as one")
        if module._compiled_call_impl is not None:
            raise NotStackableError(f"{where} is compiled")
        if not module.training:
            raise NotStackableError(f"{where} is in evaluation mode")
        if is_parametrized(module):
            raise NotStackableError(f"{where} has a parametrization")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise NotStackableError(f"{where} has state that is not in tensors")


def _check_parameters(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise NotStackableError(f"`{name}` has no shape before the first forward")
        if parameter._backward_hooks:
            raise NotStackableError(f"`{name}` has hooks, which would see all members as one")
    dtypes = {parameter.dtype for parameter in network.parameters()}
    if len(dtypes) > 1:
        names = " and ".join(sorted(map(str, dtypes)))
        raise NotStackableError(f"the parameters of the network are {names}")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers, under each of their names."""
    return [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]


_DESCRIPTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "their modules": lambda network: {name: type(m) for name, m in network.named_modules()},
    "the shapes of their parameters": lambda network: {
        name: (t.shape, t.dtype) for name, t in _tensors(network)
    },
    "which parameters are trained": lambda network: [t.requires_grad for _, t in _tensors(network)],
}
