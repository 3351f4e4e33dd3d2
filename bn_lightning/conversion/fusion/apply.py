"""A whole model: fused in place, and given its own forwards back."""

from torch import nn

from bn_lightning.conversion.fusion.forwards import (
    FusedForward,
    RecordedForward,
    SequentialForward,
    Variant,
    is_pair,
)
from bn_lightning.conversion.fusion.fused_call import is_fusable
from bn_lightning.conversion.fusion.sites import Findings, Unsafe, check_modules, fuse_graph
from bn_lightning.conversion.tracing import (
    NotTraceable,
    forward_of,
    has_own_forward,
    required_arguments,
    trace_forward,
)


def fuse(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Fuses the BatchNorms of a model with what follows them, in place.

    Args:
        model: its BatchNorms are this package's; others are not looked at.

    Returns:
        The names of those fused at one call at least; and, by name, why others were not, or not at
        every call, if an addition or an activation follows them or nobody is known to call them.
    """
    names = {module: name for name, module in model.named_modules()}
    everything = Findings()
    untraced: dict[nn.Module, str] = {}
    for caller, name in names.items():
        inner = [m for m in caller.modules() if m is not caller and is_fusable(m)]
        if not inner or type(caller).forward is nn.Module.forward:
            continue
        where = forward_of(caller, name)
        try:
            found = _fuse_caller(caller)
        except NotTraceable as why:
            # Parents come before their children: the nearest has the last word.
            untraced |= dict.fromkeys(inner, f"{where} is not known: {why}")
            continue
        everything.called |= found.called
        everything.fused |= found.fused
        everything.reasons |= {bn: f"in {where}, {why}" for bn, why in found.reasons.items()}
    for bn, reason in untraced.items():
        if bn not in everything.called:
            everything.reasons[bn] = reason
    return (
        [name for module, name in names.items() if module in everything.fused],
        {names[bn]: why for bn, why in everything.reasons.items()},
    )


def unfuse(model: nn.Module) -> list[str]:
    """Takes all fusion of a model back, in place.

    Returns:
        The names of the modules whose own forward runs again.
    """
    names = []
    for name, module in model.named_modules():
        if is_fused(module):
            del module.__dict__["forward"]
            names.append(name)
    return names


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module has a forward that calls BatchNorms with what follows them."""
    return isinstance(module.__dict__.get("forward"), FusedForward)


def _fuse_caller(caller: nn.Module) -> Findings:
    """Gives a module a fused forward, if there is something to fuse.

    Raises:
        NotTraceable: what its forward does cannot be told.
    """
    if has_own_forward(caller):
        raise NotTraceable("the instance has a forward of its own")
    if type(caller).forward is nn.Sequential.forward:
        return _fuse_sequential(caller)
    findings = Findings()
    arguments = len(required_arguments(caller))
    variants = []
    for trace in trace_forward(caller):
        fuse_graph(trace.graph, caller, findings)
        variants.append(Variant(trace.graph, trace.guards))
    if findings.fused:
        caller.__dict__["forward"] = RecordedForward(caller, arguments, variants)
    return findings


def _fuse_sequential(caller: nn.Module) -> Findings:
    findings = Findings()
    modules = list(caller)  # type: ignore[call-overload]  # an nn.Sequential; children() skips repeats
    for module, follower in zip(modules, [*modules[1:], None], strict=True):
        if is_fusable(module):
            findings.called.add(module)
        if is_pair(module, follower):
            try:
                check_modules(module, follower)
                findings.fused.add(module)
            except Unsafe as why:
                findings.reasons[module] = str(why)
    if findings.fused:
        caller.__dict__["forward"] = SequentialForward(caller)
    return findings
