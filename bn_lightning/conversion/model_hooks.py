"""Hooks on a converted model: what its forward returns is computed."""

import contextlib
import sys
from typing import Any

import torch
from torch import nn

from bn_lightning.conversion.deferrable import Site
from bn_lightning.conversion.deferred import Deferred, read, thread
from bn_lightning.conversion.deferred_call import DeferredCall
from bn_lightning.conversion.traced import compute_traced


class _Hook:
    """A hook before and after the forward of a module, but not of a copy of it.

    Args:
        is_root: whether the module is the converted model, not one of its children.
        is_temporary: whether copies of the module, and pickles, have a hook that does nothing.
    """

    def __init__(self, is_root: bool, is_temporary: bool) -> None:
        self.is_root = is_root
        self.is_temporary = is_temporary

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return compute_traced(output[0]) if output and self.is_root else None
        if not output:
            if thread.outermost is None:
                thread.outermost = module
            return None
        if thread.outermost is not module:
            return None
        made, thread.made, thread.outermost = thread.made, [], None
        thread.latest.clear()
        lost, DeferredCall.lost_updates = DeferredCall.lost_updates, []
        if output[0] is not None or sys.exc_info()[0] is None:  # it has not failed
            for reference in made:
                tensor = reference()
                if type(tensor) is Deferred:
                    read(tensor)
            Site.passes += 1
            if lost:
                raise lost[0]
        # Tensors of a compiled forward, or of torch.export, cannot become plain themselves.
        return compute_traced(output[0])

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


# Where Dynamo does not inline the hook, it would compile it and what it calls by themselves.
_frames = torch._C._dynamo.eval_frame
_frames.set_code_exec_strategy(
    _Hook.__call__.__code__,
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
            hook = _Hook(module is model, is_temporary)
            module.register_forward_pre_hook(hook, prepend=True)
            module.register_forward_hook(hook, prepend=True, always_call=True)


def remove_hooks(model: nn.Module) -> None:
    """Remove the hooks that `add_hooks` added to a model, or to one that it is a part of."""
    for module in model.modules():
        if thread.outermost is module:  # after Ctrl-C, for which no hook runs
            thread.outermost, thread.made = None, []
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
