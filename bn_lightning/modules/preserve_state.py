"""Call a network without changing it: `with preserve_state(network): network(x)`."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserve_state(network: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Restore the state of `network` when the context ends, also after an error.

    Restored are, for the network and all its submodules: the values of buffers, the tensors that
    buffers and parameters refer to, and the modes (`training`); and the random states of torch on
    the CPU and on the network's CUDA devices, of NumPy and of Python. Attributes that are neither
    buffers nor parameters, such as a count of calls, are not restored.

    Values are restored in place, so modules with several names, tied tensors and views of one
    another stay shared, and optimizers and compiled graphs keep their tensors. Autograd does not
    notice the restoration: compute gradients of what the network returns within the context.

    Args:
        network: any module, on any devices.
        parameters: whether to restore the values of parameters, too, at the cost of a copy of them.
    """
    modules = list(network.modules())
    modes = [(module, module.training) for module in modules]
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for m in modules for table in (m._buffers, m._parameters)
    ]
    tensors = [*network.buffers(), *(network.parameters() if parameters else ())]
    # Outside inference mode an inference tensor cannot change.
    written = [x for x in tensors if torch.is_inference_mode_enabled() or not x.is_inference()]
    values = [(memory := _memory_of(x), memory.clone()) for x in written]
    devices = {x.device for x in (*network.buffers(), *network.parameters()) if x.is_cuda}
    try:
        with _preserve_random_states(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for table, before in tables:
            if table.keys() != before.keys() or any(table[k] is not x for k, x in before.items()):
                table.clear()
                table.update(before)
        for memory, value in values:
            memory.copy_(value)


@contextmanager
def preserve_generators(loader: Any) -> Iterator[None]:
    """Restore the states of the generators of a loader and its samplers when the context ends.

    Args:
        loader: a `DataLoader`, or anything else, which has no generators.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in (loader, batch_sampler, *samplers)]
    states = [(x, x.get_state()) for x in found if isinstance(x, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _memory_of(x: Tensor) -> Tensor:
    """Return what a tensor refers to, without autograd and with expanded dimensions narrowed to 1.

    An expanded tensor cannot be written to, but its memory may change through a view.
    """
    x = x.data  # unlike detach(), does not share the version that autograd compares
    if x.layout is torch.strided:
        for dim, stride in enumerate(x.stride()):
            if stride == 0 and x.shape[dim] > 1:
                x = x.narrow(dim, 0, 1)
    return x


@contextmanager
def _preserve_random_states(cuda_devices: set[torch.device]) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(list(cuda_devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
