"""What can be fused and folded in a network, observed from outside with torch's means alone.

Nothing of this project is imported here, so that a test can compare what it does with what could
be done. Module hooks say which module runs, a function mode sees each call of a torch function.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

_NORMALIZATIONS = {F.batch_norm, torch.batch_norm}
_ACTIVATIONS = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6),
    *(F.leaky_relu, F.leaky_relu_, F.silu, F.gelu, F.hardswish, F.mish),
    *(F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
    *(F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
}
_ADDITIONS = {
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_LAYERS = {F.linear, *_CONVOLUTIONS, *_TRANSPOSED}
# Functions that return no tensor and read the values of one all the same.
_READ_VALUES = {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__contains__", "__repr__"),
    *("__bool__", "__float__", "__int__", "__index__", "__array__", "__format__", "__reduce_ex__"),
}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module keeps a running mean and variance of its own, whatever its class."""
    own = module._buffers.keys() | module._parameters.keys()
    keeps = isinstance(module, _BatchNorm) or {"running_mean", "running_var"} <= own
    return keeps and not isinstance(module, _InstanceNorm)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, entry.name) for entry in fields(value)])


@dataclass(frozen=True)
class Read:
    """One use of a tensor.

    Attributes:
        call: number of the call; an addition of two results reads both under one number.
        function: its name.
        fuses: whether it is an activation that the kernels have, or an addition of two tensors of
            one shape and dtype.
        layer_weight: of a linear layer, or a convolution without padding; else None.
    """

    call: int
    function: str
    fuses: bool = False
    layer_weight: Tensor | None = None


@dataclass
class Result:
    """The result of a layer or of a BatchNorm.

    Attributes:
        module: name of the module that computed it.
        value: kept, so that no other tensor gets its id.
        weight: of a convolution or linear layer, else None.
        features: number of features of such a layer, in dimension 1 of the result; else 0.
        source: of a BatchNorm, the layer whose result it read.
        reads: each use of it, until something is written over it.
    """

    module: str
    value: Tensor
    weight: Tensor | None = None
    features: int = 0
    source: "Result | None" = None
    reads: list[Read] = field(default_factory=list)


@dataclass(frozen=True)
class _Running:
    """A module that runs now, how many BatchNorms ran before it, and what computed its input."""

    module: nn.Module
    norms_before: int
    source: Result | None


@dataclass(frozen=True)
class Site:
    """A place where a BatchNorm could be computed together with what follows it.

    Attributes:
        modules: names of the BatchNorms, one of which can be; two where they are added.
        function: what follows.
    """

    modules: tuple[str, ...]
    function: str


class Observer(TorchFunctionMode):
    """Watches one forward of a model, in training or evaluation.

    with Observer(model) as observer:
        output = model(x)
    observer.returned(output)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms: list[Result] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()  # of parameters
        self._results: dict[int, Result] = {}
        self._running: list[_Running] = []
        self._calls = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [
            module_hooks.register_module_forward_pre_hook(self._begin),
            module_hooks.register_module_forward_hook(self._end, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def returned(self, output: Any) -> None:
        """Counts what the model returned as read."""
        for value in tensors_in(output):
            self._read(value, Read(-1, "the caller"))

    def called(self) -> set[str]:
        """The names of the BatchNorms that ran."""
        return {norm.module for norm in self.norms}

    def fusable(self) -> list[Site]:
        """Where a result is read once, by an activation or by an addition of the same shape.

        An addition takes in one BatchNorm, so of two that are added one can be fused.
        """
        sites: dict[int, list[Result]] = {}
        for norm in self.norms:
            if len(norm.reads) == 1 and norm.reads[0].fuses:
                sites.setdefault(norm.reads[0].call, []).append(norm)
        return [
            Site(tuple(norm.module for norm in norms), norms[0].reads[0].function)
            for norms in sites.values()
        ]

    def not_fusable(self) -> Counter[str]:
        """How often each other function is the only reader of a BatchNorm."""
        others = (norm.reads for norm in self.norms if len(norm.reads) == 1)
        return Counter(read.function for [read] in others if not read.fuses)

    def foldable(self) -> set[str]:
        """The BatchNorms, run in evaluation, that a layer beside them can take in.

        This is the layer whose result only the BatchNorm reads, or the only reader of its result if
        it does not pad. Both run once, and the layer's weight is a parameter that nothing else
        reads.
        """
        times = Counter(norm.module for norm in self.norms)
        found = set()
        for norm in self.norms:
            before, after = norm.source, norm.reads[0] if len(norm.reads) == 1 else None
            follows = (
                before is not None
                and len(before.reads) == 1
                and before.features == norm.value.shape[1]
                and self._is_used_once(before.weight)
            )
            precedes = after is not None and self._is_used_once(after.layer_weight)
            if times[norm.module] == 1 and (follows or precedes):
                found.add(norm.module)
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        given = list(tensors_in([args, kwargs]))
        for value in given:
            if id(value) in self._parameters:
                self._uses[id(value)] += 1
        versions = [_version(value) for value in given]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if next(tensors_in(result), None) is None and name not in _READ_VALUES:
            return result  # a size, a dtype
        source = self._results.get(id(given[0])) if given else None
        for value, version in zip(given, versions, strict=True):
            written = _version(value) != version
            if value is result and not written:
                continue  # an operation that does nothing: dropout in evaluation, .contiguous()
            self._read(value, self._describe(func, name, value, args, kwargs))
            if written:
                self._results.pop(id(value), None)
        if isinstance(result, Tensor):
            self._remember(func, result, source, args, kwargs)
        return result

    def _describe(
        self, func: Callable[..., Any], name: str, value: Tensor, args: Any, kwargs: Any
    ) -> Read:
        weight = None
        if func in _LAYERS and value is _argument(0, "input", args, kwargs):
            padding = _argument(4, "padding", args, kwargs) if func in _CONVOLUTIONS else 0
            unpadded = padding is None or padding == "valid" or not any(_as_tuple(padding))
            if unpadded and func not in _TRANSPOSED:
                weight = _argument(1, "weight", args, kwargs)
        fuses = _is_activation(func, args, kwargs) or _is_addition(func, args, kwargs)
        return Read(self._calls, name, fuses, weight)

    def _remember(
        self,
        func: Callable[..., Any],
        result: Tensor,
        source: Result | None,
        args: Any,
        kwargs: Any,
    ) -> None:
        module = self._running[-1].module if self._running else None
        if module is None or module not in self._names:
            return
        name = self._names[module]
        if func in _NORMALIZATIONS and is_batch_norm(module):
            norm = Result(name, result, source=source)
            self.norms.append(norm)
            self._results[id(result)] = norm
        elif func in _LAYERS:
            weight = _argument(1, "weight", args, kwargs)
            # Linear computes features in the last dimension.
            features = 0 if func is F.linear and result.dim() != 2 else result.shape[1]
            self._results[id(result)] = Result(name, result, weight, features)

    def _read(self, value: Tensor, read: Read) -> None:
        if id(value) in self._results:
            self._results[id(value)].reads.append(read)

    def _is_used_once(self, weight: Tensor | None) -> bool:
        return weight is not None and self._uses[id(weight)] == 1

    def _begin(self, module: nn.Module, args: Any) -> None:
        source = self._results.get(id(args[0])) if args else None
        self._running.append(_Running(module, len(self.norms), source))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        ended = self._running.pop()
        while ended.module is not module:
            ended = self._running.pop()
        # A BatchNorm that computes by itself, such as a frozen one.
        is_own = module in self._names and is_batch_norm(module) and isinstance(output, Tensor)
        if is_own and len(self.norms) == ended.norms_before:
            norm = Result(self._names[module], output, source=ended.source)
            self.norms.append(norm)
            self._results[id(output)] = norm


def _version(value: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return 0 if value.is_inference() else value._version


def _argument(place: int, name: str, args: Any, kwargs: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_activation(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if func is F.elu:
        return _argument(1, "alpha", args, kwargs) in (None, 1)
    if func is F.hardtanh:
        limits = (_argument(1, "min_val", args, kwargs), _argument(2, "max_val", args, kwargs))
        return limits == (0, 6)
    return func in _ACTIVATIONS


def _is_addition(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if func not in _ADDITIONS or len(args) != 2 or kwargs.get("alpha", 1) != 1 or "out" in kwargs:
        return False
    one, other = args
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.shape == other.shape and one.dtype == other.dtype
