"""A call of a BatchNorm, and the operations it takes in, as `__torch_function__` sees them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

_SLOPE = 0.01  # torch's default for leaky_relu, ignored by the others


class BatchNormCall:
    """One call of a BatchNorm, which can be computed together with what follows, and again.

    Args:
        compute: called as `bn_lightning.kernels.batch_norm`.
        input: x.
        state: weight, bias, running_mean and running_var.
        options: the keyword arguments.

    Attributes:
        is_done: whether it was computed, and the statistics were updated.
    """

    is_done = False

    def __init__(
        self,
        compute: Callable[..., Tensor],
        input: Tensor,
        state: tuple[Tensor | None, ...],
        options: dict[str, Any],
    ) -> None:
        self.compute, self.input, self.state, self.options = compute, input, state, options

    def run(
        self, residual: Tensor | None = None, activation: str = "identity", slope: float = _SLOPE
    ) -> Tensor:
        """Compute the BatchNorm with what follows; only the first time updates statistics."""
        state, options = self.state, dict(self.options)
        if self.is_done and options["training"]:
            state = (*state[:2], None, None)
            options["num_batches_tracked"], options["momentum"] = None, 0.0
        self.is_done = True
        options["residual"], options["activation"] = residual, activation
        options["negative_slope"] = slope
        return self.compute(self.input, *state, **options)


class FusableActivation(NamedTuple):
    """A call of an activation that the kernels have.

    Attributes:
        name: of `bn_lightning.kernels.batch_norm`.
        slope: of "leaky_relu" below zero.
        in_place: whether the call writes to its input.
        function: what was called, with the arguments after its input.
        args: by position.
        kwargs: by keyword.
    """

    name: str
    slope: float
    in_place: bool
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply(self, z: Tensor) -> Tensor:
        """Compute the activation as the caller asked for it."""
        return self.function(z, *self.args, **self.kwargs)


def activation_of(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FusableActivation | None:
    """Return the activation that a call computes of its first argument, None for other calls."""
    parse = _ACTIVATIONS.get(function)
    if parse is None or "out" in kwargs:
        return None
    named = parse(*args[1:], **kwargs)
    return None if named is None else FusableActivation(*named, function, args[1:], kwargs)


_Named = tuple[str, float, bool] | None


def _always(name: str, in_place: bool = False) -> Callable[..., _Named]:
    return lambda: (name, _SLOPE, in_place)


def _optional(name: str) -> Callable[..., _Named]:
    return lambda inplace=False: (name, _SLOPE, inplace)


def _leaky_relu(negative_slope: float = _SLOPE, inplace: bool = False) -> _Named:
    return "leaky_relu", negative_slope, inplace


def _elu(
    alpha: float = 1.0, inplace: bool = False, scale: float = 1, input_scale: float = 1
) -> _Named:
    return ("elu", _SLOPE, inplace) if alpha == scale == input_scale == 1 else None


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> _Named:
    return ("relu6", _SLOPE, inplace) if (min_val, max_val) == (0, 6) else None


def _gelu(approximate: str = "none") -> _Named:
    return "gelu" if approximate == "none" else "gelu_tanh", _SLOPE, False


# Each takes the arguments of the function after its input.
_ACTIVATIONS: dict[Any, Callable[..., _Named]] = {
    F.relu: _optional("relu"),
    F.relu6: _optional("relu6"),
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.silu: _optional("silu"),
    F.gelu: _gelu,
    F.hardswish: _optional("hardswish"),
    F.mish: _optional("mish"),
    F.sigmoid: _always("sigmoid"),
    F.tanh: _always("tanh"),
    **dict.fromkeys((torch.relu, Tensor.relu), _always("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _always("relu", in_place=True)),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _always("sigmoid")),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), _always("sigmoid", in_place=True)),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _always("tanh")),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), _always("tanh", in_place=True)),
}

IN_PLACE_ADDITIONS = {Tensor.add_, Tensor.__iadd__}
ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__} | IN_PLACE_ADDITIONS


def _is_inactive(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return not training or p == 0


# Function -> whether it returns its input, from the arguments after the input.
UNCHANGED: dict[Any, Callable[..., bool]] = {
    function: _is_inactive
    for function in (
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
        *(F.alpha_dropout, F.feature_alpha_dropout),
    )
}

# What the metadata of a tensor answers.
_ATTRIBUTES: Any = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda")
METADATA: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
    *(Tensor.element_size, Tensor.__len__, torch.numel, torch.is_floating_point),
}


def fits(other: Any, x: Tensor) -> bool:
    """Return whether the sum of a tensor and bn(x) is one that the kernels compute."""
    return (
        type(other) in (Tensor, Parameter)
        and other.shape == x.shape
        and other.dtype == x.dtype
        and other.device == x.device
        and other.layout == x.layout
        and (other.stride() == x.stride() or _order(other) == _order(x))
    )


def _order(x: Tensor) -> list[int] | None:
    """Return the dimensions from the largest stride to the smallest, None if two are equal.

    With one order for both operands torch gives a sum the layout of the dense one, bn(x).
    """
    strides = {x.stride(i): i for i in range(x.dim()) if x.shape[i] > 1}
    if len(strides) < sum(size > 1 for size in x.shape):
        return None
    return [strides[stride] for stride in sorted(strides, reverse=True)]


def replace_tensors(value: Any, cls: type[Tensor], replace: Callable[[Any], Tensor]) -> Any:
    """Return an argument with `replace(x)` for each x of a class, in lists, tuples and dicts too.

    What holds none is returned itself. Dynamo traces this function.
    """
    if isinstance(value, cls):
        return replace(value)
    if isinstance(value, list | tuple):
        items = [replace_tensors(item, cls, replace) for item in value]
        if not any([a is not b for a, b in zip(items, value, strict=True)]):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if type(value) is dict:
        items = [replace_tensors(item, cls, replace) for item in value.values()]
        changed = [a is not b for a, b in zip(items, value.values(), strict=True)]
        return dict(zip(value, items, strict=True)) if any(changed) else value
    return value
