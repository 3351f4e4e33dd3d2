"""Fuses and unfuses a whole model, in place."""

from torch import nn

from bn_lightning.conversion.fusion.forwards import (
    FusedForward,
    RecordedForward,
    SequentialForward,
    Variant,
    is_pair,
)
from bn_lightning.conversion.fusion.fused_call import is_fusable
from bn_lightning.conversion.fusion.sites import (
    FusionResult,
    UnsafeFusion,
    check_modules,
    fuse_graph,
)
from bn_lightning.conversion.tracing import (
    NotTraceable,
    forward_of,
    has_own_forward,
    required_arguments,
    trace_forward,
)


def fuse_model(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Fuse the BatchNorms of a model with the addition and activation after them, in place.

    Args:
        model: its BatchNorms are this package's; others are ignored.

    Returns:
        The names of the BatchNorms that at least one call fuses, and name -> reason for those that
        at least one call does not fuse although an addition or activation follows, and for those
        whose callers cannot be traced.
    """
    names = {module: name for name, module in model.named_modules()}
    total = FusionResult()
    untraced: dict[nn.Module, str] = {}
    for caller, name in names.items():
        inner = [m for m in caller.modules() if m is not caller and is_fusable(m)]
        if not inner or type(caller).forward is nn.Module.forward:
            continue
        where = forward_of(caller, name)
        try:
            result = _fuse_caller(caller)
        except NotTraceable as error:
            # Parents come before their children, so the reason of the nearest caller remains.
            untraced |= dict.fromkeys(inner, f"{where} cannot be traced: {error}")
            continue
        total.called |= result.called
        total.fused |= result.fused
        total.reasons |= {bn: f"in {where}, {reason}" for bn, reason in result.reasons.items()}
    for bn, reason in untraced.items():
        if bn not in total.called:
            total.reasons[bn] = reason
    return (
        [name for module, name in names.items() if module in total.fused],
        {names[bn]: reason for bn, reason in total.reasons.items()},
    )


def unfuse_model(model: nn.Module) -> list[str]:
    """Undo all fusion of a model, in place.

    Returns:
        The names of the modules whose own forward is restored.
    """
    names = []
    for name, module in model.named_modules():
        if is_fused(module):
            del module.__dict__["forward"]
            names.append(name)
    return names


def is_fused(module: nn.Module) -> bool:
    """Return whether a module has a forward that fuses BatchNorms."""
    return isinstance(module.__dict__.get("forward"), FusedForward)


def _fuse_caller(caller: nn.Module) -> FusionResult:
    """Give a module a fused forward if there is something to fuse, or raise NotTraceable."""
    if has_own_forward(caller):
        raise NotTraceable("the instance has its own forward")
    if type(caller).forward is nn.Sequential.forward:
        return _fuse_sequential(caller)
    result = FusionResult()
    arguments = len(required_arguments(caller))
    variants = []
    for trace in trace_forward(caller):
        fuse_graph(trace.graph, caller, result)
        variants.append(Variant(trace.graph, trace.guards))
    if result.fused:
        caller.__dict__["forward"] = RecordedForward(caller, arguments, variants)
    return result


def _fuse_sequential(caller: nn.Module) -> FusionResult:
    result = FusionResult()
    modules = list(caller)  # type: ignore[call-overload]  # an nn.Sequential; children() skips repeats
    for module, follower in zip(modules, [*modules[1:], None], strict=True):
        if is_fusable(module):
            result.called.add(module)
        if is_pair(module, follower):
            try:
                check_modules(module, follower)
                result.fused.add(module)
            except UnsafeFusion as error:
                result.reasons[module] = str(error)
    if result.fused:
        caller.__dict__["forward"] = SequentialForward(caller)
    return result
