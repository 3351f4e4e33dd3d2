"""Computes BatchNorm, the addition and the activation that follow it in one call, in any forward.

    y = act(bn(x))    and    y = act(bn(x) + residual), act(residual + bn(x)), bn(x) + residual

A BatchNorm whose module has a `Deferral` returns a `Deferred`: a tensor with shape, dtype and
device, but without values. The first operation that reads it decides. An addition is put off too;
an activation computes all in one call; every other operation computes the BatchNorm first. Running
statistics are updated once, however often the output is read, and in the order of the calls.

    values of another step   a call keeps its input, parameters, gradient mode and stream; if one of
                             the tensors was changed in place since, reading is an error
    an update lost           a call that nobody reads updates the statistics when its output is
                             freed, when the model returns, and before the module is called again
    a gradient lost          `_Bridge` connects a tensor without values to the graph, for code that
                             passes it on unseen by __torch_function__, as autograd.Function does
    a value computed twice   `Site` learns in the first forward which outputs are read twice

Once a forward has shown what always follows a call, the next ones are planned (`CallPlan`): the
activation is computed with the call, or with the addition before it, and waits to be called. If
something else reads the output then, the BatchNorm is computed again alone.

A `Deferred` that is computed becomes a plain tensor: the same object, with another class and
content. Before the outermost module of a conversion returns, all of them do (model_hooks.py).
"""

import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bn_lightning.conversion.deferrable import ALL, NOTHING, CallPlan, Site, may_wait, modes_for
from bn_lightning.conversion.deferred_call import DeferredCall, Value, fill, unshared
from bn_lightning.conversion.fusable import (
    ADDITIONS,
    IN_PLACE_ADDITIONS,
    METADATA,
    UNCHANGED,
    FusableActivation,
    activation_of,
    fits,
    replace_tensors,
)
from bn_lightning.conversion.traced import trace
from bn_lightning.kernels.activations import ACTIVATIONS, Saves
from bn_lightning.kernels.dispatch import chooses_triton
from bn_lightning.kernels.measurements import Fusion

_AllKeys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
_make_subclass: Any = Tensor._make_subclass


class FusionCount(NamedTuple):
    """How often a BatchNorm was computed.

    Attributes:
        fused: calls computed together with the addition or activation after them.
        separate: other calls.
    """

    fused: int
    separate: int


class Deferral:
    """Defers the calls of one module; an attribute of the module.

    Args:
        weight: the module's parameter, or None.

    Attributes:
        fused: number of calls that were fused.
        separate: number of other calls.
        sites: what is known of the calls in training, and of those in evaluation.
    """

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight
        self.fused = self.separate = 0
        self.sites = {True: Site(), False: Site()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sites": {True: Site(), False: Site()}}

    def repeat(self, module: Any, x: Tensor) -> Tensor | None:
        """Return the output of a call that is like the last one; None for another call."""
        plan = self.sites[module.training and not module.stats_frozen].plan
        if plan is None or not plan.is_for(module, x):
            return None
        if thread.latest:
            self._finish_earlier()
        versions = plan.versions(x)
        if plan.is_summand is not None:
            made = _defer(Value(DeferredCall.planned(plan, module, x, versions)))
        else:
            activation: Any = plan.activation
            result = plan.repeat((x, None, *plan.fields)) if plan.repeat else None
            if result is None:
                call = DeferredCall.planned(plan, module, x, versions)
                result = call.run(None, *activation[:2])
            else:
                self.fused += 1
            made = _make_subclass(Deferred, plan.attributes["blank"], result.requires_grad)
            made._planned = plan, module, x, versions
            made._waiting = activation, result, x, plan.attributes["modes"]
            _note(made)
        if x.is_inference():
            made._value.call.keep_input()
        return made

    def __call__(
        self,
        module: nn.Module,
        compute: Callable[..., Tensor],
        input: Tensor,
        state: tuple[Tensor | None, ...],
        options: dict[str, Any],
    ) -> Tensor:
        """Return `compute(input, *state, **options)`, deferred where that is possible.

        The arguments are those of `BatchNormCall`; `compute` is that of the module.
        """
        if torch.compiler.is_compiling():
            return trace(compute, input, state, options)
        if type(input) is Deferred:
            input = read(input)
        if thread.latest:
            self._finish_earlier()
        site = self.sites[options["training"]]
        if site.fuses != NOTHING and may_wait(module, input, state, options) and site.begin():
            return _defer(Value(DeferredCall(self, site, module, compute, input, state, options)))
        self.separate += 1
        return compute(input, *state, **options)

    def _finish_earlier(self) -> None:
        """Compute the last call, so that the statistics are updated in the order of the calls."""
        for earlier in reversed(thread.latest.pop(id(self), ())):
            before = earlier()
            if type(before) is Deferred and not before._value.call.is_done:
                before._value.call.is_candidate = True
                before._value.compute()


class _Thread(threading.local):
    """What a thread has deferred.

    Attributes:
        outermost: the module whose forward runs and will compute all, or None.
        latest: id of a `Deferral` -> the tensors that stand for its last call.
        made: the tensors deferred in the forward of `outermost`.
    """

    def __init__(self) -> None:
        self.outermost: Any = None
        self.latest: dict[int, list[weakref.ref[Any]]] = {}
        self.made: list[weakref.ref[Any]] = []


thread = _Thread()


class Deferred(Tensor):
    """The output of a BatchNorm, not computed yet; made by `Deferral`.

    Attributes:
        _waiting: the activation planned to follow, its result, and x and modes of the call; or
            None, also after it has followed.
        _planned: the arguments of `DeferredCall.planned`, if the call was computed as planned.
    """

    _waiting: Any = None
    _planned: tuple[CallPlan, Any, Tensor, list[int | None]]

    @cached_property
    def _value(self) -> Value:
        """What it stands for. Of a call computed as planned, few are asked."""
        call = DeferredCall.planned(*self._planned)
        call.is_done = True
        value = Value(call)
        value.owner = weakref.ref(self)
        return value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # an input of what is compiled
            return _call_eagerly(func, args, kwargs)
        if args and type(args[0]) is cls and args[0]._waiting is not None:
            expected, result, x, modes = args[0]._waiting
            if (
                func is expected.function
                and args[1:] == expected.args
                and kwargs == expected.kwargs
                and modes_for(x) == modes
            ):
                args[0]._waiting = None
                return _replaced(args[0], result) if expected.in_place else result
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = None
        if func in ADDITIONS:
            if len(args) == 2 and kwargs in ({}, {"alpha": 1}):
                result = _add(func in IN_PLACE_ADDITIONS, *args)
        elif args and type(args[0]) is cls:
            activation = activation_of(func, args, kwargs)
            if activation is not None:
                result = _activate(args[0], activation)
            elif func in UNCHANGED and UNCHANGED[func](*args[1:], **kwargs):
                result = args[0]
        return func(*compute_all(args), **compute_all(kwargs)) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Only for code that goes past __torch_function__. The keys of autograd are excluded here.
        include = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(include, _AllKeys):
            args, kwargs = compute_all(args), compute_all(kwargs or {})
        return func(*args, **kwargs)


def _replaced(y: Deferred, result: Tensor) -> Tensor:
    """Return `y` with what an operation in place made of it."""
    if _become(y, result):
        return y
    y._value.tensor = result
    return read(y)


@torch.compiler.disable
def _call_eagerly(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*compute_all(args), **compute_all(kwargs))


def read(tensor: Deferred) -> Tensor:
    """Make a deferred tensor plain, and return it; another tensor, if that cannot be."""
    value = tensor._value
    if tensor._waiting is not None:
        tensor._waiting = None
        value.compute_alone()
    content = tensor if value.is_filled else value.tensor
    value.note_read()
    if content is None:
        content = value.compute()
    if content is not tensor:
        content = value.connect(tensor, content)
    if _become(tensor, content):
        value.tensor = content = tensor
    else:  # C++ has it, on behalf of an autograd.Function, TorchScript or an extension.
        with torch._C.DisableTorchFunctionSubclass():
            is_connected = tensor.grad_fn is not None
        if content.requires_grad and not is_connected:
            value.call.fail(
                "the output of a BatchNorm to be read by an addition or activation, as in the "
                "forwards before, got one that autograd knows by itself"
            )
        value.call.site.miss()
        value.tensor, content = content, unshared(content)
    for outer in value.outers:  # before the operation that reads this one changes it in place
        if type(waiting := outer()) is Deferred:
            read(waiting)
    return content


def _become(tensor: Deferred, content: Tensor) -> bool:
    """Make a deferred tensor plain, unless C++ refers to it; return whether it is plain now."""
    if tensor is not content and not fill(tensor, content):
        return False
    tensor.__class__ = Tensor  # type: ignore[assignment]
    for name in ("_value", "_planned", "_waiting"):
        tensor.__dict__.pop(name, None)
    return True


def compute_all(value: Any) -> Any:
    """Return an argument with all deferred tensors in it computed."""
    return replace_tensors(value, Deferred, read)


def _defer(value: Value) -> Deferred:
    """Return a deferred tensor for a value, connected to the graph of autograd."""
    call = value.call
    inputs = (*call.inputs, value.addend)
    needs_grad = call.grad and any([t is not None and t.requires_grad for t in inputs])
    if needs_grad and not call.is_done:
        node: Any = torch._C._functions.UndefinedGrad()
        value.place = node._sequence_nr()  # what an operation would have now
        call.place = call.place or value.place
    is_bridged = needs_grad and not call.site.is_known
    made = _Bridge.apply(value, *inputs) if is_bridged else _made(value, needs_grad)
    thread.latest.setdefault(id(call.deferral), []).append(value.owner)
    if value.inner is not None:
        value.inner.outers = (*value.inner.outers, value.owner)
    return made


def _made(value: Value, requires_grad: bool) -> Deferred:
    """Return a tensor that stands for a value."""
    made: Any = _make_subclass(Deferred, value.call.blank, requires_grad)
    made._value = value
    value.owner = _note(made)
    return made


def _note(made: Deferred) -> "weakref.ref[Deferred]":
    """Let the hooks of the outermost module compute a tensor; return a reference to it."""
    reference = weakref.ref(made)
    if thread.outermost is not None:
        thread.made.append(reference)
    return reference


def _activate(y: Deferred, activation: FusableActivation) -> Tensor | None:
    """Return the activation of `y`, None if it cannot be fused."""
    value = y._value
    call, site = value.call, value.call.site
    if not value.is_pending or not call.is_current():
        return None
    if value.residual is not None:
        # For these the gradient keeps the residual, which the model may change in place.
        keeps = call.grad and ACTIVATIONS[activation.name].saves is Saves.RESIDUAL
        if keeps or site.fuses != ALL:
            return None
    if activation.in_place and activation.name == "elu":
        # torch computes its gradient from the output, ATen's ops from the input.
        fusion = Fusion("elu", value.residual is not None, call.options["training"])
        if not chooses_triton(call.input, call.options["backend"], fusion):
            return None
    applied = Value(call, value, activation=activation)
    if not (activation.in_place or site.is_known):
        return _defer(applied)
    result = applied.run()
    return _replaced(y, result) if activation.in_place else result


def _add(in_place: bool, left: Any, right: Any) -> Tensor | None:
    """Return the sum of a deferred tensor and another, None if it cannot be fused."""
    for y, other in ((left, right), (right, left)):
        if type(y) is not Deferred or y is other:
            continue
        value = y._value
        call, plan = value.call, value.call.plan
        if value.residual is not None or not value.is_pending or not call.is_current():
            continue
        if type(other) is Deferred:
            other = read(other)
            if not value.is_pending:
                continue
        is_planned = plan is not None and plan.is_summand is not None and plan.is_summand(other)
        if not (is_planned or fits(other, call.input)):
            continue
        if in_place and y is right:
            return _add_to(other, value)
        summed = Value(call, None if in_place else value, other)
        if plan is None or not is_planned:
            made = _defer(summed)
        elif plan.activation is None:
            return _replaced(y, summed.run()) if in_place else summed.run()
        else:
            call.check_unchanged()
            activation: Any = plan.activation
            result = call.run(other, *activation[:2])
            made = _made(summed, result.requires_grad)
            made._waiting = activation, result, call.input, call.modes
        if not in_place:
            return made
        torch._C._swap_tensor_impl(y, made)
        y._value, y._waiting, summed.owner = summed, made._waiting, value.owner
        return y
    return None


def _add_to(x: Tensor, value: Value) -> Tensor | None:
    """Add bn(...) to a tensor in place, whose memory others may have."""
    if not value.call.site.is_known:
        y = value.share()
        with torch._C.DisableTorchFunctionSubclass():
            return x.add_(y)
    if value.call.grad and x.is_leaf and x.requires_grad:
        return None  # torch raises
    summed = Value(value.call, residual=x).run()
    return _WriteOver.apply(x, summed) if summed.requires_grad else x.copy_(summed)


class _WriteOver(torch.autograd.Function):
    """Writes a sum over one of its operands, whose gradient comes from the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.copy_(value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy


class _Bridge(torch.autograd.Function):
    """Connects a deferred tensor to what it will be computed from."""

    @staticmethod
    def forward(ctx: Any, value: Value, *inputs: Tensor | None) -> Deferred:
        ctx.value = value
        return _made(value, requires_grad=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        value: Value = ctx.value
        needs = ctx.needs_input_grad[1:]
        # Views, because one input may depend on another: x, say, and what is added to bn(x).
        with torch.enable_grad():
            inputs = (*value.call.inputs, value.addend)
            views = tuple(None if x is None else x.view_as(x) for x in inputs)
            y = value.run_again(views)
        wanted: Any = [x for x, is_needed in zip(views, needs, strict=True) if is_needed]
        is_differentiated = torch.is_grad_enabled()
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=is_differentiated))
        return None, *(next(gradients) if is_needed else None for is_needed in needs)
