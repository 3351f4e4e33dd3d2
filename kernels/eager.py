"""The eager path of a BatchNorm: no op, no dispatcher, and a plan for each kind of call.

Where nothing but autograd has to see a call, it goes to the launchers directly: in eager code, on
plain tensors, without a mode, a functorch transform, forward-mode differentiation or tracing. The
first call of a kind is checked and launched as anywhere else, and its launches are recorded
(launch_plan.py). Later calls of that kind compute addresses and repeat the launches.

The kind of a call, its key, is all that the checks and the launches depend on: shapes, strides,
dtypes, devices and alignment of the tensors, which of them need a gradient, and the options. The
results have the bits of those of the ops, because the same launchers chose the same kernels.

Everything else goes to the ops of ops.py, and so does the backward of a backward.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from bn_lightning.kernels.activations import saves_mask
from bn_lightning.kernels.arguments import BatchNormArguments, Forward, RunningStatistics
from bn_lightning.kernels.autograd import (
    SavedOptions,
    SavedTensors,
    compute_gradients,
    unpack_backward,
)
from bn_lightning.kernels.launch_plan import LaunchPlan, make_plan, recorded
from bn_lightning.kernels.layout import as_layout
from bn_lightning.kernels.schedule import forced

# A training run has tens of kinds of calls. One whose shapes always change must not fill the memory
# with plans, of a few kilobytes each.
MAX_PLANS = 1024

_PLAIN_TYPES = (Tensor, Parameter)
# Triton compiles other code for an address that is a multiple of 16.
_MISALIGNED = 15

# Private, because torch has no public functions that tell.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


class Call(NamedTuple):
    """A call that may take the eager path.

    Attributes:
        key: its kind.
        addresses: of the tensors that are not None, in the order of `BatchNormArguments`; without
            that of a residual that is x itself.
    """

    key: tuple[Any, ...]
    addresses: tuple[int, ...]


def is_observed() -> bool:
    """Return whether more than autograd has to see the operations on plain tensors."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transforms_are_active()
        or forward_ad._current_level >= 0
        or _is_tracing()
    )


def find_call(a: BatchNormArguments, backend: str) -> Call | None:
    """Return the call that `a` describes, or None if it has to take another path.

    Args:
        a: the arguments, not checked.
        backend: as given to `batch_norm`.
    """
    if torch.compiler.is_compiling() or backend == "native":
        return None
    x, residual, *channels, training, momentum, eps, activation, negative_slope = a
    if type(x) not in _PLAIN_TYPES or (backend == "auto" and not x.is_cuda) or is_observed():
        return None
    try:
        if x.is_neg():
            return None
        options = (backend, training, momentum, eps, activation, negative_slope, forced())
        of_x = (torch.is_grad_enabled(), x.requires_grad, x.shape, x.stride(), x.dtype, x.device)
        key = [*options, *of_x]
        address = bits = x.data_ptr()
        addresses = [address]
        if residual is None:
            key.append(None)
        else:
            if type(residual) not in _PLAIN_TYPES or residual.is_neg():
                return None
            other = residual.data_ptr()
            key += (residual.requires_grad, residual.shape, residual.stride(), residual.device)
            key.append(other == address)
            if other != address:
                addresses.append(other)
                bits |= other
        for value in channels:
            if value is None:
                key.append(None)
                continue
            if type(value) not in _PLAIN_TYPES or not value.is_contiguous():
                return None
            key += (value.requires_grad, value.numel(), value.dtype, value.get_device())
            address = value.data_ptr()
            addresses.append(address)
            bits |= address
    except RuntimeError:
        # A tensor without memory: a sparse one, or one of a functorch transform that has ended.
        return None
    if 0 in addresses:
        return None
    key.append(tuple([v & _MISALIGNED for v in addresses]) if bits & _MISALIGNED else None)
    return Call(tuple(key), tuple(addresses))


class Plan:
    """What is known of the calls of one kind, and how to run them.

    Args:
        a: the arguments of the first call, which were checked.
    """

    def __init__(self, a: BatchNormArguments) -> None:
        has_residual = a.residual is not None
        self.options = SavedOptions.of(a)
        self.needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in a.inputs)
        self.saved = SavedTensors.of(a, tuple(t is not None and t.requires_grad for t in a[:4]))
        self.writes_mask = self.needs_gradient and saves_mask(a.activation, has_residual)
        self.is_identity = a.activation == "identity"
        self.x_strides = a.x.stride()
        self.C = a.x.shape[1]
        self.mask_bytes = (a.x.numel() + 7) // 8
        # Of torch's functions, `new_empty` of a tensor makes another in the least time.
        self.new_floats = a.x.new_empty(0, dtype=torch.float32).new_empty
        self.new_bytes = a.x.new_empty(0, dtype=torch.uint8).new_empty
        self.is_recorded = False
        # How to repeat the launches; None if only Triton itself can.
        self.forward: LaunchPlan | None = None
        # The same for each choice of the gradients that are needed.
        self.backwards: dict[tuple[bool, ...], LaunchPlan | None] = {}


# In place of a plan: ATen computes these calls.
NATIVE: Any = object()

_plans: dict[tuple[Any, ...], Plan] = {}


def find_plan(call: Call) -> Plan | None:
    """Return the plan of a call, or None for the first call of its kind."""
    return _plans.get(call.key)


def keep_plan(call: Call, plan: Plan) -> None:
    """Keep the plan of a call, and at most `MAX_PLANS`: the one that was kept first goes."""
    while len(_plans) >= MAX_PLANS:
        # Another thread may have removed it.
        _plans.pop(next(iter(_plans)), None)
    _plans[call.key] = plan


def run_plan(plan: Plan, a: BatchNormArguments, addresses: tuple[int, ...]) -> Tensor:
    """Run a call.

    Args:
        plan: of the call.
        a: its arguments.
        addresses: of its tensors, as in `Call`.
    """
    if plan.needs_gradient:
        return _apply(a.x, a.residual, a.weight, a.bias, plan, a, addresses)
    return _forward(plan, a, addresses)[0]


def _forward(
    plan: Plan, a: BatchNormArguments, addresses: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return y, and the mask, mean and rstd if the gradient needs them."""
    launches = plan.forward
    if launches is None or launches.is_observed():
        return _launch_forward(plan, a)
    y = torch.empty_like(a.x)
    if not plan.needs_gradient:
        mask = mean = rstd = None
        launches.launch((*addresses, y.data_ptr()))
    else:
        mean, rstd = plan.new_floats(plan.C), plan.new_floats(plan.C)
        if plan.writes_mask:
            mask = plan.new_bytes(plan.mask_bytes)
            addresses = (*addresses, y.data_ptr(), mask.data_ptr())
        else:
            mask = None
            addresses = (*addresses, y.data_ptr())
        launches.launch((*addresses, mean.data_ptr(), rstd.data_ptr()))
    if a.training:
        written = (a.running_mean, a.running_var, a.num_batches_tracked)
        increment_version([v for v in written if v is not None])
    return y, mask, mean, rstd


def _launch_forward(
    plan: Plan, a: BatchNormArguments
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the same by launches of Triton itself, and record them if they were not before."""
    from bn_lightning.kernels.launch import run_forward

    momentum = a.momentum if a.running_mean is not None else 0.0
    running = RunningStatistics(a.running_mean, a.running_var, a.num_batches_tracked, momentum)
    call = Forward(
        a.x, a.residual, a.weight, a.bias, a.activation, a.negative_slope, plan.writes_mask
    )
    with recorded() as recording:
        results = run_forward(call, running, a.eps, training=a.training)
    if not plan.is_recorded:
        is_x = a.residual is not None and a.residual.data_ptr() == a.x.data_ptr()
        given = (a.x, None if is_x else a.residual, *a[2:7])
        plan.forward = make_plan(recording, given, results[: 4 if plan.needs_gradient else 1])
        plan.is_recorded = True
    return results


class _EagerBatchNorm(torch.autograd.Function):
    """A call with its gradient; it saves what `BatchNormFunction` does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, residual, weight, bias, plan, a, addresses = arguments
        y, mask, mean, rstd = _forward(plan, a, addresses)
        ctx.set_materialize_grads(False)
        saved = plan.saved
        tensors = (
            x if saved.x else None,
            residual if saved.residual else None,
            y if saved.y else None,
            mask,
            mean,
            rstd,
            weight,
            bias if saved.bias else None,
        )
        ctx.save_for_backward(*tensors)
        ctx.plan = plan
        ctx.options = plan.options
        ctx.addresses = [t.data_ptr() for t in tensors if t is not None]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_plain(dy):
            op = torch.ops.bn_lightning.batch_norm_backward
            return (*compute_gradients(ctx, dy, op), None, None, None)
        plan: Plan = ctx.plan
        needs = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors
        if plan.options.channels_last:
            dense_dy = dy if dy.stride() == plan.x_strides else as_layout(dy, True)
        else:
            dense_dy = dy.contiguous()
        addresses = [t.data_ptr() for t in saved if t is not None]
        # Hooks of saved tensors may return others, of other strides.
        is_planned = addresses == ctx.addresses and not dense_dy.data_ptr() & _MISALIGNED
        launches = plan.backwards.get(needs) if is_planned else None
        if launches is None or launches.is_observed():
            run = partial(_launch_backward, plan, needs if is_planned else None, dense_dy)
            return (*compute_gradients(ctx, dy, run, saved), None, None, None)
        dx, dresidual, dweight, dbias = _repeat_backward(plan, launches, needs, dense_dy, addresses)
        if needs[1] and plan.is_identity:
            dresidual = dy
        return dx, dresidual, dweight, dbias, None, None, None


# What `Function.apply` calls after a look for functorch transforms, which takes most of its time.
_apply = super(torch.autograd.Function, _EagerBatchNorm).apply


def _is_plain(dy: Any) -> bool:
    return type(dy) in _PLAIN_TYPES and not is_observed() and not dy.is_neg()


def _launch_backward(
    plan: Plan, needs: tuple[bool, ...] | None, dense_dy: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """Return what the op `batch_norm_backward` does, and record the launches for `needs`."""
    from bn_lightning.kernels.launch import run_backward

    call, wanted, _ = unpack_backward(*arguments)
    call = call._replace(dy=dense_dy)
    with recorded() as recording:
        dx, dresidual, dweight, dbias = results = run_backward(call, wanted)
    if needs is not None and needs not in plan.backwards:
        tensors = (v for v in call if isinstance(v, Tensor))
        plan.backwards[needs] = make_plan(recording, tensors, results)
    return dx, dweight, dbias, dresidual


def _repeat_backward(
    plan: Plan, launches: LaunchPlan, needs: tuple[bool, ...], dy: Tensor, saved: list[int]
) -> tuple[Tensor | None, ...]:
    """Return dx, dresidual, dweight and dbias, each None if it is not needed or is dy."""
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = needs
    dx = dresidual = dweight = dbias = None
    addresses = [dy.data_ptr(), *saved]
    if needs_dx:
        dx = torch.empty_like(dy)
        addresses.append(dx.data_ptr())
    if needs_dresidual and not plan.is_identity:
        dresidual = torch.empty_like(dy)
        addresses.append(dresidual.data_ptr())
    if needs_dweight or needs_dbias:
        dweight, dbias = plan.new_floats(plan.C), plan.new_floats(plan.C)
        addresses += (dweight.data_ptr(), dbias.data_ptr())
    launches.launch(tuple(addresses))
    if dweight is not None and dbias is not None:
        weight_dtype, bias_dtype = plan.options.weight_dtype, plan.options.bias_dtype
        dweight = dweight.to(weight_dtype) if needs_dweight else None
        dbias = dbias.to(bias_dtype) if needs_dbias else None
    return dx, dresidual, dweight, dbias
