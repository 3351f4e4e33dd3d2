"""A network whose forward, unmodified, computes all members of a stack."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bn_lightning.modules.preserve_state import preserve_state
from bn_lightning.stack.context import Placed, StackContext
from bn_lightning.stack.same_architecture import check_same_architecture
from bn_lightning.stack.stacked_layers import StackedLayer, stack_layer


class StackedNetwork(nn.Module):
    """K networks of one structure, whose parameters and buffers have a leading dimension K.

    `network` has the modules and names of a single one. Linear layers, BatchNorms, dropout and
    activations compute all members at once (stacked_layers.py), and everything else runs in
    `torch.func.vmap`.
    A NaN of one member does not reach another.

    Args:
        networks: the members, at least one; they are not changed.

    Raises:
        NotStackableError: see `check_same_architecture`.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        check_same_architecture(networks)
        device = next(iter(_tensors(networks[0])), torch.empty(0)).device
        size = len(networks)
        self.context = StackContext(size, torch.arange(size, device=device))
        self.network = copy.deepcopy(networks[0])
        in_several = _names_of_shared(networks[0])
        modules = [dict(network.named_modules()) for network in networks]
        generic: list[str] = []
        stacked: dict[int, Any] = {}  # by the `id` of a tensor that may be in several modules
        # Children before parents.
        for name, module in reversed([*self.network.named_modules()]):
            same = [others[name] for others in modules]
            own = [*module.named_parameters(name, False), *module.named_buffers(name, False)]
            _stack_tensors(module, same, stacked)
            is_known = not in_several.intersection(tensor for tensor, _ in own)
            if not (is_known and stack_layer(module, same, self.context)):
                generic += [tensor for tensor, _ in own]
        self._generic = sorted(generic)

    @property
    def size(self) -> int:
        """Number of members K."""
        return self.context.size

    def forward(self, x: Placed) -> Placed:
        """Return the outputs of all members; without `torch.func.vmap` if each layer is known."""
        if isinstance(self.network, StackedLayer):
            return self.network.computed(x)
        return Placed(self.map(lambda member, x: member(x), x), 0)

    def map(self, function: Callable[..., Any], *arguments: Placed) -> Any:
        """Call a function of one member for all members.

        Args:
            function: called once, inside `torch.func.vmap`, with a member's network and arguments.
            arguments: of the function.

        Returns:
            What the function returns, each tensor with a leading dimension K.
        """
        context, index = self.context, self.context.index
        tensors = self._generic_tensors()

        def member(index: Tensor, tensors: dict[str, Tensor], *values: Tensor) -> Any:
            context.index = index
            if not tensors:
                return function(self.network, *values)
            call = partial(functional_call, self.network, tensors, tie_weights=False)
            return function(call, *values)

        dims = (0, 0, *(argument.dim for argument in arguments))
        context.is_mapped = True
        try:
            return vmap(member, in_dims=dims)(index, tensors, *(a.value for a in arguments))
        finally:
            context.index, context.is_mapped = index, False

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore buffers, modes and random streams when the context ends."""
        streams = self.context.streams
        with preserve_state(self.network), streams.preserved() if streams else nullcontext():
            yield

    def take(self, members: Sequence[int]) -> None:
        """Keep the given members only, in the given order."""
        chosen = torch.tensor(list(members), device=self.context.index.device)
        kept: dict[int, Any] = {}  # by the `id` of a tensor that may be in several modules
        for module in self.network.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in kept:
                        part = tensor.detach().index_select(0, chosen)
                        if isinstance(tensor, nn.Parameter):
                            # A new one: autograd remembers the shape of the old one.
                            part = nn.Parameter(part, tensor.requires_grad)
                        kept[id(tensor)] = part, tensor
                    table[name] = kept[id(tensor)][0]
            if isinstance(module, StackedLayer):
                module.take(list(members))
        if self.context.streams is not None:
            self.context.streams.take(members)
        self.context.size = len(members)
        self.context.index = torch.arange(len(members), device=chosen.device)

    def member_state(self, member: int) -> dict[str, Tensor]:
        """Return copies of a member's parameters and buffers: its network's `state_dict`."""
        state = self.network.state_dict()
        return {name: tensor[member].clone() for name, tensor in state.items()}

    def load_member(self, network: nn.Module, member: int) -> None:
        """Copy a member's parameters and buffers to a network of its own."""
        network.load_state_dict(self.member_state(member))
        for own, buffer in zip(network.buffers(), self.network.buffers(), strict=True):
            own.copy_(buffer[member])  # those that are not in a state_dict, too

    def _generic_tensors(self) -> dict[str, Tensor]:
        if not self._generic:
            return {}
        parameters = self.network.named_parameters(remove_duplicate=False)
        found = dict([*parameters, *self.network.named_buffers(remove_duplicate=False)])
        return {name: found[name] for name in self._generic}


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _names_of_shared(network: nn.Module) -> set[str]:
    """Return the names of tensors that several modules, or several names, share."""
    names: dict[int, list[str]] = {}
    for named in (network.named_parameters, network.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {name for found in names.values() if len(found) > 1 for name in found}


def _stack_tensors(module: nn.Module, same: Sequence[nn.Module], stacked: dict[int, Any]) -> None:
    """Replace a module's own parameters and buffers by those of all members."""
    for name, own in module._parameters.items():
        if own is not None:
            if id(own) not in stacked:
                tensor = _stacked([other._parameters[name] for other in same])
                # With the tensor that it replaces, whose `id` is then nobody else's.
                stacked[id(own)] = nn.Parameter(tensor, own.requires_grad), own
            module._parameters[name] = stacked[id(own)][0]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            if id(buffer) not in stacked:
                stacked[id(buffer)] = _stacked([other._buffers[name] for other in same]), buffer
            module._buffers[name] = stacked[id(buffer)][0]


def _stacked(tensors: Sequence[Any]) -> Tensor:
    """Stack tensors along a new first dimension; images in their own memory format."""
    if tensors[0].dim() < 4:
        return torch.stack([t.detach() for t in tensors]).contiguous()
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    back = [0, *(1 + order.index(dim) for dim in range(len(order)))]
    return torch.stack([t.detach().permute(order) for t in tensors]).permute(back)
