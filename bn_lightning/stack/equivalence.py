"""Compare a stack with its members before it trains."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from bn_lightning.models.classifier import Classifier
from bn_lightning.modules.preserve_state import preserve_state
from bn_lightning.stack.context import Placed, leading
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.same_architecture import NotStackableError, attributes_of, first_difference

# Largest difference of two losses relative to the larger one, or to 1. Rounding makes 1e-6 of it
# after the layers of a deep network; a member that got another's weights or mask makes all of it.
_TOLERANCE = 1e-3
# Largest difference of two tensors relative to the larger one, and to the largest of its kind:
# what is zero but for rounding has the size of the rounding of others.
_OF_TENSOR, _OF_ALL = 1e-2, 1e-5


def check_equivalence(
    network: StackedNetwork,
    models: Sequence[Classifier],
    random_states: Sequence[Tensor],
    batch: tuple[Placed, Placed],
) -> None:
    """Compute a training batch and its evaluation in the stack and one by one, and compare them.

    Compared are losses, gradients, buffers and the outputs of the evaluation. Nothing changes:
    buffers and random states are restored.

    Args:
        network: of the stack.
        models: of the members, whose own networks have the state that they have in the stack.
        random_states: of torch on the CPU, one for each member.
        batch: inputs and targets.

    Raises:
        NotStackableError: the network cannot run in a stack, keeps state in attributes, draws from
            other random numbers than torch's, or something that is compared differs.
    """
    device = batch[0].value.device.type
    # As in training, also before a validation, which Lightning runs in inference mode.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        batch = tuple(Placed(part.value.clone(), part.dim) for part in batch)  # type: ignore[assignment]
        _check_loss(models, batch)
        try:
            stacked = _of_stack(network, models[0], *batch)
        except NotStackableError:
            raise
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise NotStackableError(f"the network cannot run in a stack: {line}") from error
        for k, (model, state) in enumerate(zip(models, random_states, strict=True)):
            x, target = (part.value if part.dim is None else part.value[k] for part in batch)
            _compare(stacked.of(k), _of_member(model, state, x, target))


class _Rehearsed(NamedTuple):
    """What is computed of a batch, by a member or, with a leading dimension K, by a stack.

    Attributes:
        loss: in training mode.
        gradients: of the parameters.
        buffers: after the training batch.
        outputs: of the network in evaluation mode.
    """

    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    outputs: Tensor

    def of(self, k: int) -> "_Rehearsed":
        """Return what a member of a stack computed."""
        gradients, buffers = (
            {name: tensor[k] for name, tensor in named.items()}
            for named in (self.gradients, self.buffers)
        )
        return _Rehearsed(self.loss[k], gradients, buffers, self.outputs[k])


def _of_stack(network: StackedNetwork, model: Classifier, x: Placed, target: Placed) -> _Rehearsed:
    with network.preserved():
        network.network.train()
        losses = member_losses(network, model, x, target, measures=False)[0]
        gradients = _gradients(losses, network.network)
        buffers = _copied_buffers(network.network)
        network.network.eval()
        with torch.no_grad():
            outputs = leading(network(x), network.size)
    return _Rehearsed(losses.detach(), gradients, buffers, outputs)


def _of_member(model: Classifier, random_state: Tensor, x: Tensor, target: Tensor) -> _Rehearsed:
    """Compute a member alone, with its own network, and check that nothing else changes."""
    own = model.network
    attributes = attributes_of(own)
    versions = {name: parameter._version for name, parameter in own.named_parameters()}
    with preserve_state(own):
        own.train()
        torch.set_rng_state(random_state)
        other_states = _other_random_states()
        loss = model.loss(own(x), target)
        gradients = _gradients(loss, own)
        if _other_random_states() != other_states:
            raise NotStackableError("the network draws random numbers of Python or NumPy")
        buffers = _copied_buffers(own)
        own.eval()
        with torch.no_grad():
            outputs = own(x)
            parts = _in_parts(own, x)
    if (name := first_difference(attributes, attributes_of(own))) is not None:
        raise NotStackableError(f"the network keeps state in the attribute `{name}`")
    for name, parameter in own.named_parameters():
        if parameter._version != versions[name]:
            raise NotStackableError(f"the network changes its parameter `{name}`")
    if parts is None or _differ({"outputs": parts}, {"outputs": outputs}):
        raise NotStackableError("an evaluation depends on the other samples of its batch")
    return _Rehearsed(loss.detach(), gradients, buffers, outputs)


def _in_parts(network: nn.Module, x: Tensor) -> Tensor | None:
    """Return the outputs of a batch computed in halves, None if a half cannot be computed."""
    try:
        return torch.cat([network(part) for part in x.split(max(1, len(x) // 2))])
    except Exception:  # as a BatchNorm without running statistics raises for one sample
        return None


def _gradients(losses: Tensor, network: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not losses.requires_grad:
        return {}
    found = torch.autograd.grad(
        losses,
        [*named.values()],
        torch.ones_like(losses),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(named, found, strict=True))


def _copied_buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def _other_random_states() -> tuple[Any, ...]:
    """Return the random states of Python and NumPy."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]


def _compare(stacked: _Rehearsed, alone: _Rehearsed) -> None:
    """Raise a NotStackableError if what was computed in the stack and alone differs."""
    loss, single = stacked.loss.item(), alone.loss.item()
    both = math.isfinite(loss), math.isfinite(single)
    if any(both) and not abs(single - loss) <= _TOLERANCE * max(1.0, abs(single), abs(loss)):
        raise NotStackableError(
            f"the network computes a loss of {loss:g} in the stack and {single:g} alone"
        )
    if not all(both):
        return
    for kind, found, expected in (
        ("gradient of", stacked.gradients, alone.gradients),
        ("buffer", stacked.buffers, alone.buffers),
    ):
        if name := _differ(found, expected):
            raise NotStackableError(f"the {kind} `{name}` in the stack differs from that alone")
    if _differ({"outputs": stacked.outputs}, {"outputs": alone.outputs}):
        raise NotStackableError("an evaluation in the stack differs from that alone")


def _differ(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first name whose tensors differ, "" for none. What is not finite is left out."""
    largest = {name: _largest(tensor) for name, tensor in expected.items()}
    of_all = _OF_ALL * max(filter(math.isfinite, largest.values()), default=0.0)
    for name, tensor in expected.items():
        if not math.isfinite(largest[name]):
            continue
        if found[name].shape != tensor.shape:
            return name
        error = _largest(found[name].double() - tensor.double())
        if not error <= _OF_TENSOR * largest[name] + of_all:
            return name
    return ""


def _largest(x: Tensor) -> float:
    return x.detach().abs().double().max().item() if x.numel() else 0.0


def _check_loss(models: Sequence[Classifier], batch: tuple[Placed, Placed]) -> None:
    """Check that the loss and the predicted classes can be computed by the first member for all.

    Raises:
        NotStackableError: they depend on the state of a member, or on what differs among them.
    """
    x, target = (part.value if part.dim is None else part.value[0] for part in batch)
    model = models[0]
    with torch.no_grad(), preserve_state(model.network):
        logits = model.network.train()(x)
        with _noting_reads(model) as names:
            model.loss(logits, target)
            model.predicted_classes(logits)
    for name in names:
        if name in _OF_MEMBER:
            raise NotStackableError(f"the loss depends on `self.{name}`")
        values = [getattr(other, name) for other in models]
        if any(not _same(values[0], value) for value in values[1:]):
            raise NotStackableError(f"the members differ in `{name}`, on which the loss depends")


# What a module alone has of its own: its network, mode and progress.
_OF_MEMBER = (set(dir(LightningModule)) | vars(LightningModule()).keys()) - {"hparams"}
_OF_MEMBER |= {"network", "evaluations"}


@contextmanager
def _noting_reads(model: Classifier) -> Iterator[list[str]]:
    """Note the names of the attributes that are read of a module."""
    kind: Any = type(model)
    names: list[str] = []

    class Noting(kind):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__"):
                names.append(name)
            return super().__getattribute__(name)

    model.__class__ = Noting
    try:
        yield names
    finally:
        model.__class__ = kind


def _same(value: Any, other: Any) -> bool:
    """Return whether two values compute the same, as far as can be told."""
    if isinstance(value, nn.Module) and isinstance(other, nn.Module):
        left, right = ({**m.state_dict(), **attributes_of(m)} for m in (value, other))
        return first_difference(left, right) is None
    if callable(value):
        return True
    return first_difference({"": value}, {"": other}) is None
