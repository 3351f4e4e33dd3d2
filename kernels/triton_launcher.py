"""Triton's launcher, called with addresses: all that the project knows of Triton's private fields.

At every launch Triton binds the arguments, computes what the kernel is specialized for, and looks
up the compiled kernel. `bind_launch` keeps what it found for one launch, so that further launches
whose arguments differ in addresses alone go directly to the launcher, which is written in C.

The private fields are those of Triton 3.6 and 3.7 for CUDA. For another version and another GPU
`bind_launch` returns None, and the caller launches the kernel as Triton documents it. The
interpreter needs none of them: a launch in it is an ordinary one on tensors made of the addresses.
"""

import ctypes
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

_KNOWN_VERSIONS = ("3.6", "3.7")


class BoundLaunch(NamedTuple):
    """One launch, to be repeated as `start(*before, stream, *after, values)`.

    Attributes:
        start: Triton's launcher.
        before: its arguments before the stream.
        after: its arguments after the stream.
        leaves: the arguments of the kernel, as recorded, whose values a repetition passes as a
            tuple in this order, the address in place of a tensor.
        device: index of the device on which the kernel is loaded.
        current_device: returns the index of the current device.
        stream: index of a device -> the handle of its current stream.
    """

    start: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    leaves: list[Any]
    device: int
    current_device: Callable[[], int]
    stream: Callable[[int], int]


def bind_launch(
    kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]
) -> BoundLaunch | None:
    """Return how to repeat a launch, or None if only Triton itself can.

    Args:
        kernel: the decorated function.
        compiled: what `kernel[grid](**arguments)` returned.
        grid: one to three numbers of programs.
        arguments: of the kernel, and the options of the launch.
    """
    if not isinstance(kernel, triton.JITFunction):
        return _bind_interpreted(kernel, grid, arguments)
    if not _is_known(compiled):
        return None
    launcher, types = compiled.run, compiled.src.signature
    kept = zip(_leaves(list(types.values())), _leaves([arguments[n] for n in types]), strict=True)
    leaves = [leaf for kind, leaf in kept if kind != "constexpr"]
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    # Metadata for the hooks, and the two hooks.
    unobserved = (compiled.packed_metadata, None, None, None)
    no_scratch = (None, None)
    after: tuple[Any, ...]
    if _version() == "3.6":
        start = _spread(launcher.launch, tuple(types.values()))
        after = (*options, *no_scratch, *unobserved)
    else:
        from triton.backends.nvidia.driver import annotate_arguments

        start = launcher.launch
        # Of arguments that are flat and hold no constants.
        annotations = annotate_arguments(["i32"] * len(leaves))
        after = (*options, *unobserved, *no_scratch, annotations, launcher.kernel_signature)
    driver = triton.runtime.driver.active
    return BoundLaunch(
        start=start,
        before=(*grid, 1, 1)[:3],
        after=after,
        leaves=leaves,
        device=driver.get_current_device(),
        current_device=driver.get_current_device,
        stream=driver.get_current_stream,
    )


def knows_triton() -> bool:
    """Return whether the private fields of this Triton, on its GPU, are known."""
    return _version() in _KNOWN_VERSIONS and torch.version.hip is None


def _version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def _spread(launch: Callable[..., None], types: tuple[Any, ...]) -> Callable[..., None]:
    """Return a launcher that takes the values as one tuple, of one that takes the arguments.

    The arguments are nested like `types`. Those of constants are in the place of a value, and are
    not read.
    """
    arrange = _arrange(types, itertools.count())

    def start(*arguments: Any) -> None:
        *options, values = arguments
        launch(*options, *arrange((*values, None)))

    return start


def _arrange(types: tuple[Any, ...], places: Iterator[int]) -> Callable[[tuple[Any, ...]], Any]:
    """Return a function that nests flat values like `types`; the last value is for constants."""
    picks = [
        _arrange(kind, places)
        if isinstance(kind, tuple)
        else operator.itemgetter(-1 if kind == "constexpr" else next(places))
        for kind in types
    ]
    return lambda values: tuple([pick(values) for pick in picks])


def _is_known(compiled: Any) -> bool:
    """Return whether a kernel is one of a known version of Triton, and needs nothing special."""
    if not knows_triton():
        return False
    launcher: Any = getattr(compiled, "run", None)
    if type(launcher).__name__ != "CudaLauncher":
        return False
    return launcher.global_scratch_size == 0 and launcher.profile_scratch_size == 0


def launch_is_observed() -> bool:
    """Return whether someone wants to see each launch, as profilers do, or to instrument it."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of hooks is always set, and may be empty.
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or knobs.compilation.instrumentation_mode
    )


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, in order."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _bind_interpreted(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]
) -> BoundLaunch | None:
    leaves = [leaf for leaf in _leaves([*arguments.values()]) if isinstance(leaf, Tensor)]
    if any(leaf.device.type != "cpu" for leaf in leaves):
        return None
    # dtypes take the place of the tensors, which would otherwise live as long as the launch.
    dtypes = {name: _map(_dtype_of, value) for name, value in arguments.items()}

    def start(stream: int, addresses: tuple[int, ...]) -> None:
        left = iter(addresses)

        def tensor(leaf: Any) -> Any:
            return _tensor_at(next(left), leaf) if isinstance(leaf, torch.dtype) else leaf

        kernel[grid](**{name: _map(tensor, value) for name, value in dtypes.items()})

    return BoundLaunch(start, (), (), leaves, 0, lambda: 0, lambda device: 0)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what is in nested tuples."""
    if not isinstance(value, tuple):
        return function(value)
    items = [_map(function, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _dtype_of(leaf: Any) -> Any:
    return leaf.dtype if isinstance(leaf, Tensor) else leaf


def _tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose first element is at `address`; the interpreter reads no more of it."""
    memory = (ctypes.c_byte * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
