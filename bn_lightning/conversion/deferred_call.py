"""One call of a BatchNorm, what is predicted to follow it, and what is seen to follow it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bn_lightning.conversion.fusable import BatchNormCall, FusableActivation
from bn_lightning.kernels.activations import ACTIVATIONS, Saves
from bn_lightning.kernels.dispatch import (
    chooses_triton,
    is_recomputation,
    updates_in_recomputation,
)
from bn_lightning.kernels.eager import (
    TensorGuards,
    find_repetition,
    is_observed,
    make_guard,
    make_room,
)
from bn_lightning.kernels.measurements import Fusion
from bn_lightning.kernels.ops import batch_norm

_MAX_KINDS = 64  # of calls of a module, in training or in evaluation
_MAX_MISSES = 3


class Prediction(NamedTuple):
    """What follows a call.

    Attributes:
        first: an activation, `ADDITION`, or None for what cannot be fused.
        last: the activation that follows the addition, or None.
    """

    first: Any = None
    last: FusableActivation | None = None


ADDITION: Any = object()  # or activations that are not always the same
NOTHING = Prediction()


class Kind:
    """Calls with tensors of the same shapes, strides, dtypes and devices.

    Args:
        tensors: of the first of them: x, parameters and statistics.
        output: its output.
    """

    def __init__(self, tensors: list[Tensor], output: Tensor) -> None:
        self.is_alike, self.count = make_guard(tensors), len(tensors)
        self.needs_grad = any([t.requires_grad for t in tensors])
        # A tensor with the metadata of the output, and without memory.
        with torch.inference_mode(False):
            self.blank = torch.empty_strided(
                output.shape, output.stride(), dtype=output.dtype, device=output.device
            )
        self.blank.untyped_storage().resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(self.blank)
        # How the kernels repeat these calls, by what is fused.
        self.repetitions: dict[tuple[bool, str], Any] = {}


class Site:
    """What is known of a module's calls in training, or of those in evaluation.

    Attributes:
        prediction: what follows a call; None until it was seen.
        learned: the next prediction.
        watched_in: number of the forward of the last call that was computed at once to see it.
        misses: number of wrong predictions.
        open: number of calls that activation checkpointing has not run again yet.
        kinds: of calls, by the shape of the input.
        passes: number of forwards of models that ended, of all sites.
    """

    passes = 0

    def __init__(self) -> None:
        self.prediction: Prediction | None = None
        self.learned: Prediction | None = None
        self.watched_in = -1
        self.misses = self.open = 0
        self.kinds: dict[torch.Size, Kind] = {}

    def begin(self, is_checkpointed: bool, is_inside: bool) -> Prediction | None:
        """Begin a call; return what will follow, None if that has to be seen.

        What is run again must save as many tensors as before, so the prediction stays meanwhile.

        Args:
            is_checkpointed: whether hooks on saved tensors are active.
            is_inside: whether the forward of a model runs, in which outputs may be read again.
        """
        is_again = is_checkpointed and is_recomputation()
        if not (is_again or self.open > 0 or (is_inside and self.watched_in == Site.passes)):
            self.prediction = self.learned
        if is_checkpointed:
            self.open = max(self.open + (-1 if is_again else 1), 0)
        return self.prediction

    def learn(self, found: Prediction) -> None:
        """Note what followed one of the calls."""
        if found.first is None:
            found = NOTHING
        if self.learned is None or self.learned is self.prediction:
            self.learned = found
        elif found != self.learned:
            both_fuse = found.first and self.learned.first
            self.learned = Prediction(ADDITION) if both_fuse else NOTHING

    def miss(self) -> None:
        """Note that the prediction was wrong."""
        self.misses += 1
        self.learned = NOTHING if self.misses >= _MAX_MISSES else None

    def kind_of(self, tensors: list[Tensor], output: Tensor | None = None) -> Kind | None:
        """Return the kind of a call, if it was seen; with its output, a new one otherwise."""
        kind = self.kinds.get(tensors[0].shape)
        if kind is not None and len(tensors) == kind.count and kind.is_alike(*tensors):
            return kind
        if output is None:
            return None
        make_room(self.kinds, _MAX_KINDS)
        kind = self.kinds[tensors[0].shape] = Kind(tensors, output)
        return kind


def is_needed_early(module: Any, x: Tensor, training: bool, modes: tuple[Any, ...]) -> bool:
    """Return whether what reads an output cannot be seen, or the modes of torch not be restored."""
    return bool(
        type(x) is not Tensor
        or TensorGuards is None
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (
            # FSDP frees the weight early. It is another one meanwhile, unless FSDP ignores it.
            "_is_fsdp_managed_module" in module.__dict__
            and module._parameters.get("weight") is not module.deferral.weight
        )
        # Reentrant checkpointing must not return a tensor without values.
        or (training and not modes[0])
        # What is computed after a checkpointed part is not run again with it.
        or (modes[2] is not None and updates_in_recomputation())
        or is_observed()
    )


class DeferredCall(BatchNormCall):
    """One call of a module; the last arguments are those of `BatchNormCall`.

    Args:
        module: has a `Deferral`, which counts the calls.
        site: the module's, in training or in evaluation.
        modes: those of torch, which a computation later must have, too.

    Attributes:
        kind: of the call, if it is known.
        expected: the activation that `result` is of, until it is called.
        result: what was computed ahead.
        last: the activation that will follow an addition, or None.
        residual: what was added to the output, or None.
        residual_version: of the residual, when it was added.
        place: in the order of autograd, reserved for what is computed later; 0 for none.
        snapshot: of an input that does not tell whether it was changed.
        content: the output computed alone, while C++ code has the deferred tensor.
    """

    kind: Any = None
    expected: FusableActivation | None = None
    result: Tensor | None = None
    last: FusableActivation | None = None
    residual: Tensor | None = None
    residual_version: Any = None
    place = 0
    snapshot: Tensor | None = None
    content: Tensor | None = None

    def __init__(
        self, module: Any, site: Site, modes: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> None:
        self.compute, self.input, self.state, self.options = arguments
        self.module, self.site, self.modes = module, site, modes
        self.versions = versions_of((self.input, *self.state))

    @property
    def tensors(self) -> list[Tensor]:
        """x, parameters and statistics."""
        return [self.input, *[t for t in self.state if t is not None]]

    def run_at_once(self) -> Tensor:
        """Compute the output alone, to see what reads it."""
        self.site.watched_in = Site.passes
        y = self.run()
        self.site.kind_of(self.tensors, y)
        return y

    def run_ahead(self, activation: FusableActivation) -> bool:
        """Compute the activation that will follow; return whether that could be done."""
        # An input of inference mode does not tell whether it is changed before something else reads
        # the output.
        if self.input.is_inference() or not self.fuses(activation):
            return False
        self.is_done = True
        self.kind = self.site.kinds.get(self.input.shape)
        result, is_repeated = self._compute(None, activation.name, activation.slope)
        if not is_repeated:
            self.kind = self.site.kind_of(self.tensors, result)
        self.module.deferral.fused += 1
        self.result, self.expected = result, activation
        return True

    def wait(self, last: FusableActivation | None) -> bool:
        """Prepare to make the call later, with what follows; return whether that can be done.

        Args:
            last: the activation that will follow an addition, or None.
        """
        self.kind = self.site.kind_of(self.tensors)
        if self.kind is None:
            return False
        self.last = last
        if self.input.is_inference():
            # A lazy clone keeps its values, because a write to either copies.
            self.snapshot = torch._lazy_clone(self.input)
        if self.modes[0] and self.kind.needs_grad:
            # The place that an operation would have now.
            node: Any = torch._C._functions.UndefinedGrad()
            self.place = node._sequence_nr()
        return True

    def is_current(self) -> bool:
        """Return whether an operation now is computed as right after the call."""
        return modes_for(self.input) == self.modes

    def fuses(self, activation: FusableActivation, after_addition: bool = False) -> bool:
        """Return whether an activation can be computed with the BatchNorm."""
        saves = ACTIVATIONS[activation.name].saves
        if after_addition and self.modes[0] and saves is Saves.RESIDUAL:
            return False  # its gradient keeps the residual, which the model may change in place
        if activation.in_place and activation.name == "elu":
            # torch computes its gradient from the output, ATen's ops from the input.
            fusion = Fusion("elu", after_addition, self.options["training"])
            return chooses_triton(self.input, self.options["backend"], fusion)
        return True

    def run(
        self, residual: Tensor | None = None, activation: str = "identity", slope: float = 0.01
    ) -> Tensor:
        """Compute the BatchNorm; only the first time updates statistics."""
        self._check_unchanged()
        if self.is_done:
            return super().run(residual, activation, slope)
        self.is_done = True
        if residual is None and activation == "identity":
            self.module.deferral.separate += 1
        else:
            self.module.deferral.fused += 1
        if self.snapshot is not None:
            if not torch._C._is_cow_tensor(self.input):  # type: ignore[attr-defined]
                self.input = self.snapshot  # because the input was written to
            self.snapshot = None
        first = torch._C._autograd._get_sequence_nr() if self.place else 0
        y, _ = self._compute(residual, activation, slope)
        if self.place + 1 < first and y.grad_fn is not None:
            _put_in_place(y.grad_fn, first, self.place)
        return y

    def _compute(
        self, residual: Tensor | None, activation: str, slope: float
    ) -> tuple[Tensor, bool]:
        """Compute the call; return also whether the kernels repeated an earlier one of its kind."""
        options, key = self.options, (residual is None, activation)
        repetitions = {} if self.kind is None else self.kind.repetitions
        tracked, training = options["num_batches_tracked"], options["training"]
        numbers = (training, options["momentum"], options["eps"], activation, slope)
        fields = (self.input, residual, *self.state, tracked, *numbers)
        repeat = repetitions.get(key)
        y = None if repeat is None else repeat(fields, options["backend"])
        if y is not None:
            return y, True
        fused = {"residual": residual, "activation": activation, "negative_slope": slope}
        y = self.compute(self.input, *self.state, **{**options, **fused})
        if self.compute is batch_norm and key not in repetitions:
            repetitions[key] = find_repetition(fields, options["backend"])
        return y, False

    def run_alone(self) -> Tensor:
        """Compute what the deferred tensor stands for, because nothing that follows is fused."""
        if self.content is not None:
            return self.content
        self.site.miss()
        if self.expected is not None:
            self.module.deferral.fused -= 1
            self.module.deferral.separate += 1
            self.expected = self.result = None
        with self._as_called():
            return self.run(self.residual)

    @contextmanager
    def _as_called(self) -> Iterator[None]:
        """Restore gradient mode and stream of the call, without hooks on saved tensors."""
        grad, inference, hooks, called_on = self.modes
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled() is not inference:
                stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if grad and modes_for(self.input)[2] != hooks:
                stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
            if _current_stream(self.input) != called_on:
                device = self.input.device
                stream = torch.cuda.ExternalStream(called_on, device=device)
                stack.callback(torch.cuda.current_stream(device).wait_stream, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def add(self, residual: Tensor) -> "DeferredCall":
        """Compute the sum, or the activation of it, and return what stands for the sum."""
        last = self.last
        if last is not None and self.fuses(last, after_addition=True):
            result = self.run(residual, last.name, last.slope)
        else:
            last, result = None, self.run(residual)
        summed = object.__new__(DeferredCall)
        summed.__dict__.update(self.__dict__)
        summed.residual, summed.result, summed.expected = residual, result, last
        summed.residual_version = versions_of((residual,))
        return summed

    def _check_unchanged(self) -> None:
        """Raise a RuntimeError if what the call is computed from was changed in place."""
        # Once done, the call itself has updated the statistics.
        count = 3 if self.is_done and self.options["training"] else None
        changed = "input, parameters or statistics"
        if versions_of((self.input, *self.state)[:count]) == self.versions[:count]:
            if self.residual is None or versions_of((self.residual,)) == self.residual_version:
                return
            changed = "what was added to it"
        self.fail(
            "what a BatchNorm is computed from to stay unchanged until its output is read, got a "
            f"change in place of {changed}"
        )

    def fail(self, reason: str) -> NoReturn:
        """Raise an error, and compute the next calls at once."""
        self.is_done = True
        self.site.prediction = self.site.learned = NOTHING
        raise RuntimeError(
            f"expected {reason}; call the model again, which will not defer this BatchNorm, or "
            f"convert it with fuse=False: {self.module}"
        )

    def __del__(self) -> None:
        # Nobody has read the output, but the call updates the statistics.
        if self.is_done or not self.options["training"] or self.state[2] is None:
            return
        if not sys.is_finalizing() and not is_recomputation():
            with self._as_called(), torch.no_grad():
                self.run()


class Watch:
    """Notes what reads an output that was computed at once.

    Args:
        call: the call that computed it.
        tensor: the output, or its sum with another tensor.
        output: what notes the reads of the output, if this one notes those of a sum.

    Attributes:
        seen: the only reader, an activation or `ADDITION`; None for another one, for several, and
            for none.
        last: the activation that alone reads the sum.
    """

    expected = None  # as of a `DeferredCall`
    seen: Any = None
    last: FusableActivation | None = None
    _is_read = False

    def __init__(self, call: DeferredCall, tensor: Tensor, output: "Watch | None" = None) -> None:
        self.call, self.tensor, self.output = call, tensor, output

    def note(self, reader: Any) -> None:
        """Note an operation that reads the output, None for one that cannot be fused."""
        self.seen = None if self._is_read else reader
        self._is_read = True

    def __del__(self) -> None:
        # Nobody can read it any more.
        if self.output is not None:
            self.output.last = self.seen
        else:
            self.call.site.learn(Prediction(self.seen, self.last))


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
    # Non-reentrant checkpointing uses such hooks; there is no public function for them.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) if grad else None
    return grad, torch.is_inference_mode_enabled(), hooks, _current_stream(x)


def _current_stream(x: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
