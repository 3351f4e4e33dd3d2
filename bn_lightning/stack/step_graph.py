"""A stack's training step on a GPU, recorded as a CUDA graph and replayed.

A step of small networks takes the host longer to start than the GPU to compute. A graph is one
start. It repeats the kernels that it has recorded, on the same memory.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bn_lightning.stack.context import Placed

_log = logging.getLogger(__name__)

# Steps before the recording: they make the optimizer's state, and what torch and Triton keep.
WARM_UP = 3


class StepGraph:
    """Trains steps; from the fourth on they are replayed.

    What is recorded is the step of a batch like the one before, so not an epoch's short last one.
    A batch of another shape, and a step that cannot be recorded because it reads what is on the
    GPU, are trained kernel by kernel.

    Args:
        step: trains on the inputs and targets of a batch, and returns the losses (K,). Nothing in
            it may depend on the number of the step.
    """

    def __init__(self, step: Callable[[Placed, Placed], Tensor]) -> None:
        self._step = step
        self._is_recordable = True
        self.forget()

    def forget(self) -> None:
        """Record anew, because the stack has other tensors now."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses = torch.empty(0)
        self._batch: tuple[Placed, ...] = ()
        self._kinds: list[_Kind] = []  # of the last step's batch
        self._left = WARM_UP

    def __call__(self, x: Placed, target: Placed) -> Tensor:
        """Train on a batch, inside `recordable`; return the losses, which the next call changes."""
        kinds = [_kind(x), _kind(target)]
        is_repeated, self._kinds = kinds == self._kinds, kinds
        if self._left or not self._is_recordable:
            self._left = max(0, self._left - 1)
            return self._step(x, target)
        if self._graph is None and not (is_repeated and self._record(x, target)):
            return self._step(x, target)
        if kinds != [*map(_kind, self._batch)]:
            return self._step(x, target)
        for mine, given in zip(self._batch, (x, target), strict=True):
            mine.value.copy_(given.value)
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _record(self, *batch: Placed) -> bool:
        self._batch = tuple(Placed(part.value.clone(), part.dim) for part in batch)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._losses = self._step(*self._batch)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            _log.warning("steps of this stack are not recorded as a CUDA graph: %s", reason)
            self._is_recordable = False
            return False
        self._graph = graph
        return True


_Kind = tuple[torch.Size, torch.dtype, int | None]


def _kind(part: Placed) -> _Kind:
    return part.value.shape, part.value.dtype, part.dim


@contextmanager
def recordable(device: torch.device) -> Iterator[None]:
    """Work on a stream that a CUDA graph can record, which the default one is not.

    A backward waits for the stream on which each parameter was first used, so all steps run here.
    """
    if device.type != "cuda":
        yield
        return
    outside, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)
