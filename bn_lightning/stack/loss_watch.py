"""Find the members of a stack whose loss diverges."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bn_lightning.callbacks.divergence_guard import DivergenceGuard, check_finite_batch


class LossWatch:
    """Does for each member of a stack what `DivergenceGuard` does for one run.

    Args:
        guard: has the limits.
        device: of the losses.
        size: number of members.
    """

    def __init__(self, guard: DivergenceGuard, device: torch.device, size: int) -> None:
        self._guard = guard
        self._interval = 1 if device.type == "cpu" else guard.every_n_steps
        self._above_since: list[int | None] = [None] * size
        self._diverged_at: list[int | None] = [None] * size

    def diverged(self, losses: Tensor, inputs: Tensor, step: int) -> list[int]:
        """Return the members that have diverged at this step.

        Args:
            losses: (K,).
            inputs: of the batch.
            step: number of optimizer steps so far.

        Raises:
            ValueError: the batch itself has NaN or infinite values.
        """
        found = [] if step % self._interval else self._find(losses, inputs, step)
        for member in found:
            self._diverged_at[member] = step
        return found

    def _find(self, losses: Tensor, inputs: Tensor, step: int) -> list[int]:
        if math.isinf(self._guard.max_loss):
            finite = torch.isfinite(losses)
            if finite.all():
                return []
            check_finite_batch(inputs, step)
            return torch.nonzero(~finite).flatten().tolist()
        found = []
        for member, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                check_finite_batch(inputs, step)
                found.append(member)
            elif loss <= self._guard.max_loss:
                self._above_since[member] = None
            else:
                since = self._above_since[member]
                if since is None:
                    self._above_since[member] = since = step - 1
                if step - since >= self._guard.patience:
                    found.append(member)
        return found

    def member_state(self, member: int) -> dict[str, Any]:
        """Return the state that the `DivergenceGuard` of a member would have."""
        return {
            "diverged_at": self._diverged_at[member],
            "above_since": self._above_since[member],
        }

    def take(self, members: Sequence[int]) -> None:
        """Keep the given members only."""
        self._above_since = [self._above_since[k] for k in members]
        self._diverged_at = [self._diverged_at[k] for k in members]
