"""Which calls of a BatchNorm can be made later with the same result, and what is known of them."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bn_lightning.conversion.fusable import FusableActivation
from bn_lightning.kernels.dispatch import updates_in_recomputation, uses_triton
from bn_lightning.kernels.eager import is_observed

NOTHING, ADDITION, ALL = range(3)  # what a site fuses


class CallPlan(NamedTuple):
    """What is known of the next calls of a module, if they are like an earlier one.

    Attributes:
        activation: the last operation that is fused, or None for an addition.
        is_summand: tells whether what is added before is like what was; None for no addition.
        is_alike: tells whether x is like that of the earlier call.
        tensors: the module's parameters and buffers, in that call.
        settings: of the module, in that call.
        attributes: of that `DeferredCall`, which all calls have. The module keeps the plan: it is
            not one of them.
        fields: all of `BatchNormArguments` but x and what is added.
        repeat: repeats the kernels of the call, as `find_repetition` says; None if it cannot.
    """

    activation: FusableActivation | None
    is_summand: Callable[..., bool] | None
    is_alike: Callable[..., bool]
    tensors: tuple[Tensor | None, ...]
    settings: tuple[Any, ...]
    attributes: dict[str, Any]
    fields: tuple[Any, ...]
    repeat: Callable[..., Tensor | None] | None

    def is_for(self, module: Any, x: Tensor) -> bool:
        """Return whether a call now is like the earlier one."""
        tensors = tensors_of(module)
        return (
            self.is_alike(x)
            and len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and settings_of(module) == self.settings
            and modes_for(x) == self.attributes["modes"]
            and not is_observed()
        )

    def versions(self, x: Tensor) -> list[int | None]:
        """Return `versions_of` all that a call now must not see changed."""
        return versions_of((x, *self.attributes["watched"]))


class Site:
    """What is known of a module's calls in training, or of those in evaluation.

    Attributes:
        fuses: `NOTHING`, `ADDITION` or `ALL`; less than `ALL` after an output was read twice, or if
            what followed could not be fused.
        plan: of calls like the last one, once the site is known.
        is_used: whether what followed could be fused.
        misses: number of calls after which it could not.
        first_pass: number of the first forward of the model.
        passes: number of forwards of models that returned, of all sites.
    """

    passes = 0

    def __init__(self) -> None:
        self.fuses = ALL
        self.plan: CallPlan | None = None
        self.is_used = False
        self.misses = 0
        self.first_pass: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether a whole forward showed that each output is read once, by what is fused."""
        return self.is_used and not self.misses and self._is_seen

    @property
    def _is_seen(self) -> bool:
        return self.first_pass is not None and self.first_pass < Site.passes

    def begin(self) -> bool:
        """Begin a call; return whether it may be put off."""
        if self.first_pass is None:
            self.first_pass = Site.passes
        if self.misses and not self.is_used and (self.misses > 2 or self._is_seen):
            self.fuses = NOTHING
        return self.fuses != NOTHING

    def limit(self, fuses: int) -> None:
        """Fuse no more than this from now on."""
        self.fuses, self.plan = min(self.fuses, fuses), None

    def miss(self) -> None:
        """Note that what followed a call could not be fused."""
        self.misses, self.plan = self.misses + 1, None


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
        or (updates_in_recomputation() and saved_tensors_hooks_now(True) is not None)
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


def tensors_of(module: Any) -> tuple[Tensor | None, ...]:
    """Return the parameters and buffers of a module."""
    return (*module._parameters.values(), *module._buffers.values())


NO_HOOKS: Any = ({}, {}, {})
# All that a call depends on, besides its tensors.
settings_of = operator.attrgetter(
    *("__class__", "training", "stats_frozen", "track_running_stats", "momentum", "eps"),
    *("activation", "backend", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"),
)


_version_of = operator.attrgetter("_version")


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return the numbers of changes in place."""
    try:
        return [*map(_version_of, tensors)]
    except RuntimeError:  # one is of inference mode, and has none
        return [None if t.is_inference() else t._version for t in tensors]


_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
# Non-reentrant checkpointing uses them; there is no public function for them.
saved_tensors_hooks_now = torch._C._autograd._top_saved_tensors_default_hooks


def modes_for(x: Tensor) -> tuple[Any, ...]:
    """Return gradient mode, inference mode, innermost hooks on saved tensors and stream."""
    grad = _is_grad_enabled()
    hooks = saved_tensors_hooks_now(True) if grad else None
    return grad, _is_inference_mode_enabled(), hooks, current_stream(x) if x.is_cuda else None


def current_stream(x: Tensor) -> int:
    """Return the handle of the current stream of the device of x."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)
