"""Finds what can be folded from the forwards alone, without inputs.

Each forward runs once with proxies in place of tensors, by torch.fx, with the child modules as
single nodes. A pair is found where one forward calls a layer and then a BatchNorm, once each. A
forward that torch.fx cannot follow, or that reads more of a layer than its output, may use any
layer below it in any way, so nothing below it is folded.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from bn_lightning.conversion.class_swap import has_instance_forward
from bn_lightning.conversion.fold_arithmetic import FoldedPair


class _UnknownForward(Exception):
    """A forward whose use of layers and BatchNorms is not known."""


class _ChildTracer(fx.Tracer):
    """Records each child module as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_pairs_in_forwards(
    model: nn.Module, norms: set[nn.Module], layers: set[nn.Module], advice: str
) -> tuple[list[FoldedPair], dict[nn.Module, str]]:
    """Find the pairs that can be folded.

    Args:
        model: in evaluation mode; forwards may leave proxies on it, so give a copy.
        norms: its BatchNorms that may be folded.
        layers: its convolutions and linear layers that may get new weights.
        advice: end of the reason where a forward is not known.

    Returns:
        The pairs, and BatchNorm -> reason for the others.
    """
    watched = norms | layers
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[nn.Module] = Counter()
    layer_before: dict[nn.Module, nn.Module] = {}
    unknown: dict[nn.Module, str] = {}
    for caller, name in names.items():
        inner = [m for m in caller.modules() if m is not caller and m in watched]
        if not inner or caller in watched or type(caller).forward is nn.Module.forward:
            continue
        try:
            for module, before in _calls(caller, watched):
                calls[module] += 1
                if before is not None:
                    layer_before[module] = before
        except _UnknownForward as error:
            where = f"{type(caller).__name__}.forward of {name or 'the model itself'}"
            unknown |= dict.fromkeys(inner, f"{where} {error}{advice}")
    pairs, skipped = [], {}
    for norm in norms:
        layer = layer_before.get(norm)
        reason = unknown.get(norm)
        if layer is None or layer not in layers:
            reason = (
                reason or "no convolution or linear layer that may be changed is directly before it"
            )
        elif calls[norm] > 1 or calls[layer] > 1:
            reason = reason or "it, or the layer before it, is used more than once"
        else:
            reason = reason or unknown.get(layer) or _reason_other_channels(norm, layer)
            if reason is None:
                rows_only = isinstance(layer, nn.Linear)
                pairs.append(FoldedPair(norm, (layer,), rows_only=rows_only))
                continue
        skipped[norm] = reason
    return pairs, skipped


def _reason_other_channels(norm: Any, layer: Any) -> str | None:
    linear = isinstance(layer, nn.Linear)
    outputs, channels = (
        layer.out_features if linear else layer.out_channels,
        norm.running_mean.numel(),
    )
    if outputs != channels:
        return f"the layer before it has {outputs} outputs, but it has {channels} channels"
    if linear and not isinstance(norm, nn.BatchNorm1d):
        return "its channels are not the features of the linear layer before it"
    return None


def _calls(caller: Any, watched: set[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yield each module that a forward calls, and the module whose output only this call reads."""
    if has_instance_forward(caller):
        raise _UnknownForward("is set on the instance")
    if type(caller).forward is nn.Sequential.forward:
        modules = list(caller)
        yield from zip(modules, [None, *modules[:-1]], strict=True)
        return
    graph = _trace(caller, watched)
    for node in graph.nodes:
        if node.op == "get_attr":
            yield caller.get_submodule(node.target.rpartition(".")[0]), None
        elif node.op == "call_module":
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            layer = None
            if isinstance(before, fx.Node) and before.op == "call_module":
                layer = caller.get_submodule(str(before.target)) if len(before.users) == 1 else None
            yield caller.get_submodule(node.target), layer


def _trace(caller: nn.Module, watched: set[nn.Module]) -> fx.Graph:
    """Record a forward, or raise _UnknownForward, also if it reads an attribute of `watched`."""
    _, *parameters = inspect.signature(type(caller).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    inner = [m for m in caller.modules() if m in watched]
    classes = [type(m) for m in inner]
    for module in inner:
        module.__class__ = _closed(type(module))
    try:
        return _ChildTracer().trace(caller, concrete_args=defaults)
    except _UnknownForward:
        raise
    except Exception as error:
        raise _UnknownForward("cannot be followed without inputs") from error
    finally:
        for module, cls in zip(inner, classes, strict=True):
            module.__class__ = cls


class _NoSubclass(nn.Module):
    """Hides the temporary subclass from `__init_subclass__` of the class."""

    def __init_subclass__(cls) -> None:
        pass


def _closed(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose attributes, parameters and buffers cannot be read."""

    def read(self: nn.Module, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        own = name in state and name not in _OF_EVERY_MODULE
        if own or name in state["_parameters"] or name in state["_buffers"]:
            raise _UnknownForward(f"reads `{name}`")
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (_NoSubclass, cls), {"__getattribute__": read})


_OF_EVERY_MODULE = {*vars(nn.Module())} - {"training"}
