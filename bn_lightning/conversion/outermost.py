"""Hooks on a converted model: what its forward returns is computed."""

import contextlib
import sys
from typing import Any

import torch
from torch import nn

from bn_lightning.conversion.deferred import enter_outermost, leave_outermost
from bn_lightning.conversion.traced import compute_traced


class _Hook:
    """A hook that works only on the module itself, not on a copy of it.

    Args:
        is_root: whether the module is the converted model, not one of its children.
        is_temporary: whether copies of the module, and pickles, have a hook that does nothing.
    """

    def __init__(self, is_root: bool, is_temporary: bool) -> None:
        self.is_root = is_root
        self.is_temporary = is_temporary

    def __reduce__(self) -> Any:
        if self.is_temporary:
            # A function of the standard library that takes anything and returns None.
            return getattr, (contextlib.nullcontext(), "__exit__")
        return type(self), (self.is_root, False)

    @property
    def __name__(self) -> str:
        """Raises the error for torch.jit.script, which compiles hooks and asks for their names."""
        raise RuntimeError(
            "expected a model without fused BatchNorm for torch.jit.script, got a converted one; "
            "call revert_batchnorm(model) first, or use torch.jit.trace or torch.export"
        )


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            enter_outermost(module)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return compute_traced(output) if self.is_root else None
        has_failed = output is None and sys.exc_info()[0] is not None
        is_outermost = leave_outermost(module, has_failed)
        # Tensors of a compiled forward, or of torch.export, cannot become plain themselves.
        return compute_traced(output) if is_outermost else None


# Where Dynamo does not inline the hooks, it would compile them and what they call by themselves.
_frames = torch._C._dynamo.eval_frame
for _hook in (_Enter, _Leave):
    _frames.set_code_exec_strategy(
        _hook.__call__.__code__,
        _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP),
    )


def add_hooks(model: nn.Module, is_temporary: bool) -> None:
    """Compute all deferred tensors before the forward of a model, or of a part of it, returns.

    Args:
        model: the model. Its children with deferred BatchNorms get hooks, too, because a
            LightningModule calls them by themselves.
        is_temporary: as for `_Hook`.
    """
    for module in (model, *model.children()):
        parts = (part for part in module.modules() if part is not module)
        if any("deferral" in part.__dict__ for part in parts):
            enter = _Enter(module is model, is_temporary)
            leave = _Leave(module is model, is_temporary)
            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave, prepend=True, always_call=True)


def remove_hooks(model: nn.Module) -> None:
    """Remove the hooks that `add_hooks` added to a model, or to one that it is a part of."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
