"""A module's own forward as a graph of torch.fx, where the graph can be shown to stand for it.

torch.fx runs `forward` once, with stand-ins for the tensors, and records what it does to them; each
child is one node. Python's part runs in that moment alone, so it must be known to be the same in
later calls. Three ways lead there:

    recorded  what is done to stand-ins, parameters and buffers, read anew at each call
    guarded   the numbers, strings and flags read from modules: a recording holds as long as they do
    refused   all else: branches on values, attributes written, lists and objects that may change,
              random numbers, tensors computed from no input, autocast and the like inside

What remains fixed is what a forward reads from globals. What it does for its effect alone and not
to a module, such as a line for a log file, is not repeated; prints and warnings are refused.
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
    """A forward of which no graph can stand; the message says why."""


@dataclass(frozen=True)
class Guard:
    """Something a forward read from a module while it was recorded.

    Attributes:
        owner: the module.
        name: of the attribute; "_modules" stands for the names of the children.
        value: what it was.
    """

    owner: nn.Module
    name: str
    value: Any

    def holds(self) -> bool:
        """Returns whether it still is what it was."""
        if self.name == "_modules":
            return tuple(self.owner._modules) == self.value
        now = getattr(self.owner, self.name, None)
        return type(now) is type(self.value) and now == self.value


@dataclass(frozen=True)
class Trace:
    """What a forward does when it is given tensors for its required arguments, and nothing else.

    Attributes:
        graph: one node a child called, an operation, or a parameter read.
        guards: it stands for the forward as long as all of them hold.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]


def trace_forward(module: nn.Module, modes: tuple[bool, ...] = (True, False)) -> list[Trace]:
    """Records the forward of a module's class, with every child as one node.

    Args:
        module: stays as it is.
        modes: values of `training` to record under.

    Returns:
        A trace for each mode, without repetitions.

    Raises:
        NotTraceable: for one of the modes, or for arguments that are not all tensors.
    """
    flags = [(m, m.training) for m in module.modules()]
    traces: dict[tuple[Any, ...], Trace] = {}
    try:
        for mode in modes:
            for m, _ in flags:
                m.training = mode
            trace = _Recorder(module).record()
            seen = tuple((id(g.owner), g.name, g.value) for g in trace.guards)
            traces.setdefault((str(trace.graph), seen), trace)
    finally:
        for m, flag in flags:
            m.training = flag
    return list(traces.values())


def required_arguments(module: nn.Module) -> list[str]:
    """Returns the names of what the forward of a module's class must be given.

    Raises:
        NotTraceable: there are none, or not all of them may be given by position.
    """
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    required = [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not required or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise NotTraceable("it takes no tensors by position")
    return [p.name for p in required]


def forward_of(module: nn.Module, name: str) -> str:
    """What messages call the forward of the module of this name in a model."""
    return f"{type(module).__name__}.forward of {repr(name) if name else 'the model itself'}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has another forward than its class.

    After a fit in several processes Lightning leaves the class's forward on the instance.
    """
    own = module.__dict__.get("forward")
    return own is not None and own != MethodType(type(module).forward, module)


class _StandIn(fx.Proxy):
    """Stands for a tensor, and is changed in place as one."""

    @property  # type: ignore[misc]  # isinstance looks at it
    def __class__(self) -> type:
        tracer: Any = self.tracer
        if tracer.running:
            tracer.refuse("it asks for the type of a value")
        return _StandIn


def _in_place(operation: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


# fx.Proxy has none of them: Python would take `x += 1` for `x = x + 1`.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(_StandIn, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Recorder(fx.Tracer):
    """Records one forward, and refuses what a recording would fix."""

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
        except Exception as error:  # anything that a forward does to a stand-in
            if self.refusal is None:
                raise NotTraceable(_first_line(error)) from error
        if self.refusal is not None:  # a forward that catches errors has caught it
            raise self.refusal
        return Trace(graph, tuple(self.guards.values()))

    def refuse(self, why: str) -> Any:
        self.refusal = NotTraceable(why)
        raise self.refusal

    def saw(self, owner: nn.Module, name: str, value: Any) -> None:
        """Guards what is read from a module, or refuses."""
        if not self.running or name in _BOOKKEEPING:
            return
        if name == "_modules":
            value = tuple(value)
        elif isinstance(value, (fx.Proxy, Tensor, nn.Module)):
            return
        elif name not in vars(owner) and callable(value):
            return  # a method
        elif not (_is_plain(value) or isinstance(value, _FIXED)):
            self.refuse(f"it reads `{name}`, a {type(value).__name__}, whose changes go unseen")
        self.guards[id(owner), name] = Guard(owner, name, value)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.refuse("it branches on the value of a tensor, or on a shape")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        stand_ins = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]

        def watched_forward(*args: Any) -> Any:
            self._surroundings = _surroundings()
            self.running = True
            try:
                with _NoOtherTensors(self):
                    return root_fn(*args)
            finally:
                self.running = False

        return watched_forward, [self.module, *stand_ins]

    def getattr(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_rest():
            return super().getattr(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            self.refuse("it uses a tensor that is no attribute of a module")
        return super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._check_surroundings()
        return super().create_proxy(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._check_surroundings()
        with self._at_rest():
            return super().call_module(m, forward, args, kwargs)

    def _check_surroundings(self) -> None:
        if self.running and _surroundings() != self._surroundings:
            self.refuse("it turns autocast, gradients or checkpointing on or off inside")

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        self.running, before = False, self.running
        try:
            yield
        finally:
            self.running = before


class _NoOtherTensors(TorchFunctionMode):
    """Refuses what torch computes from no stand-in: torch.rand(1), torch.arange(8)."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.recorder.running and not any(issubclass(t, fx.Proxy) for t in types):
            name = getattr(func, "__name__", func)
            self.recorder.refuse(f"it calls torch's {name} on none of its arguments")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Lets the recorder see which attributes of a module and its children are read or written."""
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
    """Keeps `__init_subclass__` from a watched class: it gets no subclass that anyone shall see."""

    def __init_subclass__(cls) -> None:
        pass


def _watched_class(cls: type[nn.Module], recorder: _Recorder) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        recorder.saw(self, name, value)
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        if recorder.running:
            recorder.refuse(f"it writes `{name}`")
        cls.__setattr__(self, name, value)

    body = {"__getattribute__": read, "__setattr__": write, "__module__": cls.__module__}
    return type(cls.__name__, (_NoSubclass, cls), body)


# What nn.Module keeps for itself. `forward` may be replaced on an instance: the call is recorded.
_BOOKKEEPING = {*vars(nn.Module()), "__dict__", "__class__", "forward"} - {"training", "_modules"}
_FIXED = (FunctionType, BuiltinFunctionType, type)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, Enum)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _surroundings() -> tuple[Any, ...]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    # Private, for lack of another way: non-reentrant checkpointing saves through such hooks.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return nesting, hooks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@contextlib.contextmanager
def _same_random_states() -> Iterator[None]:
    """Refuses random numbers of Python and NumPy, and gives them back; torch's are refused before.

    Raises:
        NotTraceable: some were drawn.
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
