"""Finds the BatchNorms, additions and activations of a graph that can be fused safely.

Fusion delays the BatchNorm until the addition and advances the activation to it. Advancing is safe
if the activation is the only reader of its input, so that nothing can change the input in between.
Delaying is safe if the BatchNorm's input is memory that nothing else can reach, or if no operation
runs in between.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bn_lightning.conversion.fusion.fused_call import (
    SLOPE,
    NamedActivation,
    activation_of,
    call_batch_norm,
    is_fusable,
    is_hooked,
)
from bn_lightning.kernels.activations import ACTIVATIONS, Saves


class UnsafeFusion(Exception):
    """Raised when fusing a BatchNorm may change the result; the message is the reason."""


@dataclass
class FusionResult:
    """What fusion did to one forward, or to a whole model.

    Attributes:
        called: the BatchNorms that it calls.
        fused: those that it now calls together with the addition or activation.
        reasons: BatchNorm -> reason why it is not fused, or not with the activation.
    """

    called: set[nn.Module] = field(default_factory=set)
    fused: set[nn.Module] = field(default_factory=set)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def fuse_graph(graph: fx.Graph, module: nn.Module, result: FusionResult) -> None:
    """Fuse the calls in a graph, in place.

    Args:
        graph: graph of the forward of `module`.
        module: owner of the modules that the graph calls.
        result: updated in place.
    """
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(module.get_submodule(node.target) for node in calls)
    # Backwards, so that of two BatchNorms that are added the later one fuses the addition.
    for node in reversed(calls):
        bn = module.get_submodule(node.target)
        if not is_fusable(bn):
            continue
        result.called.add(bn)
        try:
            site = _find_site(node, module)
            if site is None:
                continue
            check_modules(bn, site.activation_module(module))
            if counts[bn] > 1:
                raise UnsafeFusion(f"it is called {counts[bn]} times")
            _check_order(site, bn, module)
        except UnsafeFusion as error:
            result.reasons[bn] = str(error)
            continue
        if site.without_activation:
            result.reasons[bn] = site.without_activation
        _rewrite(site)
        result.fused.add(bn)


def check_modules(bn: nn.Module, activation: nn.Module | None) -> None:
    """Raise UnsafeFusion if one of them has hooks, or the BatchNorm has an activation already."""
    if is_hooked(bn):
        raise UnsafeFusion("it has hooks, or its own forward")
    if bn.activation != "identity":
        raise UnsafeFusion("it already ends in an activation")
    if activation is not None and is_hooked(activation):
        raise UnsafeFusion("the activation after it has hooks, or its own forward")


@dataclass
class _Site:
    """Calls of a graph to fuse.

    Attributes:
        bn: call of the BatchNorm.
        addition: addition of `bn` and `residual`, or None.
        residual: the other operand of the addition, or None.
        activation: activation of the sum, or of `bn`, or None.
        named: the activation's name and slope if it is not a module.
        without_activation: reason why an existing activation is not fused.
    """

    bn: fx.Node
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    activation: fx.Node | None = None
    named: NamedActivation | None = None
    without_activation: str | None = None

    def activation_module(self, module: nn.Module) -> nn.Module | None:
        if self.activation is None or self.named is not None:
            return None
        return module.get_submodule(str(self.activation.target))


def _find_site(bn: fx.Node, module: nn.Module) -> _Site | None:
    followers = [
        user
        for user in bn.users
        if _operand_added(user, bn) is not None or _activation_applied(user, bn, module)
    ]
    if not followers or len(bn.args) != 1 or bn.kwargs:
        return None
    if len(bn.users) > 1:
        raise UnsafeFusion(f"its output has {len(bn.users)} readers")
    (follower,) = followers
    residual = _operand_added(follower, bn)
    if residual is None:
        return _with_activation(_Site(bn), follower, module)
    if follower.target in _IN_PLACE and follower.args[0] is not bn:
        raise UnsafeFusion("it is added in place to another value")
    site = _Site(bn, follower, residual)
    activations = [u for u in follower.users if _activation_applied(u, follower, module)]
    if not activations:
        return site
    if len(follower.users) > 1:
        site.without_activation = (
            f"only the addition is fused: the sum has {len(follower.users)} readers"
        )
        return site
    with_activation = _with_activation(_Site(bn, follower, residual), activations[0], module)
    if _keeps_residual(with_activation, module) and _is_read_after(residual, follower):
        site.without_activation = (
            "only the addition is fused: its other operand is read again after it, and might be "
            "changed before the gradient needs it"
        )
        return site
    return with_activation


def _with_activation(site: _Site, activation: fx.Node, module: nn.Module) -> _Site:
    site.activation = activation
    if activation.op != "call_module":
        site.named = _activation_applied(activation, activation.args[0], module)
    return site


def _keeps_residual(site: _Site, module: nn.Module) -> bool:
    activation = site.activation_module(module)
    named = site.named if activation is None else activation_of(activation)
    return named is not None and ACTIVATIONS[named[0]].saves is Saves.RESIDUAL


def _is_read_after(value: fx.Node, node: fx.Node) -> bool:
    order = list(node.graph.nodes)
    return any(order.index(user) > order.index(node) for user in value.users)


def _check_order(site: _Site, bn: nn.Module, module: nn.Module) -> None:
    """Raise UnsafeFusion if an operation before the addition may use bn or change its input."""
    if site.addition is None:
        return
    order = list(site.bn.graph.nodes)
    between = order[order.index(site.bn) + 1 : order.index(site.addition)]
    for node in between:
        if node.op == "call_module":
            child = module.get_submodule(node.target)
            if any(m is bn for m in child.modules()):
                raise UnsafeFusion(f"{node.target} calls it too, before the addition")
        elif node.op == "get_attr":
            owner = module.get_submodule(str(node.target).rpartition(".")[0])
            if owner is bn:
                raise UnsafeFusion(f"{node.target} is read before the addition")
    runs = [node.target for node in between if node.op not in ("get_attr", "placeholder")]
    if runs and not _is_fresh_memory(site.bn.args[0], module):
        raise UnsafeFusion(f"{runs[0]} runs before the addition, and may change its input")


def _is_fresh_memory(value: Any, module: nn.Module) -> bool:
    """Return whether only its one reader can reach the memory of a value."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        child = module.get_submodule(str(value.target))
        return type(child) in _FRESH_MEMORY_MODULES and not is_hooked(child)
    return value.op == "call_function" and value.target in _FRESH_MEMORY_FUNCTIONS


def _rewrite(site: _Site) -> None:
    graph = site.bn.graph
    last = site.activation or site.addition or site.bn
    anchor = site.addition or site.bn
    in_place = site.addition is not None and site.addition.target in _IN_PLACE
    with graph.inserting_before(anchor):
        # Not graph.get_attr, which expects a parameter or a buffer.
        bn = graph.create_node("get_attr", site.bn.target)
        activation: Any = site.named
        if site.activation is not None and site.named is None:
            activation = graph.create_node("get_attr", site.activation.target)
        fused = graph.call_function(
            call_batch_norm, (bn, site.bn.args[0], site.residual, activation, in_place)
        )
    last.replace_all_uses_with(fused)
    for node in (site.activation, site.addition, site.bn):
        if node is not None:
            graph.erase_node(node)


def _operand_added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """Return the operand that a node adds to a value, None if it is not an addition."""
    if (
        node.op not in ("call_function", "call_method")
        or node.target not in _ADDITIONS
        or len(node.args) != 2
        or node.kwargs not in ({}, {"alpha": 1})
    ):
        return None
    left, right = node.args
    other = right if left is value else left
    return other if isinstance(other, fx.Node) and other is not value else None


def _activation_applied(node: fx.Node, value: Any, module: nn.Module) -> NamedActivation | None:
    """Return the activation that a node applies to a value, None if it is not one."""
    if not node.args or node.args[0] is not value:
        return None
    rest: tuple[Any, ...] = node.args[1:]
    if any(isinstance(arg, fx.Node) for arg in (*rest, *node.kwargs.values())):
        return None
    if node.op == "call_module":
        plain = not rest and not node.kwargs
        return activation_of(module.get_submodule(str(node.target))) if plain else None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](*rest, **node.kwargs)
    if node.op == "call_method" and node.target in _METHODS:
        return _METHODS[str(node.target)], SLOPE
    return None


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, "add_"}

# Each takes the arguments of the function after its input.
_FUNCTIONS: dict[Any, Callable[..., NamedActivation | None]] = {
    F.relu: lambda inplace=False: ("relu", SLOPE),
    torch.relu: lambda: ("relu", SLOPE),
    torch.relu_: lambda: ("relu", SLOPE),
    F.relu6: lambda inplace=False: ("relu6", SLOPE),
    F.leaky_relu: lambda negative_slope=SLOPE, inplace=False: ("leaky_relu", negative_slope),
    F.elu: lambda alpha=1.0, inplace=False: ("elu", SLOPE) if alpha == 1 else None,
    F.silu: lambda inplace=False: ("silu", SLOPE),
    F.gelu: lambda approximate="none": ("gelu" if approximate == "none" else "gelu_tanh", SLOPE),
    F.hardswish: lambda inplace=False: ("hardswish", SLOPE),
    F.mish: lambda inplace=False: ("mish", SLOPE),
    torch.sigmoid: lambda: ("sigmoid", SLOPE),
    torch.tanh: lambda: ("tanh", SLOPE),
}
_METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}

_FRESH_MEMORY_MODULES = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
_FRESH_MEMORY_FUNCTIONS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, torch.cat),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
