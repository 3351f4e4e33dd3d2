"""The eager path of a BatchNorm: no op, no dispatcher, and a plan for each kind of call.

Where nothing but autograd has to see a call, it goes to the launchers directly: in eager code, on
plain tensors, without a mode, a functorch transform, forward-mode differentiation or tracing. The
first call of a kind is checked and launched as anywhere else, and its launches are recorded
(launch_plan.py). Later calls of that kind compute addresses and repeat the launches.

Calls are of one kind if all is equal that the checks and the launches depend on: the options, and
of the tensors the shapes, strides, dtypes, devices, alignment, and which need a gradient. The
results have the bits of those of the ops, because the same launchers chose the same kernels.

Everything else goes to the ops of ops.py, and so does the backward of a backward.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from bn_lightning.kernels.activations import saves_mask
from bn_lightning.kernels.arguments import BatchNormArguments, Forward, RunningStatistics
from bn_lightning.kernels.autograd import (
    Packing,
    SavedOptions,
    SavedTensors,
    compute_gradients,
    pack_statistics,
    unpack_backward,
)
from bn_lightning.kernels.launch_plan import (
    LaunchPlan,
    Result,
    make_plan,
    picker,
    places_of,
    recorded,
)
from bn_lightning.kernels.layout import as_layout, mask_shape
from bn_lightning.kernels.schedule import forced

# Private, because torch has no public functions that tell. Without them all calls take the ops.
try:
    from torch._C import (
        _are_functorch_transforms_active,
        _current_graph_task_id,
        _increment_version,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

# A training run has tens of kinds of calls. A program whose shapes always change must not fill the
# memory with plans, of a few kilobytes each. What came first goes first.
MAX_SHAPES = 512
# Plans for calls whose shapes and options are the same; they are tried one after another.
MAX_PLANS_PER_SHAPE = 8

_PLAIN_TYPES = (Tensor, Parameter)
# Triton compiles other code for an address that is a multiple of 16.
_MISALIGNED = 15
# Names of this module are found in less time than attributes.
_grad_mode = torch.is_grad_enabled
_reduce, _or = functools.reduce, operator.or_
_data_ptr = Tensor.data_ptr


def make_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return what tells whether other tensors are like these.

    It compares types, shapes, strides, dtypes, devices, `requires_grad`, and the dispatch keys,
    which functorch transforms, tracing, autocast and lazy negation change. One tensor that is
    passed twice is never alike.
    """
    # No dimension is dynamic.
    sizes: Any = [[*t.shape] for t in tensors]
    strides: Any = [[*t.stride()] for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def misalignment_of(addresses: Sequence[int]) -> tuple[int, ...] | None:
    """Return how far the addresses are past aligned ones; None if all are aligned."""
    if not _reduce(_or, addresses) & _MISALIGNED:
        return None
    return tuple([address & _MISALIGNED for address in addresses])


def make_room(cache: dict[Any, Any], most: int) -> None:
    """Remove from a cache with `most` entries or more what came first."""
    while len(cache) >= most:
        # Another thread may have removed it.
        cache.pop(next(iter(cache)), None)


class _PlannedBackward(NamedTuple):
    """A backward that was recorded.

    Attributes:
        is_alike: whether dy, in the layout of x, and the saved tensors are like the recorded ones.
        misalignment: of those.
        launches: how to repeat the launches.
        pick: picks what `backward` returns from the results of the launches, dy and None.
    """

    is_alike: Callable[..., bool]
    misalignment: tuple[int, ...] | None
    launches: LaunchPlan
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]


class Plan:
    """The calls of one kind, and how to run them.

    Args:
        a: the arguments of the first call, which were checked.
        is_native: ATen computes these calls.

    Attributes:
        forward: how to repeat the launches of the forward; None if only Triton itself can.
        backwards: the same for the backward, for each choice of the gradients that are needed.
        saved: which of x, residual, y, the packed statistics, weight and bias are saved.
    """

    def __init__(self, a: BatchNormArguments, is_native: bool = False) -> None:
        given = [place for place, t in enumerate(a[:7]) if t is not None]
        self.pick_given = picker(given)
        absent = [place for place in range(7) if place not in given]
        self.pick_absent, self.nones = picker(absent), (None,) * len(absent)
        tensors = self.pick_given(a)
        self.is_alike = make_guard(tensors)
        self.misalignment = misalignment_of([*map(_data_ptr, tensors)])
        self.is_native = is_native
        self.options = SavedOptions.of(a)
        self.needs_gradient = _grad_mode() and any(t.requires_grad for t in a.inputs)
        saves = SavedTensors.of(a, tuple(t is not None and t.requires_grad for t in a[:4]))
        kept = (
            saves.x,
            saves.residual,
            saves.y,
            True,
            a.weight is not None,
            saves.bias and a.bias is not None,
        )
        self.saved = [place for place, is_saved in enumerate(kept) if is_saved]
        self.pick_saved = picker(self.saved)
        has_residual = a.residual is not None
        self.writes_mask = self.needs_gradient and saves_mask(a.activation, has_residual)
        # The last of the tensors are updated in place.
        self.updates = len([t for t in a[4:7] if t is not None]) if a.training else 0
        self.is_identity = a.activation == "identity"
        mask_bytes = math.prod(mask_shape(a.x.shape, self.options.channels_last))
        self.packing = Packing.of(a.x.shape[1], mask_bytes if self.writes_mask else 0)
        # Whether dweight or dbias is not fp32. `to` takes its time even if it changes nothing.
        self.casts = not {*self.options[-2:]} <= {None, torch.float32}
        self.is_recorded = False
        self.forward: LaunchPlan | None = None
        self.backwards: dict[tuple[bool, ...], _PlannedBackward] = {}

    def results_like(self, y: Tensor, mask: Tensor | None, mean: Any, rstd: Any) -> list[Result]:
        """Return what a repetition of the forward allocates for these results."""
        if not self.needs_gradient:
            return [Result.like(y)]
        numel, begins = self.packing.numel, (0, self.packing.rstd, self.packing.mask)
        parts = [
            (tensor, 4 * begin)
            for tensor, begin in zip((mean, rstd, mask), begins, strict=True)
            if tensor is not None
        ]
        return [Result.like(y), Result((numel,), (1,), torch.float32, tuple(parts))]


# In place of a result: ATen computes this kind of calls.
NATIVE: Any = object()

_plans: dict[tuple[Any, ...], list[Plan]] = {}


def _key(fields: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    """Return what is hashed of a call; a plan compares the rest."""
    return (backend, forced(), _grad_mode(), fields[0].shape, fields[7:])


def run_known(fields: tuple[Any, ...], backend: str, *, recomputes: bool = False) -> Any:
    """Run a call of a kind that was seen before, in code that is not compiled.

    Args:
        fields: those of `BatchNormArguments`, not checked.
        backend: as given to `batch_norm`.
        recomputes: whether activation checkpointing may run this call in a backward pass.

    Returns:
        y; None if the kind is not known, or if more than autograd has to see the call; or `NATIVE`.
    """
    x = fields[0]
    if type(x) not in _PLAIN_TYPES or backend == "native" or (backend == "auto" and not x.is_cuda):
        return None
    plans = _plans.get(_key(fields, backend))
    if (
        plans is None
        or _is_watched()
        or (fields[7] and not recomputes and _current_graph_task_id() != -1)
    ):
        return None
    for plan in plans:
        y = _run_if_alike(plan, fields)
        if y is not None:
            return y
    return None


def _run_if_alike(plan: Plan, fields: tuple[Any, ...]) -> Any:
    """Return what `run_known` returns, if a plan is of a call's tensors; None if it is not."""
    tensors = plan.pick_given(fields)
    if plan.is_alike(*tensors) and plan.pick_absent(fields) == plan.nones:
        addresses = tuple(map(_data_ptr, tensors))
        if misalignment_of(addresses) == plan.misalignment:
            return NATIVE if plan.is_native else run_plan(plan, fields, tensors, addresses)
    return None


def find_repetition(
    fields: tuple[Any, ...], backend: str
) -> Callable[[tuple[Any, ...]], Tensor | None] | None:
    """Return what runs the calls of one place in a program without a search for their plan.

    Args:
        fields: of a call that was just computed, as for `run_known`.
        backend: as for `run_known`.

    Returns:
        A function of fields that differ in tensors alone, in code that only autograd has to see,
        with the same gradient mode. It returns y, or None if the tensors are of another kind.
        None if no plan computed the call.
    """
    regime = forced()
    for plan in _plans.get(_key(fields, backend), ()):
        if not plan.is_native and plan.is_alike(*plan.pick_given(fields)):
            break
    else:
        return None

    def repeat(fields: tuple[Any, ...]) -> Tensor | None:
        if forced() != regime or (fields[7] and _current_graph_task_id() != -1):
            return None
        return _run_if_alike(plan, fields)

    return repeat


def keep_plan(a: BatchNormArguments, backend: str, is_native: bool) -> Plan | None:
    """Return a new plan for a call that was checked, or None if it has to take the ops.

    Tensors that share memory need a plan each time: it is not kept.
    """
    tensors = [t for t in a[:7] if t is not None]
    if TensorGuards is None or not all(type(t) in _PLAIN_TYPES for t in tensors):
        return None
    if is_observed() or not all(map(has_memory, tensors)):
        return None
    plan = Plan(a, is_native)
    if len({t.data_ptr() for t in tensors}) == len(tensors):
        key = _key(a, backend)
        # Another thread may take away what is there.
        if key not in _plans:
            make_room(_plans, MAX_SHAPES)
        _plans[key] = [plan, *_plans.get(key, ())][:MAX_PLANS_PER_SHAPE]
    return plan


def is_observed() -> bool:
    """Return whether more than autograd has to see the operations on plain tensors."""
    return _is_watched() or bool(_are_functorch_transforms_active() or _is_tracing())


def _is_watched() -> bool:
    """Return whether a mode or forward-mode differentiation is active, which no guard notices."""
    return bool(
        _len_torch_dispatch_stack() or _len_torch_function_stack() or forward_ad._current_level >= 0
    )


def run_plan(
    plan: Plan, fields: tuple[Any, ...], tensors: tuple[Tensor, ...], addresses: tuple[int, ...]
) -> Tensor:
    """Run a call.

    Args:
        plan: of the call.
        fields: those of `BatchNormArguments`.
        tensors: those of the fields that are not None.
        addresses: of the tensors.
    """
    if plan.needs_gradient:
        return _apply(*fields[:4], (plan, fields, tensors, addresses))
    launches = plan.forward
    if launches is None or launches.is_observed():
        return _launch_forward(plan, fields)[0]
    (y,) = launches.launch(addresses)
    if plan.updates:
        _increment_version(tensors[-plan.updates :])
    return y


def _launch_forward(plan: Plan, fields: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Any, Any]:
    """Return y, the mask, mean and rstd by launches of Triton itself, and record them once."""
    from bn_lightning.kernels.launch import run_forward

    a = BatchNormArguments._make(fields)
    momentum = a.momentum if a.running_mean is not None else 0.0
    running = RunningStatistics(a.running_mean, a.running_var, a.num_batches_tracked, momentum)
    call = Forward(
        a.x, a.residual, a.weight, a.bias, a.activation, a.negative_slope, plan.writes_mask
    )
    with recorded() as recording:
        results = run_forward(
            call, running, a.eps, training=a.training, keeps_statistics=plan.needs_gradient
        )
    if not plan.is_recorded:
        plan.is_recorded = True
        plan.forward = make_plan(recording, a[:7], plan.results_like(*results))
    return results


class _EagerBatchNorm(torch.autograd.Function):
    """A call with its gradient; it saves what `BatchNormFunction` does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, residual, weight, bias, (plan, fields, tensors, addresses) = arguments
        launches = plan.forward
        if launches is None or launches.is_observed():
            y, mask, mean, rstd = _launch_forward(plan, fields)
            packed = pack_statistics(mean, rstd, mask)
        else:
            y, packed = launches.launch(addresses)
            if plan.updates:
                _increment_version(tensors[-plan.updates :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*plan.pick_saved((x, residual, y, packed, weight, bias)))
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        if is_compiling() or _grad_mode() or type(dy) not in _PLAIN_TYPES or _is_watched():
            op = torch.ops.bn_lightning.batch_norm_backward
            saved = _spread(plan, ctx.saved_tensors)
            return (*compute_gradients(plan.options, ctx, dy, op, saved), None)
        needs, tensors = ctx.needs_input_grad[:4], [dy, *ctx.saved_tensors]
        planned = plan.backwards.get(needs)
        if planned is not None and not planned.launches.is_observed():
            is_alike = planned.is_alike(*tensors)
            if not is_alike:
                tensors[0] = as_layout(dy, plan.options.channels_last)
                is_alike = planned.is_alike(*tensors)
            addresses = [*map(_data_ptr, tensors)]
            if is_alike and misalignment_of(addresses) == planned.misalignment:
                gradients = planned.pick((*planned.launches.launch(addresses), dy, None))
                return _as_parameters(plan, *gradients) if plan.casts else gradients
        run: Any = torch.ops.bn_lightning.batch_norm_backward
        if not is_observed() and all(map(has_memory, tensors)):
            run = functools.partial(_launch_backward, plan, needs, tensors[1:])
        saved = _spread(plan, tensors[1:])
        return (*compute_gradients(plan.options, ctx, dy, run, saved), None)


# What `Function.apply` calls after a look for functorch transforms, which takes most of its time.
_apply = super(torch.autograd.Function, _EagerBatchNorm).apply


def _spread(plan: Plan, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """Return x, residual, y, the packed statistics, weight and bias, None for what is not saved."""
    found = dict(zip(plan.saved, saved, strict=True))
    return [found.get(place) for place in range(6)]


def has_memory(tensor: Tensor) -> bool:
    """Return whether a plain tensor is what its memory holds."""
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor._is_zerotensor():
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        # That of a functorch transform that has ended.
        return False


def _launch_backward(
    plan: Plan, needs: tuple[bool, ...], saved: list[Tensor], *arguments: Any
) -> tuple[Tensor | None, ...]:
    """Return what the op `batch_norm_backward` does, and record the launches for `needs`."""
    from bn_lightning.kernels.launch import run_backward

    call, wanted, _ = unpack_backward(*arguments)
    call = call._replace(dy=as_layout(call.dy, call.channels_last))
    with recorded() as recording:
        dx, dresidual, dweight, dbias = results = run_backward(call, wanted)
    if plan.forward is not None and needs not in plan.backwards:
        tensors = [call.dy, *saved]
        allocated = [Result.like(r) for r in results if r is not None]
        launches = make_plan(recording, tensors, allocated)
        if launches is not None:
            # In front of None, which is last, is dy: the gradient of a residual without activation.
            places = [
                place if is_needed else -1
                for place, is_needed in zip(places_of(results), needs, strict=True)
            ]
            if needs[1] and plan.is_identity:
                places[1] = -2
            plan.backwards[needs] = _PlannedBackward(
                make_guard(tensors),
                misalignment_of([t.data_ptr() for t in tensors]),
                launches,
                picker([*places, -1]),
            )
    return dx, dweight, dbias, dresidual


def _as_parameters(plan: Plan, dx: Any, dresidual: Any, dweight: Any, dbias: Any, _: None) -> Any:
    """Return the same, with dweight and dbias in the dtypes of weight and bias."""
    weight_dtype, bias_dtype = plan.options[-2:]
    dweight = None if dweight is None else dweight.to(weight_dtype)
    dbias = None if dbias is None else dbias.to(bias_dtype)
    return dx, dresidual, dweight, dbias, None
