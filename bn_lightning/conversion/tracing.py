"""Traces a module's forward with torch.fx, if the graph is guaranteed to be equivalent to it.

torch.fx runs `forward` once with proxies for the tensors and records the operations on them; each
child module is one node. The forward's Python code runs only then, so it must be known to do the
same in later calls:

    recorded  operations on proxies, parameters and buffers, which each call reads anew
    guarded   numbers, strings and flags read from modules; the trace is valid while they are equal
    refused   all else: branches on values, attributes written, mutable lists and objects, random
              numbers, tensors computed without an input, autocast and similar contexts

A value that the forward reads from a global is fixed in the trace. A side effect outside the
module, such as a line written to a file, is not repeated; prints and warnings are refused.
"""

import contextlib
import inspect
import io
import operator
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


class NotTraceable(Exception):
    """Raised for a forward that no graph can replace; the message is the reason."""


@dataclass(frozen=True)
class Guard:
    """An attribute that a forward read from a module during tracing.

    Attributes:
        owner: the module.
        name: name of the attribute; "_modules" means the names of the children.
        value: value during tracing.
    """

    owner: nn.Module
    name: str
    value: Any

    def holds(self) -> bool:
        """Return whether the attribute still has this value."""
        if self.name == "_modules":
            return tuple(self.owner._modules) == self.value
        now = getattr(self.owner, self.name, None)
        return type(now) is type(self.value) and now == self.value


@dataclass(frozen=True)
class Trace:
    """The graph of a forward that gets tensors for its required arguments and no others.

    Attributes:
        graph: has one node per call of a child, operation, and parameter read.
        guards: conditions under which the graph is equivalent to the forward.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]


def trace_forward(module: nn.Module, modes: tuple[bool, ...] = (True, False)) -> list[Trace]:
    """Trace the forward of a module's class, with every child as one node.

    Args:
        module: not modified.
        modes: values of `training` to trace with.

    Returns:
        The distinct traces of all modes.

    Raises:
        NotTraceable: If the forward cannot be traced in one of the modes.
    """
    flags = [(m, m.training) for m in module.modules()]
    traces: dict[tuple[Any, ...], Trace] = {}
    try:
        for mode in modes:
            for m, _ in flags:
                m.training = mode
            trace = _Recorder(module).record()
            guards = tuple((id(g.owner), g.name, g.value) for g in trace.guards)
            traces.setdefault((str(trace.graph), guards), trace)
    finally:
        for m, flag in flags:
            m.training = flag
    return list(traces.values())


def required_arguments(module: nn.Module) -> list[str]:
    """Return the names of the required arguments of the forward of a module's class.

    Raises:
        NotTraceable: If there are none, or one is keyword-only.
    """
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    required = [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not required or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise NotTraceable("it takes no tensors by position")
    return [p.name for p in required]


def forward_of(module: nn.Module, name: str) -> str:
    """Return a description, for messages, of the forward of a module with this name in a model."""
    return f"{type(module).__name__}.forward of {repr(name) if name else 'the model itself'}"


def has_own_forward(module: nn.Module) -> bool:
    """Return whether an instance has another forward than its class.

    After a fit in several processes Lightning leaves the class's forward on the instance.
    """
    own = module.__dict__.get("forward")
    return own is not None and own != MethodType(type(module).forward, module)


class _TensorProxy(fx.Proxy):
    """A proxy for a tensor that also records in-place operators."""

    @property  # type: ignore[misc]  # isinstance looks at it
    def __class__(self) -> type:
        tracer: Any = self.tracer
        if tracer.running:
            tracer.refuse("it asks for the type of a value")
        return _TensorProxy


def _in_place(operation: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


# fx.Proxy has none of them, so Python would compute `x = x + 1` for `x += 1`.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(_TensorProxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Recorder(fx.Tracer):
    """Records one forward, and refuses what a graph would wrongly make constant."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.running = False
        self.guards: dict[tuple[int, str], Guard] = {}
        self.refusal: NotTraceable | None = None

    def record(self) -> Trace:
        self.arguments = required_arguments(self.module)
        try:
            with (
                _same_random_states(),
                contextlib.redirect_stdout(io.StringIO()) as printed,
                warnings.catch_warnings(record=True, action="always") as warned,
                _watched(self.module, self),
            ):
                graph = self.trace(self.module)
            if printed.getvalue() or warned:
                raise NotTraceable("it prints or warns")
        except NotTraceable:
            raise
        except Exception as error:  # any error of a forward that gets proxies
            if self.refusal is None:
                raise NotTraceable(_first_line(error)) from error
        if self.refusal is not None:  # the forward has caught the exception
            raise self.refusal
        return Trace(graph, tuple(self.guards.values()))

    def refuse(self, reason: str) -> Any:
        self.refusal = NotTraceable(reason)
        raise self.refusal

    def check_read(self, owner: nn.Module, name: str, value: Any) -> None:
        """Add a guard for an attribute that is read from a module, or refuse it."""
        if not self.running or name in _UNGUARDED:
            return
        if name == "_modules":
            value = tuple(value)
        elif isinstance(value, (fx.Proxy, Tensor, nn.Module)):
            return
        elif name not in vars(owner) and callable(value):
            return  # a method
        elif not (_is_plain(value) or isinstance(value, _IMMUTABLE)):
            self.refuse(f"it reads `{name}`, a {type(value).__name__}, which may change unnoticed")
        self.guards[id(owner), name] = Guard(owner, name, value)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.refuse("it branches on the value of a tensor, or on a shape")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]

        def watched_forward(*args: Any) -> Any:
            self._context = _context()
            self.running = True
            try:
                with _NoOtherTensors(self):
                    return root_fn(*args)
            finally:
                self.running = False

        return watched_forward, [self.module, *proxies]

    def getattr(self, *args: Any, **kwargs: Any) -> Any:
        with self._paused():
            return super().getattr(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            self.refuse("it uses a tensor that is not an attribute of a module")
        return super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._check_context()
        return super().create_proxy(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._check_context()
        with self._paused():
            return super().call_module(m, forward, args, kwargs)

    def _check_context(self) -> None:
        if self.running and _context() != self._context:
            self.refuse("it turns autocast, gradients or checkpointing on or off")

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self.running, before = False, self.running
        try:
            yield
        finally:
            self.running = before


class _NoOtherTensors(TorchFunctionMode):
    """Refuses torch functions without a proxy argument, such as torch.rand(1), torch.arange(8)."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.recorder.running and not any(issubclass(t, fx.Proxy) for t in types):
            name = getattr(func, "__name__", func)
            self.recorder.refuse(f"it calls torch's {name} without any of its arguments")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder check reads and writes of attributes of a module and its children."""
    before = [(m, type(m)) for m in module.modules()]
    watched = {cls: _watched_class(cls, recorder) for cls in {cls for _, cls in before}}
    try:
        for m, cls in before:
            object.__setattr__(m, "__class__", watched[cls])
        yield
    finally:
        for m, cls in before:
            object.__setattr__(m, "__class__", cls)


class _NoSubclass(nn.Module):
    """Hides the temporary subclass from `__init_subclass__` of the watched class."""

    def __init_subclass__(cls) -> None:
        pass


def _watched_class(cls: type[nn.Module], recorder: _Recorder) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        recorder.check_read(self, name, value)
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        if recorder.running:
            recorder.refuse(f"it writes `{name}`")
        cls.__setattr__(self, name, value)

    body = {"__getattribute__": read, "__setattr__": write, "__module__": cls.__module__}
    return type(cls.__name__, (_NoSubclass, cls), body)


# nn.Module's own attributes, and `forward`: it may be set on an instance, but its call is recorded.
_UNGUARDED = {*vars(nn.Module()), "__dict__", "__class__", "forward"} - {"training", "_modules"}
_IMMUTABLE = (FunctionType, BuiltinFunctionType, type)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, Enum)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _context() -> tuple[Any, ...]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    # Non-reentrant checkpointing uses these hooks; there is no public function for them.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return nesting, hooks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@contextlib.contextmanager
def _same_random_states() -> Iterator[None]:
    """Restore the random states of Python and NumPy, or raise NotTraceable if they were used.

    torch's random functions are refused elsewhere, because they have no proxy argument.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        drawn = random.getstate() != python_state
        random.setstate(python_state)
        if numpy is not None:
            now = numpy.random.get_state(legacy=False)
            drawn |= pickle.dumps(now) != pickle.dumps(numpy_state)
            numpy.random.set_state(numpy_state)
    if drawn:
        raise NotTraceable("it draws random numbers in Python")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
