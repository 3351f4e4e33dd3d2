"""Record the launches of a call, and repeat them for calls that differ in addresses alone.

Every kernel is launched by `launch_kernel`. Inside `recorded` it also notes the launch. A tensor in
a noted launch is one of those given to the call, in one of its results, or scratch memory. A plan
keeps for each argument of each kernel which of these it is, and at which offset. It knows no
kernel's parameters. A repetition allocates the results and computes addresses, and nothing else.

Scratch memory is not initialized.
"""

import contextlib
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Inductor's code allocates with these, on the current device. They skip the dispatcher and so take
# half the time of `torch.empty_strided`. They are private; without them there are no plans.
try:
    from torch._C._dynamo import guards

    EMPTY_STRIDED = {name: getattr(guards, f"_empty_strided_{name}") for name in ("cpu", "cuda")}
except (ImportError, AttributeError):
    EMPTY_STRIDED = {}

# Bytes between the parts of the scratch memory: a cache line, and more than the widest access.
_ALIGNMENT = 128
# A name of this module is found in less time than an attribute.
_data_ptr = Tensor.data_ptr


class _Launch(NamedTuple):
    """A noted launch; the fields are the arguments of `bind_launch`."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Recording:
    """What was noted of one call.

    Attributes:
        launches: in order.
    """

    def __init__(self) -> None:
        self.launches: list[_Launch] = []


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Note the launches of this thread inside."""
    before, _current.recording = _current.recording, Recording()
    try:
        yield _current.recording
    finally:
        _current.recording = before


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three numbers of programs.
        arguments: those of the kernel, and the options of the launch.
    """
    compiled = kernel[grid](**arguments)
    if _current.recording is not None:
        _current.recording.launches.append(_Launch(kernel, compiled, grid, arguments))


class Result(NamedTuple):
    """A tensor that a repetition allocates and returns.

    Attributes:
        size: its shape.
        strides: as many.
        dtype: its dtype.
        parts: the tensors of the recorded call that are in it, each with its offset in bytes.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Tensor, int], ...]

    @classmethod
    def like(cls, tensor: Tensor) -> "Result":
        """Return the result that a tensor of the recorded call was."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, ((tensor, 0),))


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The launches of a call, ready to be repeated.

    The addresses of a repetition are, in this order: those of the tensors given to the call and of
    its results; that of the scratch memory, if there is any; those at an offset from one before.
    The values are the addresses, then the constants.

    Attributes:
        index: of the device on which the kernels are loaded.
        current_device: returns the index of the current device.
        stream: index of a device -> the handle of its current stream.
        is_observed: returns whether to launch by Triton itself, because someone wants to see it.
        empty_strided: size, strides, dtype -> a tensor on the current device.
        results: size, strides and dtype of each.
        scratch_bytes: size of the scratch memory.
        bases: picks from the addresses those before the ones at an offset.
        offsets: bytes from there.
        constants: the arguments of all launches that are not addresses.
        steps: for each launch `start`, `before` and `after` of its `BoundLaunch`, and what picks
            its values from addresses and constants.
    """

    index: int
    current_device: Callable[[], int]
    stream: Callable[[int], int]
    is_observed: Callable[[], bool]
    empty_strided: Callable[..., Tensor]
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    scratch_bytes: int
    bases: Callable[[Sequence[int]], tuple[int, ...]]
    offsets: tuple[int, ...]
    constants: tuple[Any, ...]
    steps: tuple[tuple[Any, ...], ...]

    def launch(self, addresses: Sequence[int]) -> list[Tensor]:
        """Repeat the launches on the current stream.

        Args:
            addresses: of the tensors given, in the order in which `make_plan` had them, without
                those that are None; each a multiple of 16 where it was one then.

        Returns:
            The results.
        """
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.launch(addresses)
        results = [*itertools.starmap(self.empty_strided, self.results)]
        values = [*addresses, *map(_data_ptr, results)]
        if self.scratch_bytes:
            scratch = self.empty_strided((self.scratch_bytes,), (1,), torch.uint8)
            values.append(scratch.data_ptr())
        if self.offsets:
            values += map(operator.add, self.bases(values), self.offsets)
        values += self.constants
        stream = self.stream(self.index)
        for start, before, after, pick in self.steps:
            start(*before, stream, *after, pick(values))
        return results


class _Part(NamedTuple):
    """Memory that the arguments of the launches point into.

    Attributes:
        begin: its address in the recorded call.
        end: the address after it.
        place: of its address, or of that of the memory it is in, among those of a repetition.
        offset: of its address from there, in bytes.
    """

    begin: int
    end: int
    place: int
    offset: int


def make_plan(
    recording: Recording, given: Iterable[Tensor | None], results: Sequence[Result]
) -> LaunchPlan | None:
    """Return the plan of a recorded call, or None if addresses alone cannot repeat it.

    They cannot if Triton's launcher is not known, if two of the tensors overlap, or if one was
    passed to no kernel, but for example a copy of it.

    Args:
        recording: of the call.
        given: the tensors that the call read or updated, dense and not empty.
        results: what it returned, likewise.
    """
    from bn_lightning.kernels.triton_launcher import bind_launch, launch_is_observed

    bound = [bind_launch(*launch) for launch in recording.launches]
    launches = [launch for launch in bound if launch is not None]
    tensors = [tensor for tensor in given if tensor is not None]
    empty_strided = EMPTY_STRIDED.get(tensors[0].device.type)
    if not launches or len(launches) < len(bound) or empty_strided is None:
        return None
    pointers = [leaf for launch in launches for leaf in launch.leaves if isinstance(leaf, Tensor)]
    parts = [_Part(*_span(tensor), place, 0) for place, tensor in enumerate(tensors)]
    for place, result in enumerate(results, len(tensors)):
        parts += [_Part(*_span(tensor), place, offset) for tensor, offset in result.parts]
    if not all(any(_find(pointer, [part]) for pointer in pointers) for part in parts):
        return None
    known = len(tensors) + len(results)
    if any(a.end > b.begin for a, b in itertools.pairwise(sorted(parts))):
        return None
    scratch_bytes = 0
    for pointer in pointers:
        if _find(pointer, parts) is None:
            storage = pointer.untyped_storage()
            begin, size = storage.data_ptr(), storage.nbytes()
            parts.append(_Part(begin, begin + size, known, scratch_bytes))
            scratch_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    # Where each pair of place and offset, and each constant, is among the values.
    bases = known + bool(scratch_bytes)
    offsets = sorted({pair for pair in (_find(p, parts) for p in pointers) if pair[1]})
    index = {(place, 0): place for place in range(bases)}
    index |= {pair: bases + number for number, pair in enumerate(offsets)}
    constants: list[Any] = []
    steps = []
    for launch in launches:
        picked = []
        for leaf in launch.leaves:
            if isinstance(leaf, Tensor):
                picked.append(index[_find(leaf, parts)])
            else:
                picked.append(len(index) + len(constants))
                constants.append(leaf)
        steps.append((launch.start, launch.before, launch.after, picker(picked)))
    return LaunchPlan(
        index=launches[0].device,
        current_device=launches[0].current_device,
        stream=launches[0].stream,
        is_observed=launch_is_observed,
        empty_strided=empty_strided,
        results=tuple(result[:3] for result in results),
        scratch_bytes=scratch_bytes,
        bases=picker([place for place, _ in offsets]),
        offsets=tuple(more for _, more in offsets),
        constants=tuple(constants),
        steps=tuple(steps),
    )


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks the items at these places."""
    if not places:
        return lambda items: ()
    if len(places) == 1:
        # `itemgetter` would return the item itself.
        (place,) = places
        return lambda items: (items[place],)
    return operator.itemgetter(*places)


def places_of(results: Sequence[Tensor | None]) -> list[int]:
    """Return where each is among those that are not None; -1 for None."""
    numbers = itertools.count()
    return [-1 if result is None else next(numbers) for result in results]


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def _find(pointer: Tensor, parts: Iterable[_Part]) -> Any:
    """Return place and offset of a tensor, or None if it is in none of the parts."""
    address = pointer.data_ptr()
    for part in parts:
        if part.begin <= address < part.end:
            return part.place, part.offset + address - part.begin
    return None
