"""Programs of a Triton kernel as coroutines, on a memory that shows writes late.

`load_kernels` compiles the source of the `triton.jit` functions again: each becomes a generator
that stops at every operation on memory, and computes with numpy between them. `Simulation` runs one
generator for each program, and a seeded scheduler chooses which program goes on.

The memory model is happens-before with vector clocks, one clock for each warp:

- A program has two warps. Neighbouring elements of a load or store belong to different warps. Every
  warp performs a scalar load, and warp 0 performs a scalar store or an atomic, as in Triton.
- A load may return each write that does not happen before another one that happens before the load.
  The seed decides, and mostly takes the oldest.
- A store may take effect before earlier writes that do not happen before it, so it may be lost. A
  store that does not happen after an earlier load raises `OrderError`, because the load may see it.
- Atomics on one address have one order, and read the latest write. A release publishes the clock of
  warp 0 at the address until a store overwrites it, and an acquire joins what is published there.
- A barrier joins the clocks of a program's warps. Triton brings the result of an atomic to all
  threads through shared memory; whether the barrier of that orders global memory differs between
  devices, so here it orders nothing.

Source: the axioms are a part of "Memory Consistency Model" in NVIDIA's PTX ISA, with in-order
programs; vector clocks are as in Fidge 1988 and Mattern 1989.
"""

import ast
import functools
import importlib
import inspect
import random
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

WARPS = 2
# How often a load that may return several writes returns the oldest one.
STALE = 0.75

# An operation on memory: a method of `Simulation` and its arguments.
Operation = tuple[Callable[..., Any], tuple[Any, ...]]
Program = Generator[Operation, Any, None]


class OrderError(AssertionError):
    """A schedule shows that operations are not ordered as they must be."""


class Write(NamedTuple):
    """A value in memory, and when which warp wrote it; at time 0, before the launch."""

    warp: int
    time: int
    value: Any


class Cell:
    """One address.

    Attributes:
        writes: in the order of the address.
        reads: the time of the last load of each warp.
        published: the joined clocks of the releases, or None.
    """

    __slots__ = ("writes", "reads", "published")

    def __init__(self, initial: Any) -> None:
        self.writes = [Write(0, 0, initial)]
        self.reads: dict[int, int] = {}
        self.published: list[int] | None = None


class Buffer:
    """A tensor in memory.

    Args:
        initial: its values before the launch.
        writable: False if no program writes it.
    """

    def __init__(self, initial: np.ndarray, writable: bool = True) -> None:
        self.initial = initial.ravel()
        self.dtype = initial.dtype
        self.writable = writable
        self.cells: dict[int, Cell] = {}

    def cell(self, offset: int) -> Cell:
        """Return the address of an element."""
        cell = self.cells.get(offset)
        if cell is None:
            if not (self.writable and 0 <= offset < self.initial.size):
                raise IndexError(f"element {offset} of {self.initial.size}: {self.writable=}")
            cell = self.cells[offset] = Cell(self.initial[offset].item())
        return cell

    def final(self) -> list[Any]:
        """Return the values after the launch."""
        values = self.initial.tolist()
        for offset, cell in self.cells.items():
            values[offset] = cell.writes[-1].value
        return values

    def writes(self) -> list[int]:
        """Return how often each element was written."""
        counts = [0] * self.initial.size
        for offset, cell in self.cells.items():
            counts[offset] = len(cell.writes) - 1
        return counts


class Pointer(NamedTuple):
    """A pointer, or a tensor of pointers, to elements of a buffer."""

    buffer: Buffer
    offsets: Any = 0

    @property
    def dtype(self) -> Any:
        """That of the pointer, as Triton has it."""
        return SimpleNamespace(element_ty=self.buffer.dtype.type)

    def __add__(self, other: Any) -> "Pointer":  # type: ignore[override]
        return Pointer(self.buffer, self.offsets + other)


@functools.cache
def _warps(shape: tuple[int, ...]) -> list[int]:
    """Return the warp of each element of a tensor."""
    return (np.indices(shape).sum(axis=0) % WARPS).ravel().tolist()


def _elements(offsets: np.ndarray, mask: Any) -> list[tuple[int, int, int]]:
    """Return position, warp and offset of each element that is not masked."""
    warps = _warps(offsets.shape)
    flat = offsets.ravel().tolist()
    if mask is None:
        return list(zip(range(len(flat)), warps, flat, strict=True))
    chosen = np.flatnonzero(np.broadcast_to(mask, offsets.shape)).tolist()
    return [(i, warps[i], flat[i]) for i in chosen]


def _join(a: list[int], b: list[int]) -> list[int]:
    return list(map(max, a, b))


class Simulation:
    """The programs of one launch and their memory.

    Args:
        programs: how many.
        seed: of the schedule and of what loads return.
        starved: a program that runs only while no other one can, or None.
    """

    def __init__(self, programs: int, seed: int, *, starved: int | None = None) -> None:
        self.programs = programs
        self.starved = starved
        self.random = random.Random(seed)
        self.clocks = [[0] * (programs * WARPS) for _ in range(programs * WARPS)]
        self.asleep: dict[int, Cell] = {}

    def run(self, start: Callable[[], Program], max_steps: int) -> None:
        """Run all programs to their end.

        Raises:
            OrderError: the programs need more steps or wait for each other, or a store may be seen
                by an earlier load.
        """
        coroutines = [start() for _ in range(self.programs)]
        pending: list[Operation] = [next(coroutine) for coroutine in coroutines]
        running = list(range(self.programs))
        # Some schedules change the program at nearly every step, others seldom.
        stay = self.random.choice((0.0, 0.5, 0.9))
        program = -1
        for _ in range(max_steps):
            if program in self.asleep or program not in running or self.random.random() >= stay:
                program = self._choose(running)
            method, arguments = pending[program]
            for warp in range(program * WARPS, (program + 1) * WARPS):
                self.clocks[warp][warp] += 1
            try:
                pending[program] = coroutines[program].send(method(self, program, *arguments))
            except StopIteration:
                running.remove(program)
                if not running:
                    return
        raise OrderError(f"programs {running} have not finished after {max_steps} steps")

    def _choose(self, running: list[int]) -> int:
        ready = [p for p in running if p not in self.asleep] if self.asleep else running
        if len(ready) > 1 and self.starved is not None:
            ready = [p for p in ready if p != self.starved]
        if not ready:
            raise OrderError(f"programs {running} wait for each other")
        return self.random.choice(ready)

    def load(self, program: int, pointer: Pointer, mask: Any, other: Any) -> Any:
        """Return what each element's warp sees; for a scalar, what one of the warps sees."""
        buffer, offsets = pointer
        if not isinstance(offsets, np.ndarray):
            if mask is not None and not mask:
                return other
            first = program * WARPS
            if not buffer.writable:
                return buffer.initial[offsets]
            seen = [self._read(buffer.cell(offsets), first + warp) for warp in range(WARPS)]
            return buffer.dtype.type(self.random.choice(seen))
        if not buffer.writable and mask is None:
            return buffer.initial[offsets]
        if not buffer.writable:
            inside = np.broadcast_to(mask, offsets.shape)
            values = buffer.initial[np.where(inside, offsets, 0)]
            return np.where(inside, values, buffer.dtype.type(other))
        result = np.full(offsets.size, other, buffer.dtype)
        for i, warp, offset in _elements(offsets, mask):
            result[i] = self._read(buffer.cell(offset), program * WARPS + warp)
        return result.reshape(offsets.shape)

    def store(self, program: int, pointer: Pointer, value: Any, mask: Any) -> None:
        """Write each element from its warp, a scalar from warp 0."""
        buffer, offsets = pointer
        if not isinstance(offsets, np.ndarray):
            if mask is None or mask:
                value = np.asarray(value).astype(buffer.dtype).item()
                self._write(buffer.cell(offsets), program * WARPS, value)
            return
        values = np.broadcast_to(np.asarray(value).astype(buffer.dtype), offsets.shape)
        flat = values.ravel().tolist()
        for i, warp, offset in _elements(offsets, mask):
            self._write(buffer.cell(offset), program * WARPS + warp, flat[i])

    def atomic_add(self, program: int, pointer: Pointer, value: int, sem: str) -> int:
        """Add to a scalar from warp 0, and return the value before.

        A program that adds 0 to 0 waits for a flag, and sleeps until another one writes there.
        """
        cell = pointer.buffer.cell(pointer.offsets)
        warp = program * WARPS
        if sem in ("acquire", "acq_rel") and cell.published is not None:
            self.clocks[warp] = _join(self.clocks[warp], cell.published)
        clock = self.clocks[warp]
        old: int = cell.writes[-1].value
        cell.writes.append(Write(warp, clock[warp], old + value))
        if sem in ("release", "acq_rel"):
            cell.published = clock if cell.published is None else _join(cell.published, clock)
            self.clocks[warp] = list(clock)
        if old == value == 0:
            self.asleep[program] = cell
        else:
            self._wake(cell)
        return old

    def barrier(self, program: int) -> None:
        """Order what the warps did before against what they do later."""
        warps = range(program * WARPS, (program + 1) * WARPS)
        joined = functools.reduce(_join, (self.clocks[warp] for warp in warps))
        for warp in warps:
            self.clocks[warp] = list(joined)

    def program_id(self, program: int) -> int:
        """Return the number of the program."""
        return program

    def num_programs(self, program: int) -> int:
        """Return the number of programs."""
        return self.programs

    def _last_known(self, cell: Cell, warp: int) -> int:
        """Return the position of the last write that happens before the warp's next operation."""
        clock, writes = self.clocks[warp], cell.writes
        position = len(writes) - 1
        # The first one was there before the launch.
        while position > 0 and clock[writes[position].warp] < writes[position].time:
            position -= 1
        return position

    def _read(self, cell: Cell, warp: int) -> Any:
        cell.reads[warp] = self.clocks[warp][warp]
        oldest, last = self._last_known(cell, warp), len(cell.writes) - 1
        if oldest < last and self.random.random() >= STALE:
            oldest = self.random.randint(oldest, last)
        return cell.writes[oldest].value

    def _write(self, cell: Cell, warp: int, value: Any) -> None:
        clock = self.clocks[warp]
        for reader, time in cell.reads.items():
            # A load directly before the store, by the same program, gave the value to be stored.
            own = reader // WARPS == warp // WARPS and time == self.clocks[reader][reader] - 1
            if clock[reader] < time and not own:
                raise OrderError(f"a load of warp {reader} may see a later store of warp {warp}")
        position, end = self._last_known(cell, warp) + 1, len(cell.writes)
        if position < end:
            position = self.random.randint(position, end)
        if position == end:
            cell.published = None
        cell.writes.insert(position, Write(warp, clock[warp], value))
        self._wake(cell)

    def _wake(self, cell: Cell) -> None:
        for program in [p for p, awaited in self.asleep.items() if awaited is cell]:
            del self.asleep[program]


def _reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(values: np.ndarray, axis: int) -> Any:
        return function(values, axis=axis)

    return reduce


class Language:
    """The part of `triton.language` that the kernels use.

    Operations on memory return an `Operation`, which the coroutine yields to the simulation.
    """

    float32 = np.float32
    bfloat16 = None  # of no buffer
    int32 = np.int32
    int64 = np.int64

    abs = np.abs
    max = _reduction(np.max)
    min = _reduction(np.min)
    sum = _reduction(np.sum)
    permute = np.transpose
    zeros_like = np.zeros_like

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: str) -> Operation:
        return Simulation.load, (pointer, mask, other)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None, **hints: str) -> Operation:
        return Simulation.store, (pointer, value, mask)

    @staticmethod
    def atomic_add(pointer: Pointer, value: int, sem: str = "acq_rel") -> Operation:
        return Simulation.atomic_add, (pointer, value, sem)

    @staticmethod
    def debug_barrier() -> Operation:
        return Simulation.barrier, ()

    @staticmethod
    def program_id(axis: int) -> Operation:
        return Simulation.program_id, ()

    @staticmethod
    def num_programs(axis: int) -> Operation:
        return Simulation.num_programs, ()

    @staticmethod
    def arange(start: int, end: int) -> np.ndarray:
        return np.arange(start, end)

    @staticmethod
    def cast(value: Any, dtype: Any, bitcast: bool = False) -> Any:
        return np.asarray(value).view(dtype) if bitcast else np.asarray(value).astype(dtype)[()]

    @staticmethod
    def range(start: int, end: int, num_stages: int) -> range:
        return range(start, end)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def fma(a: Any, b: Any, c: Any) -> Any:
        return a * b + c

    @staticmethod
    def full(shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
        return np.full(shape, value, dtype)[()]

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)

    @staticmethod
    def rsqrt(v: Any) -> Any:
        return np.float32(1.0) / np.sqrt(v)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, np.ndarray):
            return np.where(condition, a, b)
        return a if condition else b

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    @staticmethod
    def static_assert(condition: bool) -> None:
        assert condition


_OPERATIONS = ("load", "store", "atomic_add", "debug_barrier", "program_id", "num_programs")


class _AsCoroutines(ast.NodeTransformer):
    """Turns jit functions into generators of operations.

    Args:
        functions: the names of the jit functions.
    """

    def __init__(self, functions: Sequence[str]) -> None:
        self.functions = functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list = []
        node.returns = None
        for argument in node.args.args + node.args.kwonlyargs:
            argument.annotation = None
        # A function without operations must be a generator, too.
        node.body[:0] = ast.parse("if False:\n    yield").body
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        # Triton computes a new tensor, and numpy would change the one that other names have.
        self.generic_visit(node)
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.Assign([node.target], value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "numel":
            node.attr = "size"
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            return ast.YieldFrom(node)
        if self._operation(node) in _OPERATIONS:
            return ast.Yield(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            cast = ast.Attribute(ast.Name("tl", ast.Load()), "cast", ast.Load())
            return ast.Call(cast, [node.func.value, *node.args], node.keywords)
        return node

    @staticmethod
    def _operation(node: ast.Call) -> str | None:
        """Return the name of a function of tl."""
        func = node.func
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
            return func.attr if func.value.id == "tl" else None
        return None


@functools.cache
def _compile(name: str, source: str, functions: tuple[str, ...]) -> Any:
    """Compile the jit functions of a module as coroutines."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    ]
    _AsCoroutines(functions).visit(tree)
    return compile(ast.fix_missing_locations(tree), f"<coroutines of {name}>", "exec")


def load_kernels(name: str, edit: Callable[[str], str] = lambda source: source) -> dict[str, Any]:
    """Compile the jit functions of a module, and those that they call, as coroutines.

    Args:
        name: of the module.
        edit: changes the source of this module.

    Returns:
        The global names of the module, with the coroutines in place of the jit functions.
    """
    from triton.language import constexpr

    module = importlib.import_module(name)
    names = dict(vars(module))
    functions = {key: value.fn for key, value in names.items() if hasattr(value, "fn")}
    others = {function.__module__ for function in functions.values()} - {name}
    modules = {other: load_kernels(other) for other in sorted(others)}
    for key, value in names.items():
        if isinstance(value, constexpr):
            names[key] = value.value
        elif key in functions and functions[key].__module__ != name:
            names[key] = modules[functions[key].__module__][functions[key].__name__]
    names["tl"] = Language
    exec(_compile(name, edit(inspect.getsource(module)), tuple(sorted(functions))), names)
    return names
