"""What `deferred.py` does, in a form that torch.compile and torch.export can trace.

They inline `Traced.__torch_function__` like any Python code, so the graph has one op for BatchNorm,
addition and activation, whatever the backend. Nothing is learned, because all runs once: an output
that is read twice is normalized twice, with one update of the statistics.

`Traced` has the values of the BatchNorm without an update of the statistics. Compilers remove them
if nobody reads them; what passes a tensor on unseen by `__torch_function__` gets right values.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.conversion.fusable import (
    ADDITIONS,
    IN_PLACE_ADDITIONS,
    METADATA,
    UNCHANGED,
    BatchNormCall,
    activation_of,
    replace_tensors,
)
from bn_lightning.kernels.dispatch import uses_triton


class _TracedValue:
    """What a traced tensor stands for.

    Attributes:
        call: of the BatchNorm.
        residual: added to its output, or None.
        pure: the value without an update of the statistics.
        tensor: the value, once computed.
    """

    tensor: Tensor | None = None

    def __init__(self, call: BatchNormCall, residual: Tensor | None, pure: Tensor) -> None:
        self.call, self.residual, self.pure = call, residual, pure

    def compute(self) -> Tensor:
        if self.tensor is None:
            self.tensor = self.call.run(self.residual)
        return self.tensor


class Traced(Tensor):
    """The output of a BatchNorm in code that is compiled; made by `trace`."""

    _value: _TracedValue

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(args[0]._value.call.input, *args[1:], **kwargs)
        if args and isinstance(args[0], cls) and args[0]._value.tensor is None:
            value = args[0]._value
            activation = activation_of(func, args, kwargs)
            if activation is not None:
                y = value.call.run(value.residual, activation.name, activation.slope)
                if activation.in_place:
                    value.tensor = y
                return y
            if func in UNCHANGED and UNCHANGED[func](*args[1:], **kwargs):
                return args[0]
        # Strict export passes Python's operators; in Dynamo no set has them.
        in_place = func is operator.iadd or func in IN_PLACE_ADDITIONS
        adds = in_place or func is operator.add or func in ADDITIONS
        if adds and len(args) == 2 and kwargs in ({}, {"alpha": 1}):
            result = _add(in_place, args[0], args[1])
            if result is not None:
                return result
        return func(*compute_traced(args), **compute_traced(kwargs))


class _Exported(Traced):
    """The same where torch.export runs the code on fake tensors, without Dynamo."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*compute_traced(args), **compute_traced(kwargs or {}))


def trace(
    compute: Callable[..., Tensor],
    input: Tensor,
    state: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> Tensor:
    """Return `compute(input, *state, **options)`, to be computed with what follows.

    Where ATen computes it, that is at once: the compiler fuses ATen's ops itself.
    """
    if not uses_triton(input, options["backend"]):
        return compute(input, *state, **options)
    if torch.compiler.is_exporting():
        # Programs keep what nobody reads. What reads it all the same fails.
        pure = torch.empty_like(input, device="meta")
    else:
        weight, bias, running_mean, running_var = state
        training, eps = options["training"], options["eps"]
        if training:
            running_mean = running_var = None
        pure = F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, eps)
    return _traced(_TracedValue(BatchNormCall(compute, input, state, options), None, pure))


def _traced(value: _TracedValue) -> Tensor:
    pure, like = value.pure, value.call.input
    if torch.compiler.is_dynamo_compiling():
        made = pure.as_subclass(Traced)
    else:
        made = Tensor._make_wrapper_subclass(
            _Exported, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
    made._value = value
    return made


def _add(in_place: bool, left: Any, right: Any) -> Tensor | None:
    if left is right:
        return None
    pairs = ((left, right),) if in_place else ((left, right), (right, left))
    for y, other in pairs:
        if not isinstance(y, Traced) or not isinstance(other, Tensor):
            continue
        value = y._value
        if value.tensor is not None or value.residual is not None:
            continue
        other, like = compute_traced(other), value.call.input
        if (
            value.call.is_done
            or other.shape != like.shape
            or other.dtype != like.dtype
            or other.device != like.device
        ):
            continue
        pure = value.pure if value.pure.is_meta else value.pure + other
        if in_place:
            value.residual = other
            value.pure = pure
            return y
        return _traced(_TracedValue(value.call, other, pure))
    return None


def compute_traced(value: Any) -> Any:
    """Return an argument, or what a model returns, with all traced tensors in it computed."""
    return replace_tensors(value, Traced, lambda tensor: tensor._value.compute())
