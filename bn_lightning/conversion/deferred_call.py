"""One call of a BatchNorm that is computed later, and what can be made of its output."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bn_lightning.conversion.fusable import FusableActivation
from bn_lightning.kernels.dispatch import is_recomputation

NOTHING, ADDITION, ALL = range(3)  # what a site fuses
_UNCHANGED = "what a BatchNorm is computed from to stay unchanged until its output is read"


class Site:
    """What is known of a module's calls in training, or of those in evaluation.

    Attributes:
        fuses: `NOTHING`, `ADDITION` or `ALL`; less than `ALL` after an output was read twice, or if
            what followed could not be fused.
        is_used: whether what followed could be fused.
        misses: number of calls after which it could not.
        first_pass: number of the first forward of the model.
        passes: number of forwards of models that returned, of all sites.
    """

    passes = 0

    def __init__(self) -> None:
        self.fuses = ALL
        self.is_used = False
        self.misses = 0
        self.first_pass: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether a whole forward showed that each output is read once, by what is fused."""
        first = self.first_pass
        return self.is_used and not self.misses and first is not None and first < Site.passes

    def miss(self) -> None:
        """Count an output that was read by what cannot be fused."""
        self.misses += 1
        if not self.is_used and self.misses > 2:
            self.fuses = NOTHING


class DeferredCall:
    """One call of a module.

    Attributes:
        deferral: counts the calls of the module.
        site: the module's, in training or in evaluation.
        is_done: whether the BatchNorm was computed, and the statistics were updated.
        is_candidate: whether the output could be fused, if only it were known to be read once.
    """

    def __init__(
        self,
        deferral: Any,
        site: Site,
        compute: Callable[..., Tensor],
        input: Tensor,
        state: tuple[Tensor | None, ...],
        options: dict[str, Any],
    ) -> None:
        self.deferral, self.site = deferral, site
        self.compute, self.input, self.state, self.options = compute, input, state, options
        self.is_done = self.is_candidate = False
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        weight, bias = state[:2]
        self.needs_grad = self.grad and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        )
        self.place = _reserve_place() if self.needs_grad else 0
        self.hooks = saved_tensors_hooks_now() if self.grad else None
        self.stream = _current_stream(input)
        # A tensor of inference mode has no version. A lazy clone keeps its values of now, because
        # a write to either copies first.
        self.snapshot = torch._lazy_clone(input) if input.is_inference() else None
        self.watched = [
            t for t in (None if self.snapshot is not None else input, *state) if t is not None
        ]
        self.versions = [_version(t) for t in self.watched]

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the output has a gradient for: x, weight and bias."""
        return self.input, self.state[0], self.state[1]

    def is_current(self) -> bool:
        """Return whether an operation now is computed as right after the call."""
        return (
            torch.is_grad_enabled() is self.grad
            and torch.is_inference_mode_enabled() is self.inference
            and (not self.grad or saved_tensors_hooks_now() == self.hooks)
            and (self.stream is None or _current_stream(self.input) == self.stream)
        )

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Restore gradient mode and stream of the call, without hooks on saved tensors."""
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled() is not self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.grad:
                stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
            if self.stream is not None and _current_stream(self.input) != self.stream:
                device = self.input.device
                stream = torch.cuda.ExternalStream(self.stream, device=device)
                stack.callback(torch.cuda.current_stream(device).wait_stream, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def run(
        self, residual: Tensor | None = None, activation: str = "identity", slope: float = 0.01
    ) -> Tensor:
        """Compute the BatchNorm; only the first time updates statistics.

        Raises:
            RuntimeError: the input, a parameter or a statistic was changed in place.
        """
        self._check_unchanged()
        if self.is_done:
            return self.run_again((*self.inputs, residual), activation, slope)
        self.is_done = True
        if residual is not None or activation != "identity":
            self.deferral.fused += 1
            self.site.is_used = True
        else:
            self.deferral.separate += 1
            if self.is_candidate:
                self.site.is_used = True
            else:
                self.site.miss()
        if self.snapshot is not None:
            if not torch._C._is_cow_tensor(self.input):  # type: ignore[attr-defined]
                self.input = self.snapshot  # because the input was written to
            self.snapshot = None
        given = {"residual": residual, "activation": activation, "negative_slope": slope}
        first = torch._C._autograd._get_sequence_nr()
        y = self.compute(self.input, *self.state, **(self.options | given))
        if y.grad_fn is not None and self.place + 1 < first:
            _put_in_place(y.grad_fn, first, self.place)
        return y

    def run_again(self, inputs: tuple[Tensor | None, ...], activation: str, slope: float) -> Tensor:
        """Compute the BatchNorm of `inputs` and a residual without updating statistics."""
        x, weight, bias, residual = inputs
        statistics = (None, None) if self.options["training"] else self.state[2:]
        given = {"residual": residual, "activation": activation, "negative_slope": slope}
        given |= {"num_batches_tracked": None, "momentum": 0.0}
        return self.compute(x, weight, bias, *statistics, **(self.options | given))

    def _check_unchanged(self) -> None:
        watched = self.watched
        if self.is_done and self.options["training"]:
            # The call itself has updated the statistics.
            watched = watched[: sum(t is not None for t in self.inputs)]
        if [_version(t) for t in watched] != self.versions[: len(watched)]:
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
        updates = self.options["training"] and self.state[2] is not None
        if updates and not self.is_done and not sys.is_finalizing() and not is_recomputation():
            with self.as_called(), torch.no_grad():
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

    def __init__(
        self,
        call: DeferredCall,
        inner: "Value | None" = None,
        residual: Tensor | None = None,
        activation: FusableActivation | None = None,
    ) -> None:
        self.call, self.residual, self.activation = call, residual, activation
        self.inner: Any = inner
        self.version = _version(residual)
        self.tensor: Tensor | None = None
        self.is_shared = False

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
            RuntimeError: what was added, or something else it depends on, was changed in place.
        """
        activation = self.activation
        (self if activation is None else self.inner).check_residual()
        if activation is None:
            return self.call.run(self.residual)
        return self.call.run(self.addend, activation.name, activation.slope)

    def run_again(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """Compute the value of other x, weight, bias and residual, without statistics."""
        if self.tensor is None:
            self.compute()
        activation = self.activation
        if activation is None:
            return self.call.run_again(inputs, "identity", 0.01)
        return self.call.run_again(inputs, activation.name, activation.slope)

    def check_residual(self) -> None:
        """Raise a RuntimeError if what was added was changed in place."""
        if _version(self.residual) != self.version:
            self.call.fail(f"{_UNCHANGED}, got a change in place of what was added to it")

    def note_read(self, is_use: bool) -> None:
        """Learn from a read: of two, the next forward fuses neither."""
        was_fused = self.tensor is None and self.call.is_done
        if was_fused or (self.is_shared and is_use):
            site = self.call.site
            site.fuses = NOTHING if self.residual is None else min(site.fuses, ADDITION)
        self.is_shared = False


def _reserve_place() -> int:
    """Return the place in the order of autograd that the node of an operation would have now."""
    return torch._C._functions.UndefinedGrad()._sequence_nr()  # type: ignore[attr-defined]


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


def _version(x: Tensor | None) -> int | None:
    return None if x is None or x.is_inference() else x._version


def _current_stream(x: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None


def saved_tensors_hooks_now() -> Any:
    """Return the innermost hooks on saved tensors, or None."""
    # Non-reentrant checkpointing uses them; there is no public function for them.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
