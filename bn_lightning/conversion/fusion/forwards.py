"""Forwards that replace a class's forward on one instance, as `forward` in its __dict__.

The instance keeps its class. Deleting the attribute restores the original forward. They are copied
and pickled with the module.
"""

import importlib
import inspect
from collections.abc import Callable
from types import CodeType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from bn_lightning.conversion.fusion.fused_call import activation_of, call_batch_norm, is_fusable
from bn_lightning.conversion.tracing import Guard


class FusedForward:
    """Base class with the signature and code of the original forward.

    Args:
        module: the instance.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:  # for torch.export
        return inspect.unwrap(type(self.module).forward).__code__


class SequentialForward(FusedForward):
    """Calls the children in order, a BatchNorm and the activation after it in one call."""

    def __call__(self, input: Any) -> Any:
        modules = list(self.module)  # type: ignore[call-overload]  # an nn.Sequential
        i = 0
        while i < len(modules):
            follower = modules[i + 1] if i + 1 < len(modules) else None
            if is_pair(modules[i], follower):
                input = call_batch_norm(modules[i], input, activation=follower)
                i += 2
            else:
                input = modules[i](input)
                i += 1
        return input


def is_pair(module: nn.Module, follower: nn.Module | None) -> bool:
    """Return whether `module` is a BatchNorm that can be fused with the activation `follower`."""
    return is_fusable(module) and follower is not None and activation_of(follower) is not None


class RecordedForward(FusedForward):
    """Runs the first variant whose guards hold; otherwise the original forward.

    Args:
        module: the instance.
        arguments: number of positional tensors that the variants take. With other arguments the
            original forward runs.
        variants: variants of the module's own forward.
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
        return type(self.module).forward(self.module, *args, **kwargs)


class Variant:
    """A graph compiled to a function of the module and its arguments.

    Args:
        graph: graph of a forward. Each call looks up its targets in the module.
        guards: conditions under which the graph is valid.
    """

    def __init__(self, graph: fx.Graph, guards: tuple[Guard, ...]) -> None:
        code = graph.python_code("self")
        self.guards = guards
        self.source = code.src
        self.names = {
            name: _ModuleName(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in code.globals.items()
        }
        self._compile()

    def _compile(self) -> None:
        names: dict[str, Any] = {
            name: importlib.import_module(value) if isinstance(value, _ModuleName) else value
            for name, value in self.names.items()
        }
        exec(compile(self.source, "<fused forward>", "exec"), names)
        self.run: Callable[..., Any] = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


class _ModuleName(str):
    """The name of a Python module, which unlike the module can be pickled."""
