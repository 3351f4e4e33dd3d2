"""One call of a BatchNorm that is computed later, and what can be made of its output."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bn_lightning.conversion.fusable import BatchNormCall, FusableActivation
from bn_lightning.kernels.dispatch import is_recomputation
from bn_lightning.kernels.eager import TensorGuards, make_guard

NOTHING, ADDITION, ALL = range(3)  # what a site fuses
_UNCHANGED = "what a BatchNorm is computed from to stay unchanged until its output is read"


class CallPlan(NamedTuple):
    """What is known of a call if it is like an earlier one: it may be put off.

    Attributes:
        activation: the one that always follows directly, so that it can be computed before it is
            called; None if an addition comes before.
        missing: which of x, parameters and statistics the earlier call did not have.
        is_alike: tells whether tensors are like those that it had.
        modes: of torch, in that call.
    """

    activation: FusableActivation | None
    missing: list[bool]
    is_alike: Callable[..., bool]
    modes: tuple[Any, ...]


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
        blank: a tensor without memory, with the metadata of the last output.
    """

    passes = 0

    def __init__(self) -> None:
        self.fuses = ALL
        self.plan: CallPlan | None = None
        self.is_used = False
        self.misses = 0
        self.first_pass: int | None = None
        self.blank: Tensor | None = None

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


class DeferredCall(BatchNormCall):
    """One call of a module.

    Args:
        deferral: counts the calls of the module.
        site: the module's, in training or in evaluation.
        arguments: those of `BatchNormCall`.

    Attributes:
        is_candidate: whether the output could be fused, if only it were known to be read once.
        place: in the order of autograd, reserved for what is computed later; 0 for none.
        modes: those of torch that a computation later must have, too.
    """

    is_candidate = False
    place = 0
    snapshot: Tensor | None = None

    def __init__(self, deferral: Any, site: Site, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.deferral, self.site = deferral, site
        self.modes = modes_for(self.input)
        self.watched = (self.input, *self.state)
        self.versions = versions_of(self.watched)
        if self.input.is_inference():
            # It has no version. A lazy clone keeps its values, because a write to either copies.
            self.snapshot = torch._lazy_clone(self.input)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the output has a gradient for: x, weight and bias."""
        return self.input, self.state[0], self.state[1]

    @property
    def grad(self) -> bool:
        """Whether gradients were enabled."""
        return bool(self.modes[0])

    def is_current(self) -> bool:
        """Return whether an operation now is computed as right after the call."""
        return modes_for(self.input) == self.modes

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Restore gradient mode and stream of the call, without hooks on saved tensors."""
        grad, inference, _, called_on = self.modes
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled() is not inference:
                stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if grad:
                stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
            if _current_stream(self.input) != called_on:
                device = self.input.device
                stream = torch.cuda.ExternalStream(called_on, device=device)
                stack.callback(torch.cuda.current_stream(device).wait_stream, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def reserve_place(self) -> None:
        """Reserve the place in the order of autograd that an operation would have now."""
        self.place = torch._C._functions.UndefinedGrad()._sequence_nr()  # type: ignore[attr-defined]

    def run(
        self, residual: Tensor | None = None, activation: str = "identity", slope: float = 0.01
    ) -> Tensor:
        """Compute the BatchNorm; only the first time updates statistics."""
        if self.is_done:
            return super().run(residual, activation, slope)
        if residual is not None or activation != "identity":
            self.deferral.fused += 1
            self.site.is_used = True
        else:
            self.deferral.separate += 1
            if self.is_candidate:
                self.site.is_used = True
            else:
                self.site.misses += 1
        if self.snapshot is not None:
            if not torch._C._is_cow_tensor(self.input):  # type: ignore[attr-defined]
                self.input = self.snapshot  # because the input was written to
            self.snapshot = None
        first = torch._C._autograd._get_sequence_nr() if self.place else 0
        y = super().run(residual, activation, slope)
        if self.place and y.grad_fn is not None and self.place + 1 < first:
            _put_in_place(y.grad_fn, first, self.place)
        return y

    def plan_next(self, activation: FusableActivation | None) -> None:
        """Plan the calls that are like this one."""
        site = self.site
        if site.plan is not None or not site.is_known or self.is_done or TensorGuards is None:
            return
        # Hooks on saved tensors are others in each forward; an inference tensor has no version.
        if self.modes[2] is None and not self.input.is_inference():
            missing = [t is None for t in self.watched]
            is_alike = make_guard([t for t in self.watched if t is not None])
            site.plan = CallPlan(activation, missing, is_alike, self.modes)

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the input, a parameter or a statistic was changed in place."""
        # Once done, the call itself has updated the statistics.
        count = 3 if self.is_done and self.options["training"] else None
        if versions_of(self.watched[:count]) != self.versions[:count]:
            self.fail(f"{_UNCHANGED}, got a change in place of input, parameters or statistics")

    def fail(self, reason: str) -> NoReturn:
        """Raise an error, and compute the next calls at once."""
        self.is_done = True
        self.site.fuses = NOTHING
        module = self.compute.__self__  # type: ignore[attr-defined]
        raise RuntimeError(
            f"expected {reason}; call the model again, which will not defer this BatchNorm, or "
            f"convert it with fuse=False: {module}"
        )

    def __del__(self) -> None:
        # Nobody has read the output, but the call updates the statistics.
        if self.is_done or not self.options["training"] or self.state[2] is None:
            return
        if not sys.is_finalizing() and not is_recomputation():
            with self.as_called(), torch.no_grad():
                self.check_unchanged()
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
        is_shared: whether an operation on it used its value while it could still be read.
    """

    owner: "weakref.ref[Any]"
    tensor: Tensor | None = None
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
    def addend(self) -> Tensor | None:
        """What was added to bn(x), if anything."""
        return self.residual if self.activation is None else self.inner.residual

    def compute(self) -> Tensor:
        """Set and return `tensor`."""
        call, inner = self.call, self.inner
        with ExitStack() as stack:
            if not call.is_current():
                stack.enter_context(call.as_called())
            # While it is not known whether what came before is read again, compute that first.
            is_read_again = inner is not None and inner.owner() is not None
            if is_read_again and inner.tensor is None and not call.site.is_known:
                call.is_candidate = True
                inner.compute()
                inner.is_shared = True
            if inner is None or inner.tensor is None:
                self.tensor = self.run()
            elif self.activation is not None:
                self.tensor = self.activation.apply(inner.tensor)
            else:
                self.check_residual()
                self.tensor = self.inner.tensor + self.residual
        return self.tensor

    def run(self) -> Tensor:
        """Compute all in one call of the BatchNorm.

        Raises:
            RuntimeError: what it depends on was changed in place.
        """
        self.call.check_unchanged()
        self.call.plan_next(self.activation if self.addend is None else None)
        if self.activation is None:
            self.check_residual()
            return self.call.run(self.residual)
        self.inner.check_residual()
        return self.call.run(self.addend, self.activation.name, self.activation.slope)

    def run_again(self, inputs: Sequence[Any]) -> Tensor:
        """Compute the value of other x, weight, bias and residual, without statistics."""
        if self.tensor is None:
            self.compute()
        x, weight, bias, residual = inputs
        call = self.call
        call.check_unchanged()
        again = BatchNormCall(call.compute, x, (weight, bias, *call.state[2:]), call.options)
        again.is_done = True
        if self.activation is None:
            return again.run(residual)
        return again.run(residual, self.activation.name, self.activation.slope)

    def check_residual(self) -> None:
        """Raise a RuntimeError if what was added was changed in place."""
        if self.residual is not None and versions_of((self.residual,)) != self.versions:
            self.call.fail(f"{_UNCHANGED}, got a change in place of what was added to it")

    def note_read(self, is_use: bool) -> None:
        """Learn from a read: of two, the next forward fuses neither."""
        was_fused = self.tensor is None and self.call.is_done
        if was_fused or (self.is_shared and is_use):
            site = self.call.site
            site.fuses = NOTHING if self.residual is None else min(site.fuses, ADDITION)
        self.is_shared = False


class Ahead:
    """What a deferred tensor stands for if the activation of it is computed.

    Attributes:
        result: the activation, until it is called.
        arguments: those of `DeferredCall`.
        versions: of x, parameters and statistics, before the call.
        modes: of torch, in the call.
        activation: the one that `result` is of.
    """

    def __init__(
        self,
        result: Tensor,
        arguments: tuple[Any, ...],
        versions: list[int | None],
        plan: CallPlan,
    ) -> None:
        self.result: Tensor | None = result
        self.arguments, self.versions, self.modes = arguments, versions, plan.modes
        self.activation: Any = plan.activation

    def to_value(self) -> Value:
        """Return what it stands for if another operation reads it, or a second one."""
        call = DeferredCall(*self.arguments)
        call.modes, call.versions, call.is_done = self.modes, self.versions, True
        value = Value(call)
        if self.result is not None:
            call.site.plan = None
            call.site.misses += 1
            call.deferral.fused -= 1
            call.deferral.separate += 1
            value.compute()
        return value


def _put_in_place(node: Any, first: int, place: int) -> None:
    """Give the node of a BatchNorm the place that was reserved by its call.

    A backward takes nodes from the last place to the first. If x has three readers or more, the
    order decides the rounding of the sum of their gradients.

    Args:
        node: of what was computed, a BatchNorm and perhaps an addition and an activation after it.
        first: the first place of the nodes made for that.
        place: the reserved one.
    """
    last = node._sequence_nr()
    while True:
        found = [n for n, _ in node.next_functions if n and first <= n._sequence_nr() < last]
        if not found:
            break
        node = min(found, key=lambda n: n._sequence_nr())
    node._set_sequence_nr(place)


def versions_of(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Return the numbers of changes in place."""
    try:
        return [None if t is None else t._version for t in tensors]
    except RuntimeError:  # one is of inference mode, and has none
        return [None if t is None or t.is_inference() else t._version for t in tensors]


def modes_for(x: Tensor) -> tuple[Any, ...]:
    """Return gradient mode, inference mode, hooks on saved tensors and stream."""
    grad = torch.is_grad_enabled()
    hooks = saved_tensors_hooks_now() if grad else None
    return grad, torch.is_inference_mode_enabled(), hooks, _current_stream(x)


def _current_stream(x: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None


def saved_tensors_hooks_now() -> Any:
    """Return the innermost hooks on saved tensors, or None."""
    # Non-reentrant checkpointing uses them; there is no public function for them.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
