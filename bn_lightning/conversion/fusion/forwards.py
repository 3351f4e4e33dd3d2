"""Forwards that take the place of a class's on one instance, as `forward` in its __dict__.

The instance keeps its class, and gets its own forward back when the attribute is deleted. They are
copied and pickled with the module.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from bn_lightning.conversion.fusion.fused_call import activation_of, call_batch_norm, is_fusable
from bn_lightning.conversion.tracing import Guard


class FusedForward:
    """What all have in common; looks like the original to who asks for its signature or code.

    Args:
        module: the instance.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:  # torch.export asks for it
        return inspect.unwrap(type(self.module).forward).__code__


class SequentialForward(FusedForward):
    """Calls the children one after the other; a BatchNorm and an activation after it at once."""

    def __call__(self, input: Any) -> Any:
        modules = list(self.module)  # type: ignore[call-overload]  # an nn.Sequential
        at = 0
        while at < len(modules):
            follower = modules[at + 1] if at + 1 < len(modules) else None
            if is_pair(modules[at], follower):
                input = call_batch_norm(modules[at], input, activation=follower)
                at += 2
            else:
                input = modules[at](input)
                at += 1
        return input


def is_pair(module: nn.Module, follower: nn.Module | None) -> bool:
    """Returns whether `follower` is an activation that `module` can end in."""
    return is_fusable(module) and follower is not None and activation_of(follower) is not None


class RecordedForward(FusedForward):
    """Runs the first of its variants whose guards hold; else, or for other arguments, the original.

    Args:
        module: the instance.
        arguments: how many tensors the variants take, by position.
        variants: of the module's own forward.
    """

    def __init__(self, module: nn.Module, arguments: int, variants: list["Variant"]) -> None:
        super().__init__(module)
        self.arguments = arguments
        self.variants = variants

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = all(isinstance(a, Tensor) for a in args)
        if tensors and len(args) == self.arguments and not kwargs:
            for variant in self.variants:
                if all(guard.holds() for guard in variant.guards):
                    return variant.run(self.module, *args)
        return self.original(*args, **kwargs)


class Variant:
    """A graph as a function of the module and its arguments.

    Args:
        graph: of a forward; its targets are looked up in the module at each call.
        guards: what has to hold for it.
    """

    def __init__(self, graph: fx.Graph, guards: tuple[Guard, ...]) -> None:
        code = graph.python_code("self")
        self.guards = guards
        self.source = code.src
        self.names = {
            name: _Imported(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in code.globals.items()
        }
        self._compile()

    def _compile(self) -> None:
        names: dict[str, Any] = {
            name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
            for name, value in self.names.items()
        }
        exec(compile(self.source, "<fused forward>", "exec"), names)
        self.run: Callable[..., Any] = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


@dataclass(frozen=True)
class _Imported:
    """A Python module by its name, which can be pickled."""

    name: str
