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

Where the same activation always follows directly, it is computed with the call, before anything
asks for it (`Ahead`). If something else reads the output then, the BatchNorm is computed again
alone.

A `Deferred` that is computed becomes a plain tensor: the same object, with another class and
content. Before the outermost module of a conversion returns, all of them do (outermost.py).
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bn_lightning.conversion.deferrable import may_wait, planned
from bn_lightning.conversion.deferred_call import (
    ALL,
    NOTHING,
    Ahead,
    CallPlan,
    DeferredCall,
    Site,
    Value,
    modes_for,
    versions_of,
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
    """

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight
        self.fused = 0
        self.separate = 0
        self._sites = {True: Site(), False: Site()}

    def count(self) -> FusionCount:
        """Return the numbers of calls."""
        return FusionCount(self.fused, self.separate)

    def __call__(
        self,
        compute: Callable[..., Tensor],
        input: Tensor,
        state: tuple[Tensor | None, ...],
        options: dict[str, Any],
    ) -> Tensor:
        """Return `compute(input, *state, **options)`, deferred where that is possible.

        The arguments are those of `BatchNormCall`; `compute` is a method of the module.
        """
        if torch.compiler.is_compiling():
            return trace(compute, input, state, options)
        if type(input) is Deferred:
            input = read(input)
        site = self._sites[options["training"]]
        if site.fuses != NOTHING:
            self._finish_earlier()
            module: Any = compute.__self__  # type: ignore[attr-defined]
            plan = planned(site, module, input, state)
            if plan is not None and plan.activation is not None:
                return _run_ahead(plan, (self, site, compute, input, state, options))
            waits = plan is not None or may_wait(module, input, state, options)
            if waits and site.begin():
                return _defer(Value(DeferredCall(self, site, compute, input, state, options)))
        self.separate += 1
        return compute(input, *state, **options)

    def _finish_earlier(self) -> None:
        """Compute the last call, so that the statistics are updated in the order of the calls."""
        earlier = _thread.latest.get(id(self))
        before = None if earlier is None else earlier()
        if type(before) is Deferred and not _value_of(before).call.is_done:
            _value_of(before).call.is_candidate = True
            _value_of(before).compute()


def _run_ahead(plan: CallPlan, arguments: tuple[Any, ...]) -> Tensor:
    """Compute BatchNorm and activation, and return a tensor that stands for the BatchNorm alone.

    Args:
        plan: of the site.
        arguments: those of `DeferredCall`.
    """
    deferral, site, compute, x, state, options = arguments
    versions = versions_of((x, *state))
    activation: Any = plan.activation
    options = {**options, "activation": activation.name, "negative_slope": activation.slope}
    result = compute(x, *state, **options)
    deferral.fused += 1
    made = _wrap(Ahead(result, arguments, versions, plan), x, site, result.requires_grad)
    if _thread.outermost is not None:
        _thread.made.append(weakref.ref(made))
    return made


class _Thread(threading.local):
    """What a thread has deferred.

    Attributes:
        outermost: the module whose forward runs and will compute all, or None.
        latest: id of a `Deferral` -> the last tensor that it deferred.
        made: the tensors deferred in the forward of `outermost`.
    """

    def __init__(self) -> None:
        self.outermost: Any = None
        self.latest: dict[int, weakref.ref[Tensor]] = {}
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
    _thread.latest.clear()
    if not has_failed:
        for reference in made:
            tensor = reference()
            if type(tensor) is Deferred:
                read(tensor, is_use=False)
        Site.passes += 1
    return True


class Deferred(Tensor):
    """The output of a BatchNorm, not computed yet; made by `Deferral`."""

    _value: Value | Ahead

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = None
        if func in ADDITIONS:
            if len(args) == 2 and kwargs in ({}, {"alpha": 1}):
                result = _add(func in IN_PLACE_ADDITIONS, *args)
        elif args and type(args[0]) is cls:
            ahead = args[0]._value
            if type(ahead) is Ahead and ahead.activation[3:] == (func, args[1:], kwargs):
                result = _take(args[0], ahead)
                if result is not None:
                    return result
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


def _take(y: Deferred, ahead: Ahead) -> Tensor | None:
    """Return the activation that was computed ahead, None if it cannot be used."""
    result = ahead.result
    if result is None or modes_for(ahead.arguments[3]) != ahead.modes:
        return None
    ahead.result = None
    if not ahead.activation.in_place:
        return result
    if _become(y, result):
        return y
    value = y._value = ahead.to_value()
    value.tensor = result
    return read(y)


def _value_of(y: Deferred) -> Value:
    if type(y._value) is Ahead:
        y._value = y._value.to_value()
    return y._value  # type: ignore[return-value]


def read(tensor: Deferred, *, is_use: bool = True) -> Tensor:
    """Make a deferred tensor plain, and return it.

    Args:
        tensor: changed in place; if that cannot be, another tensor is returned.
        is_use: whether an operation reads it.
    """
    value = _value_of(tensor)
    value.note_read(is_use)
    content = value.compute() if value.tensor is None else value.tensor
    with torch._C.DisableTorchFunctionSubclass():
        node = tensor.grad_fn
        if node is not None and getattr(node, "value", None) is not value:
            content = _Adopt.apply(tensor, content)  # an autograd.Function returned it
    if _become(tensor, content):
        value.tensor = tensor
        return tensor
    # C++ has it, on behalf of an autograd.Function, TorchScript or an extension.
    if node is None and content.requires_grad:
        value.call.fail(
            "the output of a BatchNorm to be read by an addition or activation, as in the forwards "
            "before, got one that autograd knows by itself"
        )
    value.call.site.misses += 1
    value.tensor = content
    return content


def _become(tensor: Deferred, content: Tensor) -> bool:
    """Make a deferred tensor plain, unless C++ refers to it; return whether it is plain now."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor._use_count() > 1:  # type: ignore[attr-defined]
            return False
        if content._use_count() > 1:  # type: ignore[attr-defined]
            content = content.view_as(content)
        torch._C._swap_tensor_impl(tensor, content)
    tensor.__class__ = Tensor  # type: ignore[assignment]
    del tensor._value
    return True


def compute_all(value: Any) -> Any:
    """Return an argument with all deferred tensors in it computed."""
    return replace_tensors(value, Deferred, read)


def _defer(value: Value) -> Deferred:
    """Return a deferred tensor for a value, connected to the graph of autograd."""
    call = value.call
    inputs = (*call.inputs, value.addend)
    needs_grad = call.grad and any([t is not None and t.requires_grad for t in inputs])
    if needs_grad and not call.is_done and not call.place:
        call.reserve_place()
    is_bridged = needs_grad and not call.site.is_known
    made = (
        _Bridge.apply(value, *inputs)
        if is_bridged
        else _wrap(value, call.input, call.site, needs_grad)
    )
    value.owner = weakref.ref(made)
    _thread.latest[id(call.deferral)] = value.owner
    if _thread.outermost is not None:
        _thread.made.append(value.owner)
    return made


def _wrap(value: Value | Ahead, like: Tensor, site: Site, requires_grad: bool) -> Deferred:
    """Return a tensor that has the metadata of `like`, the input, and no memory."""
    blank = site.blank
    if (
        blank is None
        or blank.shape != like.shape
        or blank.stride() != like.stride()
        or blank.dtype != like.dtype
        or blank.device != like.device
    ):
        with torch.inference_mode(False):
            blank = site.blank = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        blank.untyped_storage().resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(blank)
    made: Any = _make_subclass(Deferred, blank, requires_grad)
    made._value = value
    return made


def _activate(y: Deferred, activation: FusableActivation) -> Tensor | None:
    """Return the activation of `y`, None if it cannot be fused."""
    value = _value_of(y)
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
    if not activation.in_place:
        return result
    value.tensor = result
    return read(y)


def _add(in_place: bool, left: Any, right: Any) -> Tensor | None:
    """Return the deferred sum of a deferred tensor and another, None if it cannot be fused."""
    for y, other in ((left, right), (right, left)):
        if type(y) is not Deferred or y is other:
            continue
        value = _value_of(y)
        if value.residual is not None or not value.is_pending or not value.call.is_current():
            continue
        if type(other) is Deferred:
            other = read(other)
        if not value.is_pending or not fits(other, value.call.input):
            continue
        if not in_place:
            return _defer(Value(value.call, value, other))
        if y is right:
            return _add_to(other, value)
        summed = _defer(Value(value.call, residual=other))
        with torch._C.DisableTorchFunctionSubclass():
            torch._C._swap_tensor_impl(y, summed)
        y._value = _value_of(summed)
        y._value.owner = value.owner
        return y
    return None


def _add_to(x: Tensor, value: Value) -> Tensor | None:
    """Add bn(...) to a tensor in place, whose memory others may have."""
    if not value.call.site.is_known:
        value.call.is_candidate = value.is_shared = True
        return x.add_(value.compute())
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
        return _wrap(value, value.call.input, value.call.site, requires_grad=False)

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


class _Adopt(torch.autograd.Function):
    """Gives a computed value the place of its deferred tensor in the graph."""

    @staticmethod
    def forward(ctx: Any, owner: Deferred, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None
