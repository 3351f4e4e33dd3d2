"""One call of a BatchNorm that is computed later, and what can be made of its output."""

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bn_lightning.conversion.deferrable import (
    ADDITION,
    NO_HOOKS,
    NOTHING,
    CallPlan,
    Site,
    current_stream,
    modes_for,
    saved_tensors_hooks_now,
    settings_of,
    tensors_of,
    versions_of,
)
from bn_lightning.conversion.fusable import BatchNormCall, FusableActivation
from bn_lightning.kernels.dispatch import is_recomputation
from bn_lightning.kernels.eager import TensorGuards, find_repetition, make_guard
from bn_lightning.kernels.ops import batch_norm

_next_place: Any = torch._C._autograd._get_sequence_nr
_UNCHANGED = "what a BatchNorm is computed from to stay unchanged until its output is read"


class DeferredCall(BatchNormCall):
    """One call of a module.

    Args:
        deferral: counts the calls of the module.
        site: the module's, in training or in evaluation.
        module: whose call it is.
        arguments: those of `BatchNormCall`.

    Attributes:
        is_candidate: whether the output could be fused, if only it were known to be read once.
        place: in the order of autograd, reserved for what is computed later; 0 for none.
        modes: those of torch that a computation later must have, too.
        grad: whether gradients were enabled.
        watched: parameters and statistics that must not change while they may be needed.
        versions: of x and those.
        snapshot: the values of x, if it has no version.
        blank: a tensor with the metadata of x, without memory.
        lost_updates: the errors of calls that nobody has read and whose input was changed, to be
            raised when the model returns.
    """

    lost_updates: ClassVar[list[RuntimeError]] = []

    plan: CallPlan | None = None
    is_candidate = False
    place = 0
    snapshot: Tensor | None = None

    def __init__(self, deferral: Any, site: Site, module: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.deferral, self.site, self.module = deferral, site, module
        self.modes = modes_for(self.input)
        self.grad = self.modes[0]
        self.watched = [t for t in self.state if t is not None]
        self.versions = versions_of((self.input, *self.watched))
        x = self.input
        if x.is_inference():
            self.keep_input()
        with torch.inference_mode(False):
            self.blank = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        self.blank.untyped_storage().resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(self.blank)

    @classmethod
    def planned(cls, plan: CallPlan, module: Any, x: Tensor, versions: list[int | None]) -> Self:
        """Return a call that is like an earlier one, without `snapshot`."""
        call = cls.__new__(cls)
        call.__dict__.update(plan.attributes)
        call.plan, call.module, call.input, call.versions = plan, module, x, versions
        return call

    def keep_input(self) -> None:
        """Keep the values of an input of inference mode, which has no version."""
        self.snapshot = torch._lazy_clone(self.input)  # a write to either copies

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the output has a gradient for: x, weight and bias."""
        return self.input, self.state[0], self.state[1]

    def is_current(self) -> bool:
        """Return whether an operation now is computed as right after the call."""
        return modes_for(self.input) == self.modes

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Restore gradient mode and stream of the call, without hooks on saved tensors."""
        grad, inference, _, called_on = self.modes
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if saved_tensors_hooks_now(True) is not None:
                stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
            if self.input.is_cuda and current_stream(self.input) != called_on:
                device = self.input.device
                stream = torch.cuda.ExternalStream(called_on, device=device)
                stack.callback(torch.cuda.current_stream(device).wait_stream, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def run(
        self, residual: Tensor | None = None, activation: str = "identity", slope: float = 0.01
    ) -> Tensor:
        """Compute the BatchNorm; only the first time updates statistics."""
        if self.snapshot is not None:
            if not torch._C._is_cow_tensor(self.input):  # type: ignore[attr-defined]
                self.input = self.snapshot  # because the input was written to
            self.snapshot = None
        if self.is_done:
            return super().run(residual, activation, slope)
        is_fused = residual is not None or activation != "identity"
        if is_fused:
            self.deferral.fused += 1
        else:
            self.deferral.separate += 1
        if is_fused or self.is_candidate:
            self.site.is_used = True
        else:
            self.site.miss()
        first = _next_place()
        y, plan = None, self.plan
        if plan is not None and plan.repeat and plan.fields[-2:] == (activation, slope):
            y = plan.repeat((self.input, residual, *plan.fields))
        if y is None:
            y = super().run(residual, activation, slope)
        self.is_done = True
        if self.place:
            self.place = _put_in_place(y, first, self.place)
        return y

    def plan_next(self, activation: FusableActivation | None, residual: Tensor | None) -> None:
        """Plan the calls that are like this one, which was computed.

        Args:
            activation: what was fused last.
            residual: what was fused before, or None.
        """
        site, options, tensors = self.site, self.options, tensors_of(self.module)
        if (
            not site.is_known
            or (activation is None and residual is None)
            or TensorGuards is None
            # Hooks on saved tensors are others in each forward.
            or self.modes[2] is not None
            or any(t.is_inference() or not any(t is own for own in tensors) for t in self.watched)
        ):
            return
        training = options["training"]
        fields = (
            *(*self.state, options["num_batches_tracked"] if training else None, training),
            *(options["momentum"], options["eps"]),
            *(("identity", 0.01) if activation is None else activation[:2]),
        )
        names = ("deferral", "site", "compute", "state", "options", "modes", "blank")
        repeat = None
        if self.compute is batch_norm:
            repeat = find_repetition((self.input, residual, *fields), options["backend"])
        site.plan = CallPlan(
            activation=activation,
            is_summand=None if residual is None else make_guard([residual]),
            is_alike=make_guard([self.input]),
            tensors=tensors,
            settings=settings_of(self.module)[:-3] + NO_HOOKS,
            attributes={name: self.__dict__[name] for name in (*names, "grad", "watched")},
            fields=fields,
            repeat=repeat,
        )

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the input, a parameter or a statistic was changed in place."""
        versions, before = versions_of((self.input, *self.watched)), self.versions
        if self.is_done and self.options["training"]:
            # The call itself has updated the statistics.
            count = 1 + sum(t is not None for t in self.state[:2])
            versions, before = versions[:count], before[:count]
        if versions != before:
            self.fail(f"{_UNCHANGED}, got a change in place of input, parameters or statistics")

    def fail(self, reason: str) -> NoReturn:
        """Raise an error, and compute the next calls at once."""
        self.is_done = True
        self.site.limit(NOTHING)
        raise RuntimeError(
            f"expected {reason}; call the model again, which will not defer this BatchNorm, or "
            f"convert it with fuse=False: {self.module}"
        )

    def __del__(self) -> None:
        # Nobody has read the output, but the call updates the statistics.
        if self.is_done or not self.options["training"] or self.state[2] is None:
            return
        if not sys.is_finalizing() and not is_recomputation():
            with self.as_called(), torch.no_grad():
                try:
                    self.check_unchanged()
                except RuntimeError as error:  # which nobody would see here
                    DeferredCall.lost_updates.append(error)
                else:
                    self.run()


class Value:
    """What a deferred tensor stands for: bn(x), bn(x) + residual, or an activation of these.

    Args:
        call: of the BatchNorm.
        inner: what the addition or activation was applied to. None for bn(x), and for the sum that
            an addition in place made of it, because nobody can read bn(x) any more.
        residual: what was added, or None.
        activation: what was applied last, or None.

    Attributes:
        tensor: the value, once computed.
        owner: the deferred tensor.
        outers: those that stand for an addition or activation of this value.
        place: as that of a call, of the addition or activation.
        is_shared: whether an operation used it while it could still be read; then either its owner
            has the values, or `tensor` has.
    """

    owner: "weakref.ref[Any]"
    tensor: Tensor | None = None
    outers: "tuple[weakref.ref[Any], ...]" = ()
    place = 0
    is_shared = False

    def __init__(
        self,
        call: DeferredCall,
        inner: "Value | None" = None,
        residual: Tensor | None = None,
        activation: FusableActivation | None = None,
    ) -> None:
        self.call, self.residual, self.activation = call, residual, activation
        self.inner: Any = inner
        if residual is not None:
            self.versions = versions_of((residual,))

    @property
    def is_pending(self) -> bool:
        """Whether an operation on it can still be fused."""
        return self.tensor is None and self.activation is None and not self.call.is_done

    @property
    def is_filled(self) -> bool:
        """Whether its owner has the values."""
        return self.is_shared and self.tensor is None

    @property
    def addend(self) -> Tensor | None:
        """What was added to bn(x), if anything."""
        return self.residual if self.activation is None else self.inner.residual

    def compute(self) -> Tensor:
        """Set and return `tensor`."""
        call, inner = self.call, self.inner
        with nullcontext() if call.is_current() else call.as_called():
            z: Any = None if inner is None or inner.tensor is None else unshared(inner.tensor)
            if inner is not None and z is None and (inner.is_shared or not call.site.is_known):
                z = inner.share()  # because what came before may be read again
            if z is None:
                self.tensor = self.run()
            else:
                self.check_residual()
                with torch._C.DisableTorchFunctionSubclass():
                    y = z + self.residual if self.activation is None else self.activation.apply(z)
                self._order_nodes(y)
                self.tensor = unshared(y)
        return self.tensor

    def share(self) -> Any:
        """Compute it for an operation and return it; None if nobody can read it any more.

        The owner is filled, so that gradients go through it and reach its hooks.
        """
        owner = self.owner()
        if owner is None or owner.__dict__.get("_value") is not self:
            return None  # freed, or replaced by an operation in place
        if not self.is_shared:
            self.call.is_candidate = True
            content = self.connect(owner, self.compute())
            if self.call.input.is_inference():
                self.call.keep_input()  # for what else waits for this value
            self.is_shared = True
            if not fill(owner, content):
                return unshared(content)
            self.tensor = None
        return owner

    def connect(self, owner: Tensor, content: Tensor) -> Tensor:
        """Return the content with the node of an autograd.Function that returned the owner."""
        with torch._C.DisableTorchFunctionSubclass():
            node = owner.grad_fn
            is_own = node is None or getattr(node, "value", None) is self
            return content if is_own else _Adopt.apply(owner, content)

    def compute_alone(self) -> None:
        """Compute it, because something else follows than the activation that was planned."""
        self.call.site.miss()
        if self.residual is None:
            self.call.deferral.fused -= 1
            self.call.deferral.separate += 1
        self.compute()

    def run(self) -> Tensor:
        """Compute all in one call of the BatchNorm.

        Raises:
            RuntimeError: what it depends on was changed in place.
        """
        call, activation = self.call, self.activation
        is_first = not call.is_done
        call.check_unchanged()
        (self.inner if activation else self).check_residual()
        y = call.run(self.addend, *(activation[:2] if activation else ()))
        if is_first:
            call.plan_next(activation, self.addend)
        self._order_nodes(y)
        return unshared(y)

    def _order_nodes(self, y: Tensor) -> None:
        """Give the nodes of activation and addition their places, as `_put_in_place` does."""
        node: Any = y.grad_fn if self.call.place else None
        for value in (self, self.inner):
            if value is None or node is None or node._sequence_nr() == self.call.place:
                break  # the last is that of the BatchNorm, with or without the others
            if value.place:
                node._set_sequence_nr(value.place)
            node = node.next_functions[0][0]

    def run_again(self, inputs: Sequence[Any]) -> Tensor:
        """Compute the value of other x, weight, bias and residual, without statistics."""
        if not self.call.is_done:
            self.compute()
        x, weight, bias, residual = inputs
        call = self.call
        call.check_unchanged()
        again = BatchNormCall(call.compute, x, (weight, bias, *call.state[2:]), call.options)
        again.is_done = True
        return again.run(residual, *(self.activation[:2] if self.activation else ()))

    def check_residual(self) -> None:
        """Raise a RuntimeError if what was added was changed in place."""
        if self.residual is not None and versions_of((self.residual,)) != self.versions:
            self.call.fail(f"{_UNCHANGED}, got a change in place of what was added to it")

    def note_read(self) -> None:
        """Learn from a read: of two, the next forward fuses neither."""
        if self.is_shared or (self.tensor is None and self.call.is_done):
            self.call.site.limit(NOTHING if self.residual is None else ADDITION)


def fill(tensor: Tensor, content: Tensor) -> bool:
    """Give a deferred tensor its content, unless C++ refers to it; return whether it has it."""
    if tensor._use_count() > 1:  # type: ignore[attr-defined]
        return False
    if content._use_count() > 1:  # type: ignore[attr-defined]
        content = _alias(content)
    torch._C._swap_tensor_impl(tensor, content)
    return True


def unshared(y: Tensor) -> Tensor:
    """Return a tensor as an object of its own, if hooks on saved tensors may keep the object.

    A deferred tensor takes the content of what it was computed as.
    """
    return y if saved_tensors_hooks_now(True) is None else _alias(y)


def _alias(y: Tensor) -> Tensor:
    is_inference, is_differentiable = y.is_inference(), y.requires_grad
    with torch.inference_mode(is_inference), torch.set_grad_enabled(is_differentiable):
        # Not a view, which would lose its hooks when it is changed.
        return _Adopt.apply(y, y) if is_differentiable else y.detach()


class _Adopt(torch.autograd.Function):
    """Returns values as an object of its own, with the place of another tensor in the graph."""

    @staticmethod
    def forward(ctx: Any, owner: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _put_in_place(y: Tensor, first: int, place: int) -> int:
    """Give the node of a BatchNorm the place that was reserved by its call; return its place.

    A backward takes nodes from the last place to the first. If x has three readers or more, the
    order decides the rounding of the sum of their gradients.

    Args:
        y: what was computed, a BatchNorm and perhaps an addition and an activation after it.
        first: the first place of the nodes made for that.
        place: the reserved one.
    """
    if place + 1 == first:
        return first  # it has the place already
    node: Any = y.grad_fn
    if node is None:
        return place
    last = node._sequence_nr()
    while True:
        found = [n for n, _ in node.next_functions if n and first <= n._sequence_nr() < last]
        if not found:
            break
        node = min(found, key=lambda n: n._sequence_nr())
    node._set_sequence_nr(place)
    return place
