"""How many members fit into memory, from one of them."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from bn_lightning.models.classifier import Classifier
from bn_lightning.modules.preserve_state import preserve_state
from bn_lightning.stack.same_architecture import NotStackableError

# Tensors as large as the parameters: those of the stack and of the member's own network, gradients,
# and at most two of the optimizer's. Activations: saved, their gradients, and one in evaluation.
_OF_PARAMETERS, _OF_ACTIVATIONS = 5, 3
# Other workers of a sweep, and what the estimate leaves out, need the rest.
_SHARE = 0.4


class StackSizeError(NotStackableError):
    """More members than fit into memory.

    Attributes:
        fits: how many fit.
    """

    def __init__(self, size: int, fits: int) -> None:
        super().__init__(f"of {size} members {fits} fit into the free memory")
        self.fits = fits


def fitting_members(model: Classifier, x: Tensor, target: Tensor) -> int:
    """Return how many members fit into the free memory of the network's device, at least 1.

    Args:
        model: of one member, on the device; it does not change.
        x: inputs of a training batch.
        target: targets of the batch.
    """
    network = model.network
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    mode = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with preserve_state(network), torch.enable_grad(), mode:
        model.loss(network.train()(x), target)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
    needed = _OF_PARAMETERS * parameters + _OF_ACTIVATIONS * sum(saved.values())
    return max(1, int(_SHARE * free_memory(x.device) / max(needed, 1)))


def free_memory(device: torch.device) -> float:
    """Return the free memory of a device in bytes; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if sys.platform != "linux":
        return float("inf")
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")
