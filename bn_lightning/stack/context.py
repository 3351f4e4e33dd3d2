"""What the layers of one stacked network share."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Placed(NamedTuple):
    """A tensor of all members.

    Attributes:
        value: the tensor.
        dim: its dimension of length K; None if all members share the tensor.
    """

    value: Tensor
    dim: int | None


class DropoutStreams:
    """The random numbers of the members' dropout: one stream for members of one state.

    Args:
        states: of a CPU generator, one for each member.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        places: dict[bytes, int] = {}
        self.generators: list[torch.Generator] = []
        self.stream_of: list[int] = []
        for state in states:
            key = state.numpy().tobytes()
            if key not in places:
                places[key] = len(self.generators)
                self.generators.append(torch.Generator().set_state(state))
            self.stream_of.append(places[key])

    def take(self, members: Sequence[int]) -> None:
        """Keep the given members only."""
        self.stream_of = [self.stream_of[k] for k in members]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the state of all streams when the context ends."""
        generators = [generator.clone_state() for generator in self.generators]
        stream_of = list(self.stream_of)
        try:
            yield
        finally:
            self.generators, self.stream_of = generators, stream_of

    def masks(self, like: Tensor, p: Sequence[float]) -> Tensor:
        """Draw the scaled masks of one dropout layer, as `torch.nn.functional.dropout` does.

        Members of one stream and one probability have the same mask.

        Args:
            like: input of one member, whose shape, dtype and memory format the mask has.
            p: probability of each member.

        Returns:
            (K, *shape).
        """
        keep = [1 - value for value in p]
        self._part([value not in (0, 1) for value in p])
        drawn: dict[tuple[int, float], Tensor] = {}
        for stream, generator in enumerate(self.generators):
            chances = {keep[k] for k, of in enumerate(self.stream_of) if of == stream}
            if chances <= {0, 1}:
                drawn |= {(stream, c): torch.full_like(like, c) for c in chances}
                continue
            # Each probability starts where the single run of the stream would.
            before = generator.get_state()
            for chance in sorted(chances):
                generator.set_state(before)
                mask = torch.empty_like(like, device="cpu").bernoulli_(chance, generator=generator)
                drawn[stream, chance] = (mask / chance).to(like.device)
        return torch.stack([drawn[of, keep[k]] for k, of in enumerate(self.stream_of)])

    def _part(self, draws: Sequence[bool]) -> None:
        """Part the members that draw nothing from a stream that others draw from."""
        drawn_from = {of for of, is_drawn in zip(self.stream_of, draws, strict=True) if is_drawn}
        parted: dict[int, int] = {}
        for k, of in enumerate(self.stream_of):
            if not draws[k] and of in drawn_from:
                if of not in parted:
                    parted[of] = len(self.generators)
                    self.generators.append(self.generators[of].clone_state())
                self.stream_of[k] = parted[of]


@dataclass
class StackContext:
    """State of a stacked network that its layers read and write.

    Attributes:
        size: number of members K.
        index: 0, ..., K - 1; inside `torch.func.vmap` the tensor that marks what is mapped.
        streams: of dropout; None until training begins.
        update: takes a parameter and two factors whose product is its gradient, and applies the
            step of an optimizer at once; None if gradients are to be returned.
        calls: how often the current step called each layer, by `id`.
        is_mapped: whether `torch.func.vmap` runs a forward.
        watched: a layer whose inputs are kept in `seen`.
        seen: inputs of `watched`.
    """

    size: int
    index: Tensor
    streams: DropoutStreams | None = None
    update: Callable[..., None] | None = None
    calls: Counter[int] = field(default_factory=Counter)
    is_mapped: bool = False
    watched: nn.Module | None = None
    seen: list[Placed] = field(default_factory=list)

    def note(self, layer: nn.Module, x: Placed) -> None:
        """Keep an input of the watched layer."""
        if layer is self.watched:
            self.seen.append(Placed(x.value.detach(), x.dim))


def leading(x: Placed, size: int) -> Tensor:
    """Return x as (K, N, ...), a view; a shared tensor is expanded."""
    if x.dim is None:
        return x.value.expand(size, *x.value.shape)
    return x.value.movedim(x.dim, 0)


def folded(x: Placed, size: int) -> Tensor:
    """Return x, (N, C, ...) of each member, as (N, K * C, ...)."""
    if x.dim is None:
        value = x.value.unsqueeze(1).expand(-1, size, *x.value.shape[1:])
    else:
        value = x.value.movedim(x.dim, 1)
    return value.flatten(1, 2)


class InVmap(torch.autograd.Function):
    """Calls a layer with the tensor of all members from within `torch.func.vmap`.

    The arguments of `apply` are a mapped tensor, the input, and the layer, whose `compute` maps a
    `Placed` to a `Placed`.
    """

    @staticmethod
    def forward(index: Tensor, x: Tensor, layer: Any) -> Tensor:
        """Raise an error: outside `vmap` there are no members."""
        raise RuntimeError("expected a stacked layer to be called by its StackedNetwork")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: autograd records what `compute` does."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], index: Tensor, x: Tensor, layer: Any
    ) -> tuple[Tensor, int | None]:
        """Compute all members."""
        return tuple(layer.computed(Placed(x, in_dims[1])))
