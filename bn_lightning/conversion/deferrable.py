"""Which calls of a BatchNorm can be made later with the same result."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bn_lightning.conversion.deferred_call import (
    NOTHING,
    CallPlan,
    Site,
    modes_for,
    saved_tensors_hooks_now,
)
from bn_lightning.kernels.dispatch import updates_in_recomputation, uses_triton


def may_wait(
    module: Any, input: Tensor, state: tuple[Tensor | None, ...], options: dict[str, Any]
) -> bool:
    """Return whether a call can be made later with the same result."""
    if (
        type(input) is not Tensor
        or _is_needed_early(module)
        # So does reentrant checkpointing, which must not return a tensor without values.
        or (options["training"] and not torch.is_grad_enabled())
        # What is computed after a checkpointed part is not run again with it.
        or (updates_in_recomputation() and saved_tensors_hooks_now() is not None)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not input.is_floating_point()
        or input.layout is not torch.strided
    ):
        return False
    channels, known = input.shape[1], state[0] if state[0] is not None else state[2]
    if known is not None and (
        known.shape[0] != channels or known.device != input.device or known.is_inference()
    ):
        return False
    if options["backend"] == "triton":
        uses_triton(input, "triton")  # raises for a tensor that the kernels do not support
    return input.numel() > channels and (
        input.is_contiguous()
        or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    )


def _is_needed_early(module: Any) -> bool:
    """Return whether hooks need the output, or FSDP frees the weight before it may be read."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (
            "_is_fsdp_managed_module" in module.__dict__
            # Another one during the forward, unless FSDP ignores it.
            and module._parameters.get("weight") is not module.deferral.weight
        )
    )


def planned(
    site: Site, module: Any, x: Tensor, state: tuple[Tensor | None, ...]
) -> CallPlan | None:
    """Return the plan of the site if it is one for this call, which may wait then."""
    plan = site.plan
    if plan is None or site.misses or site.fuses == NOTHING:
        return None
    given = (x, *state)
    if (
        type(x) is not Tensor
        or [t is None for t in given] != plan.missing
        or not plan.is_alike(*[t for t in given if t is not None])
    ):
        site.plan = None
        return None
    is_other = (
        modes_for(x) != plan.modes
        or _is_needed_early(module)
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )
    return None if is_other else plan
