"""Compare a stack with its members before it trains."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.models.classifier import Classifier
from bn_lightning.modules.preserve_state import preserve_state
from bn_lightning.stack.context import Placed
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.network import NotStackableError, StackedNetwork

# Largest difference of two losses relative to the larger one, or to 1. Rounding makes 1e-6 of it
# after the layers of a deep network; a member that got another's weights or mask makes all of it.
_TOLERANCE = 1e-3

_PLAIN = (bool, int, float, str, list, tuple, dict, set)


def rehearse(
    network: StackedNetwork,
    models: Sequence[Classifier],
    random_states: Sequence[Tensor],
    batch: tuple[Placed, Placed],
) -> None:
    """Compute the losses of a training batch in the stack and one by one, and compare them.

    Nothing changes: buffers and random states are restored.

    Args:
        network: of the stack.
        models: of the members, whose own networks have the state that they have in the stack.
        random_states: of torch on the CPU, one for each member.
        batch: inputs and targets.

    Raises:
        NotStackableError: the network cannot run in a stack, keeps state in attributes, or a loss
            differs.
    """
    network.network.train()
    try:
        with torch.no_grad(), network.preserved():
            losses = member_losses(network, models[0], *batch, measures=False)[0].tolist()
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise NotStackableError(f"the network cannot run in a stack: {line}") from error
    for k, (model, loss) in enumerate(zip(models, losses, strict=True)):
        own = model.network.train()
        x, target = (part.value if part.dim is None else part.value[k] for part in batch)
        before = _plain_attributes(own)
        with torch.no_grad(), preserve_state(own):
            torch.set_rng_state(random_states[k])
            single = model.loss(own(x), target).item()
        if changed := [name for name, v in _plain_attributes(own).items() if before.get(name) != v]:
            raise NotStackableError(f"the network keeps state in the attribute `{changed[0]}`")
        same = abs(single - loss) <= _TOLERANCE * max(1.0, abs(single), abs(loss))
        if not same and math.isfinite(single) and math.isfinite(loss):
            raise NotStackableError(
                f"the network computes a loss of {loss:g} in the stack and {single:g} alone"
            )


def _plain_attributes(network: nn.Module) -> dict[str, Any]:
    """Return the attributes of all modules that hold Python's own values, as text."""
    return {
        f"{name}.{key}".lstrip("."): repr(value)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, _PLAIN) and not key.startswith("_")
    }
