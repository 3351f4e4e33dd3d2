"""Computes BatchNorm, the addition and the activation that follow it in one call, in any forward.

    y = act(bn(x))    and    y = act(bn(x) + residual), act(residual + bn(x)), bn(x) + residual

The first call of a module computes the BatchNorm alone, and its output notes what reads it
(`Watch`). From the next forward on, that is predicted to follow each call (`Site`):

    an activation    is computed with the call. The output stands for the BatchNorm alone, and the
                     activation takes what is there.
    an addition      computes the BatchNorm with it, and the activation that follows the sum.
    anything else    is not fused: the call computes the BatchNorm, and returns a plain tensor.

The output of a predicted call is a `Deferred`, a tensor with shape, dtype and device, but without
values. If the prediction is wrong, the BatchNorm is computed alone when the output is read; a
second time, if the activation was computed. Statistics are updated once, in the order of the calls:

    values of another step   a call keeps its input, parameters, gradient mode and stream; if one of
                             the tensors was changed in place since, reading is an error
    an update lost           a call that nobody reads updates the statistics when its output is
                             freed, when the model returns, and before the module is called again

A `Deferred` that is read becomes a plain tensor: the same object, with another class and content.
Before the outermost module of a conversion returns, all of them do (outermost.py).
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bn_lightning.conversion.deferred_call import (
    ADDITION,
    NOTHING,
    DeferredCall,
    Prediction,
    Site,
    Watch,
    is_needed_early,
    modes_for,
)
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

_AllKeys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
_make_subclass: Any = Tensor._make_subclass
# C++ has it, on behalf of an autograd.Function, TorchScript or an extension.
_READ_BY_AUTOGRAD = (
    "the output of a BatchNorm to be read by an addition or activation, as in the forwards "
    "before, got one that autograd knows by itself"
)


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
        fused: number of calls that were fused.
        separate: number of other calls.
    """

    def __init__(self, weight: Tensor | None, fused: int = 0, separate: int = 0) -> None:
        self.weight = weight
        self.fused, self.separate = fused, separate
        self._sites = {True: Site(), False: Site()}

    def __reduce__(self) -> Any:
        return type(self), (self.weight, self.fused, self.separate)

    def count(self) -> FusionCount:
        """Return the numbers of calls."""
        return FusionCount(self.fused, self.separate)

    def __call__(
        self,
        module: nn.Module,
        compute: Callable[..., Tensor],
        input: Tensor,
        state: tuple[Tensor | None, ...],
        options: dict[str, Any],
    ) -> Tensor:
        """Return `compute(input, *state, **options)`, deferred where that is possible.

        The arguments are those of `BatchNormCall`; `compute` is that of `module`.
        """
        if torch.compiler.is_compiling():
            return trace(compute, input, state, options)
        if type(input) is Deferred:
            input = read(input)
        if _thread.waiting:
            self._finish_earlier()
        site = self._sites[options["training"]]
        if site.learned is not NOTHING or site.prediction is not NOTHING:
            modes = modes_for(input)
            if not is_needed_early(module, input, options["training"], modes):
                prediction = site.begin(modes[2] is not None, _thread.outermost is not None)
                if prediction is not NOTHING:
                    arguments = (compute, input, state, options)
                    call = DeferredCall(module, site, modes, arguments)
                    return self._defer(call, prediction)
        self.separate += 1
        return compute(input, *state, **options)

    def _defer(self, call: DeferredCall, prediction: Prediction | None) -> Tensor:
        if prediction is not None:
            first, last = prediction
            if first is not ADDITION and call.run_ahead(first):
                return _stand_in(call, call.result.requires_grad)  # type: ignore[union-attr]
            if call.wait(last):
                made = _stand_in(call, call.modes[0] and call.kind.needs_grad)
                _thread.waiting[id(self)] = weakref.ref(made)
                return made
        watch = Watch(call, call.run_at_once())
        return _made(watch.tensor.as_subclass(Deferred), watch)

    def _finish_earlier(self) -> None:
        """Compute the last call, so that the statistics are updated in the order of the calls."""
        earlier = _thread.waiting.pop(id(self), None)
        before = None if earlier is None else earlier()
        if type(before) is Deferred and not before._value.is_done:
            read(before)


class _Thread(threading.local):
    """What a thread has deferred.

    Attributes:
        outermost: the module whose forward runs and will compute all, or None.
        waiting: id of a `Deferral` -> the last tensor whose call may not be computed yet.
        made: the tensors deferred in the forward of `outermost`.
    """

    def __init__(self) -> None:
        self.outermost: Any = None
        self.waiting: dict[int, weakref.ref[Tensor]] = {}
        self.made: list[weakref.ref[Tensor]] = []


_thread = _Thread()


def enter_outermost(module: nn.Module) -> None:
    """Start the forward of a converted model, unless one runs in this thread."""
    if _thread.outermost is None:
        _thread.outermost = module


def leave_outermost(module: nn.Module, has_failed: bool) -> bool:
    """End the forward that `enter_outermost` started; computes all that is still deferred.

    Returns:
        Whether the forward was that of `module`.
    """
    if _thread.outermost is not module:
        return False
    made, _thread.made, _thread.outermost = _thread.made, [], None
    _thread.waiting.clear()
    if not has_failed:
        for reference in made:
            tensor = reference()
            if type(tensor) is Deferred:
                read(tensor)
    Site.passes += 1
    return True


class Deferred(Tensor):
    """The output of a BatchNorm, not computed yet or watched; made by `Deferral`."""

    _value: Any  # a `DeferredCall` or a `Watch`

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is cls:
            expected: Any = first._value.expected
            if (
                expected is not None
                and func is expected.function
                and kwargs == expected.kwargs
                and args[1:] == expected.args
            ):
                result = _take(first, first._value)
                if result is not None:
                    return result
        result = None
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in ADDITIONS:
            if len(args) == 2 and kwargs in ({}, {"alpha": 1}):
                result = _add(func, args)
        elif type(first) is cls:
            activation = activation_of(func, args, kwargs)
            if activation is not None:
                result = _activate(first, activation)
            elif func in UNCHANGED and UNCHANGED[func](*args[1:], **kwargs):
                result = first
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


def _made(tensor: Any, value: DeferredCall | Watch) -> Deferred:
    tensor._value = value
    if _thread.outermost is not None:
        _thread.made.append(weakref.ref(tensor))
    return tensor


def _stand_in(call: Any, requires_grad: bool) -> Deferred:
    return _made(_make_subclass(Deferred, call.kind.blank, requires_grad), call)


def read(tensor: Deferred) -> Tensor:
    """Make a deferred tensor plain for an operation that is not fused, and return it.

    It is changed in place; if that cannot be, another tensor is returned.
    """
    value = tensor._value
    if type(value) is Watch:
        value.note(None)
        return tensor if _become(tensor, value.tensor) else value.tensor
    content = value.run_alone()
    if _become(tensor, content):
        return tensor
    if content.requires_grad:
        value.fail(_READ_BY_AUTOGRAD)
    value.content = content
    return content


def _become(tensor: Deferred, content: Tensor) -> bool:
    """Make a deferred tensor plain, unless C++ refers to it; return whether it is plain now."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor._use_count() > 1:  # type: ignore[attr-defined]
            return False
        if content._use_count() > 1:  # type: ignore[attr-defined]
            with torch.enable_grad():
                content = content.view_as(content)
        torch._C._swap_tensor_impl(tensor, content)
    tensor.__class__ = Tensor  # type: ignore[assignment]
    del tensor._value
    return True


def compute_all(value: Any) -> Any:
    """Return an argument with all deferred tensors in it computed."""
    return replace_tensors(value, Deferred, read)


def _activate(y: Deferred, activation: FusableActivation) -> Tensor | None:
    """Return the activation of `y`, None if it cannot be fused."""
    value = y._value
    if type(value) is Watch:
        call = value.call
        is_fusable = call.is_current() and call.fuses(activation, value.output is not None)
        value.note(activation if is_fusable else None)
        result = activation.apply(value.tensor)
        return _replaced(y, result) if activation.in_place else result
    if value.expected is not None:
        return _take(y, value) if activation[:3] == value.expected[:3] else None
    if value.is_done or not (value.is_current() and value.fuses(activation)):
        return None
    result = value.run(None, activation.name, activation.slope)
    return _replaced(y, result) if activation.in_place else result


def _take(y: Deferred, call: Any) -> Tensor | None:
    """Return the activation that was computed ahead, None if it would be another one now."""
    if not call.is_current():
        return None
    result, in_place = call.result, call.expected.in_place
    call.result = call.expected = None
    return _replaced(y, result) if in_place else result


def _replaced(y: Deferred, content: Tensor) -> Tensor:
    """Return `y` with what an operation in place made of it."""
    value = y._value
    if not _become(y, content) and type(value) is DeferredCall:
        value.fail(_READ_BY_AUTOGRAD)
    return y


def _add(func: Any, args: Any) -> Tensor | None:
    """Return the sum of a deferred tensor and another, None if it cannot be fused."""
    in_place = func in IN_PLACE_ADDITIONS
    for y, other in (args, args[::-1]):
        if type(y) is not Deferred or y is other:
            continue
        value = y._value
        watch = value if type(value) is Watch else None
        call: Any = value if watch is None else watch.call
        is_sum = call.is_done if watch is None else watch.output is not None
        if is_sum or not call.is_current():
            continue
        if type(other) is Deferred:
            other = read(other)
        if not fits(other, call.input):
            continue
        if watch is not None:
            watch.note(ADDITION)
            plain = watch.tensor
            summed = func(plain, other) if y is args[0] else func(other, plain)
            value = Watch(call, summed, watch)
            if not in_place:
                return _made(summed.as_subclass(Deferred), value)
        elif in_place and y is not args[0]:
            return _add_to(other, call)
        else:
            value = call.add(other)
            summed = value.result
            if value.expected is None:
                return _replaced(y, summed) if in_place else summed
            if not in_place:
                return _stand_in(value, summed.requires_grad)
            with torch._C.DisableTorchFunctionSubclass():
                y.requires_grad_(summed.requires_grad)
        if y is args[0]:
            y._value = value
        return args[0]
    return None


def _add_to(x: Tensor, call: DeferredCall) -> Tensor | None:
    """Add bn(...) to a tensor in place, whose memory others may have."""
    if call.modes[0] and x.is_leaf and x.requires_grad:
        return None  # torch raises
    summed = call.run(x)
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
