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

A `Deferred` that is computed becomes a plain tensor: the same object, with another class and
content. Before the outermost module of a conversion returns, all of them do (outermost.py).
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bn_lightning.conversion.deferred_call import (
    ALL,
    NOTHING,
    DeferredCall,
    Site,
    Value,
    saved_tensors_hooks_now,
)
from bn_lightning.conversion.fusable import (
    ADDITIONS,
    IN_PLACE_ADDITIONS,
    METADATA,
    UNCHANGED,
    FusableActivation,
    activation_of,
    replace_tensors,
)
from bn_lightning.conversion.traced import trace
from bn_lightning.kernels.activations import ACTIVATIONS, Saves
from bn_lightning.kernels.dispatch import chooses_triton, updates_in_recomputation, uses_triton
from bn_lightning.kernels.measurements import Fusion

_AllKeys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)


class FusionCount(NamedTuple):
    """How often a BatchNorm was computed.

    Attributes:
        fused: calls computed together with the addition or activation after them.
        separate: other calls.
    """

    fused: int
    separate: int


class Deferral:
    """Defers the calls of one module; an attribute of the module."""

    def __init__(self) -> None:
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

        Args:
            compute: a method of the module, called as `bn_lightning.kernels.batch_norm`.
            input: x.
            state: weight, bias, running_mean and running_var.
            options: the keyword arguments.
        """
        if torch.compiler.is_compiling():
            return trace(compute, input, state, options)
        if type(input) is Deferred:
            input = read(input)
        module: Any = compute.__self__  # type: ignore[attr-defined]
        site = self._sites[options["training"]]
        if site.fuses == NOTHING or not _may_wait(module, input, state, options):
            self.separate += 1
            return compute(input, *state, **options)
        earlier = _thread.latest.get(id(module))
        before = None if earlier is None else earlier()
        if type(before) is Deferred and not before._value.call.is_done:
            before._value.call.is_candidate = True
            before._value.compute()
        if site.first_pass is None:
            site.first_pass = Site.passes
        return _defer(Value(DeferredCall(self, site, compute, input, state, options)), input)


def _may_wait(
    module: Any, input: Tensor, state: tuple[Tensor | None, ...], options: dict[str, Any]
) -> bool:
    """Return whether a call can be made later with the same result."""
    if (
        type(input) is not Tensor
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        # So does reentrant checkpointing, which must not return a tensor without values.
        or (options["training"] and not torch.is_grad_enabled())
        # What is computed after a checkpointed part is not run again with it.
        or (updates_in_recomputation() and saved_tensors_hooks_now() is not None)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not input.is_floating_point()
        or input.layout is not torch.strided
    ):
        return False
    channels, known = input.shape[1], state[0] if state[0] is not None else state[2]
    if known is not None and (
        known.shape[0] != channels
        or known.device != input.device
        or known.is_inference()
        # FSDP frees such weights when the module around returns.
        or known._is_view()
    ):
        return False
    if options["backend"] == "triton":
        uses_triton(input, "triton")  # raises for a tensor that the kernels do not support
    return input.numel() > channels and (
        input.is_contiguous()
        or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    )


class _Thread(threading.local):
    """What a thread has deferred.

    Attributes:
        outermost: the module whose forward runs and will compute all, or None.
        latest: id of a module -> the last tensor deferred for it.
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

    _value: Value

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


def read(tensor: Deferred, *, is_use: bool = True) -> Tensor:
    """Make a deferred tensor plain, and return it.

    Args:
        tensor: changed in place; if that cannot be, another tensor is returned.
        is_use: whether an operation reads it.
    """
    value = tensor._value
    value.note_read(is_use)
    content = value.compute() if value.tensor is None else value.tensor
    with torch._C.DisableTorchFunctionSubclass():
        node = tensor.grad_fn
        if node is not None and getattr(node, "value", None) is not value:
            content = _Adopt.apply(tensor, content)  # an autograd.Function returned it
        if tensor._use_count() > 1:  # type: ignore[attr-defined]
            # C++ has it, on behalf of an autograd.Function, TorchScript or an extension.
            if node is None and tensor.requires_grad:
                value.call.fail(
                    "the output of a BatchNorm to be read by an addition or activation, as in the "
                    "forwards before, got one that autograd knows by itself"
                )
            value.call.site.miss()
            value.tensor = content
            return content
        if content._use_count() > 1:  # type: ignore[attr-defined]
            content = content.view_as(content)
        torch._C._swap_tensor_impl(tensor, content)
    tensor.__class__ = Tensor  # type: ignore[assignment]
    del tensor._value
    value.tensor = tensor
    return tensor


def compute_all(value: Any) -> Any:
    """Return an argument with all deferred tensors in it computed."""
    return replace_tensors(value, Deferred, read)


def _defer(value: Value, like: Tensor) -> Deferred:
    """Return a deferred tensor for a value, connected to the graph of autograd."""
    call = value.call
    addend = value.addend
    needs_grad = call.needs_grad or (call.grad and addend is not None and addend.requires_grad)
    if needs_grad and not call.site.is_known:
        # `like` in a tuple, because it is no input.
        made = _Bridge.apply(value, (like,), *call.inputs, addend)
    else:
        made = _wrap(value, like, needs_grad)
    module: Any = call.compute.__self__  # type: ignore[attr-defined]
    value.owner = _thread.latest[id(module)] = weakref.ref(made)
    if _thread.outermost is not None:
        _thread.made.append(value.owner)
    return made


def _wrap(value: Value, like: Tensor, requires_grad: bool) -> Deferred:
    with torch._C.DisableTorchFunctionSubclass():
        made = Tensor._make_wrapper_subclass(
            Deferred,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=like.device,
            requires_grad=requires_grad,
        )
    made._value = value
    return made


def _activate(y: Deferred, activation: FusableActivation) -> Tensor | None:
    """Return the activation of `y`, None if it cannot be fused."""
    value = y._value
    call = value.call
    if not value.is_pending or not call.is_current():
        return None
    if value.residual is not None:
        # For these the gradient keeps the residual, which the model may change in place.
        keeps = call.grad and ACTIVATIONS[activation.name].saves is Saves.RESIDUAL
        if keeps or call.site.fuses != ALL:
            return None
    applied = Value(call, value, activation=activation)
    if not activation.in_place:
        return applied.run() if call.site.is_known else _defer(applied, y)
    # torch computes the gradient of an ELU in place from its output, ATen's ops from its input.
    fusion = Fusion("elu", value.residual is not None, call.options["training"])
    if activation.name == "elu" and not chooses_triton(call.input, call.options["backend"], fusion):
        return None
    value.tensor = applied.run()
    return read(y)


def _add(in_place: bool, left: Any, right: Any) -> Tensor | None:
    """Return the deferred sum of a deferred tensor and another, None if it cannot be fused."""
    for y, other in ((left, right),) if in_place else ((left, right), (right, left)):
        if type(y) is not Deferred or y is other:
            continue
        value = y._value
        if value.residual is not None or not value.is_pending or not value.call.is_current():
            continue
        if type(other) is Deferred:
            other = read(other)
        if not value.is_pending or not _matches(other, value.call):
            continue
        if not in_place:
            return _defer(Value(value.call, value, other), y)
        summed = _defer(Value(value.call, residual=other), y)
        with torch._C.DisableTorchFunctionSubclass():
            torch._C._swap_tensor_impl(y, summed)
        y._value = summed._value
        y._value.owner = value.owner
        return y
    return None


def _matches(other: Any, call: DeferredCall) -> bool:
    x = call.input
    return (
        type(other) in (Tensor, nn.Parameter)
        and other.shape == x.shape
        and other.dtype == x.dtype
        and other.device == x.device
        and other.layout == x.layout
        and other.stride() == x.stride()
    )


class _Bridge(torch.autograd.Function):
    """Connects a deferred tensor to what it will be computed from."""

    @staticmethod
    def forward(ctx: Any, value: Value, like: tuple[Tensor], *inputs: Tensor | None) -> Deferred:
        ctx.value = value
        return _wrap(value, *like, requires_grad=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        value: Value = ctx.value
        needs = ctx.needs_input_grad[2:]
        # Views, because one input may depend on another: x, say, and what is added to bn(x).
        with torch.enable_grad():
            inputs = (*value.call.inputs, value.addend)
            views = tuple(None if x is None else x.view_as(x) for x in inputs)
            y = value.run_again(views)
        wanted: Any = [x for x, is_needed in zip(views, needs, strict=True) if is_needed]
        is_differentiated = torch.is_grad_enabled()
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=is_differentiated))
        return None, None, *(next(gradients) if is_needed else None for is_needed in needs)


class _Adopt(torch.autograd.Function):
    """Gives a computed value the place of its deferred tensor in the graph."""

    @staticmethod
    def forward(ctx: Any, owner: Deferred, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None
