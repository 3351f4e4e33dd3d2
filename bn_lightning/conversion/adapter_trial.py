"""Tries whether a module computes what its adapter says, on copies of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bn_lightning.conversion.adapted import Adapter, adapt

PLAIN = (bool, int, float, str, type(None))
"""Types of attributes that two modules are compared by."""


def find_difference(module: nn.Module, adapter: Adapter) -> str | None:
    """Return what our forward computes otherwise than the module's own, on one small input.

    Both run in fp64 on copies with the same random state; each child in `adapter.after` is replaced
    by a function of its own, so that their order matters.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device="cpu")
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5

    theirs = copy_without_hooks(module, random)
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations, which would change the class of `module`, too.
        theirs.__class__ = parametrize.type_before_parametrizations(module)
        for name in theirs._modules.pop("parametrizations"):
            theirs.register_parameter(name, nn.Parameter(random(getattr(module, name)), False))
    missing = [name for name in adapter.after if theirs._modules.get(name) is None]
    if missing:
        return f"module: it has no child {missing[0]!r}"
    ours = copy_without_hooks(theirs, clone_detached)
    for copy in (theirs, ours):
        for i, name in enumerate(adapter.after):
            copy._modules[name] = _Marker(i)
    swapped, attributes = adapt(theirs, adapter)
    ours.__dict__.update(attributes, backend="native")
    ours.__class__ = swapped
    channels = getattr(module, "num_features", None) or theirs.running_mean.numel()
    # nn.SyncBatchNorm trains on GPUs only.
    modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (True, False)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        x = _find_input(theirs.eval(), channels, generator)
        for mode in modes:
            wanted, found = theirs.train(mode)(x.clone()), ours.train(mode)(x.clone())
            if wanted.dtype != found.dtype or not torch.allclose(wanted, found, 1e-9, 1e-9):
                return f"output in {'training' if mode else 'evaluation'}"
            for (name, a), (_, b) in zip(theirs.named_buffers(), ours.named_buffers(), strict=True):
                if not torch.allclose(a, b, 1e-9, 1e-9):
                    return f"`{name}` after {'training' if mode else 'evaluation'}"
    return None


def _find_input(module: nn.Module, channels: int, generator: torch.Generator) -> Tensor:
    """Return the first input, of four shapes, that a module takes."""
    for shape in ((3, channels, 2, 2), (3, channels), (3, channels, 2)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        try:
            module(x.clone())
        except Exception:
            continue
        return x
    return torch.randn((3, channels, 2, 2, 2), generator=generator, dtype=torch.float64)


class _Marker(nn.Module):
    """Stands for a child module; no two of them commute."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, input: Tensor) -> Tensor:
        return input.square() + (self.index + 1)


def clone_detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def copy_without_hooks(module: Any, values: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy without hooks, whose parameters, frozen, and buffers are new tensors."""
    cls: Any = type(module)
    copy = cls.__new__(cls)
    fresh = vars(nn.Module())
    others = {name: value for name, value in vars(module).items() if name not in fresh}
    copy.__dict__.update(others, **fresh)
    copy.training = module.training
    for name, parameter in module._parameters.items():
        new = None if parameter is None else nn.Parameter(values(parameter), requires_grad=False)
        copy._parameters[name] = new
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else values(buffer)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else copy_without_hooks(child, values)
    return copy


def have_same_state(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two copies have equal tensors, plain attributes, classes and children."""

    def described(module: nn.Module) -> list[Any]:
        plain = {name: v for name, v in vars(module).items() if isinstance(v, PLAIN)}
        tensors = [*module._parameters.items(), *module._buffers.items()]
        kinds = [(name, None if t is None else (t.shape, t.dtype)) for name, t in tensors]
        return [type(module), sorted(vars(module)), plain, kinds, list(module._modules)]

    pairs = list(zip(a.modules(), b.modules(), strict=False))
    tensors = zip(a.state_dict().values(), b.state_dict().values(), strict=False)
    return all(described(x) == described(y) for x, y in pairs) and all(
        torch.equal(x, y) for x, y in tensors
    )
