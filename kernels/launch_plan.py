"""Record the launches of a call, and repeat them for calls that differ in addresses alone.

Every kernel is launched by `launch_kernel`. Inside `recorded` it also notes the launch. A tensor in
a noted launch is one of those given to the call, one of its results, or scratch memory. A plan
keeps for each argument of each kernel which of these it is, and at which offset. It knows no
kernel's parameters, and a repetition computes addresses and nothing else.

Scratch memory is not initialized. A tensor that must be made in its own way for every call comes
from `make_anew`.
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

# Bytes between the parts of the scratch memory: a cache line, and more than the widest access.
_ALIGNMENT = 128


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
        made_anew: the tensors of `make_anew`, and what made them.
    """

    def __init__(self) -> None:
        self.launches: list[_Launch] = []
        self.made_anew: list[tuple[Tensor, Callable[[], Tensor]]] = []


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


def make_anew(make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, and call `make` again for every repetition of the launch.

    Args:
        make: returns a tensor of the same size and dtype each time. A plan keeps it, so it must not
            hold a tensor of this call.
    """
    tensor = make()
    if _current.recording is not None:
        _current.recording.made_anew.append((tensor, make))
    return tensor


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The launches of a call, ready to be repeated.

    The addresses of a repetition are, in this order: those of the tensors given to the call and of
    its results; those of the tensors that are made anew; that of the scratch memory, if there is
    any; those at an offset from one before. The values are the addresses, then the constants.

    Attributes:
        device: of the tensors.
        index: of the device on which the kernels are loaded.
        current_device: returns the index of the current device.
        stream: index of a device -> the handle of its current stream.
        is_observed: returns whether to launch by Triton itself, because someone wants to see it.
        scratch_bytes: size of the scratch memory.
        makers: of the tensors that are made anew.
        bases: picks from the addresses those before the ones at an offset.
        offsets: bytes from there.
        constants: the arguments of all launches that are not addresses.
        steps: for each launch `start`, `before` and `after` of its `BoundLaunch`, and what picks
            its values from addresses and constants.
    """

    device: torch.device
    index: int
    current_device: Callable[[], int]
    stream: Callable[[int], int]
    is_observed: Callable[[], bool]
    scratch_bytes: int
    makers: tuple[Callable[[], Tensor], ...]
    bases: Callable[[tuple[int, ...]], tuple[int, ...]]
    offsets: tuple[int, ...]
    constants: tuple[Any, ...]
    steps: tuple[tuple[Any, ...], ...]

    def launch(self, addresses: tuple[int, ...]) -> None:
        """Repeat the launches on the current stream.

        Args:
            addresses: of the tensors given and of the results, in the order in which `make_plan`
                had them, without those that are None; each a multiple of 16 where it was one then.
        """
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                self.launch(addresses)
            return
        if self.makers:
            made = [make() for make in self.makers]
            addresses = (*addresses, *[tensor.data_ptr() for tensor in made])
        if self.scratch_bytes:
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
            addresses = (*addresses, scratch.data_ptr())
        if self.offsets:
            addresses += tuple(map(operator.add, self.bases(addresses), self.offsets))
        values = addresses + self.constants
        stream = self.stream(self.index)
        for start, before, after, pick in self.steps:
            start(*before, stream, *after, pick(values))


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
    recording: Recording, given: Iterable[Tensor | None], results: Iterable[Tensor | None]
) -> LaunchPlan | None:
    """Return the plan of a recorded call, or None if addresses alone cannot repeat it.

    They cannot if Triton's launcher is not known, if two of the tensors overlap, or if one was
    passed to no kernel, but for example a copy of it.

    Args:
        recording: of the call.
        given: the tensors that the call read or updated, dense and not empty.
        results: the tensors that it returned, likewise.
    """
    from bn_lightning.kernels.triton_launcher import bind_launch, launch_is_observed

    bound = [bind_launch(*launch) for launch in recording.launches]
    launches = [launch for launch in bound if launch is not None]
    if not launches or len(launches) < len(bound):
        return None
    tensors = [tensor for tensor in (*given, *results) if tensor is not None]
    known = [*tensors, *(tensor for tensor, _ in recording.made_anew)]
    parts = [_Part(*_span(tensor), place, 0) for place, tensor in enumerate(known)]
    if any(a.end > b.begin for a, b in itertools.pairwise(sorted(parts))):
        return None
    scratch_bytes = 0
    pointers = [leaf for launch in launches for leaf in launch.leaves if isinstance(leaf, Tensor)]
    for pointer in pointers:
        if _find(pointer, parts) is None:
            storage = pointer.untyped_storage()
            begin, size = storage.data_ptr(), storage.nbytes()
            parts.append(_Part(begin, begin + size, len(known), scratch_bytes))
            scratch_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
    found = [_find(pointer, parts) for pointer in pointers]
    if not set(range(len(tensors))) <= {place for place, _ in found}:
        return None

    # Where each pair of place and offset, and each constant, is among the values.
    bases = len(known) + bool(scratch_bytes)
    offsets = sorted({pair for pair in found if pair[1]})
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
        device=tensors[0].device,
        index=launches[0].device,
        current_device=launches[0].current_device,
        stream=launches[0].stream,
        is_observed=launch_is_observed,
        scratch_bytes=scratch_bytes,
        makers=tuple(make for _, make in recording.made_anew),
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
