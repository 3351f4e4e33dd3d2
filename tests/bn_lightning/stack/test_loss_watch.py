"""A `LossWatch` finds of each member what a `DivergenceGuard` finds of its run."""

import math
from types import SimpleNamespace

import pytest
import torch

from bn_lightning.callbacks.divergence_guard import DivergenceGuard
from bn_lightning.stack.loss_watch import LossWatch

PATIENCE = 3
LOSSES = {  # of the steps 1 to 8, with a limit of 2
    "below": [1.0] * 8,
    "at_the_limit": [2.0] * 8,
    "above": [1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
    "below_in_between": [3.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0],
    "nan": [1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0],
    "infinite_while_above": [3.0, math.inf, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
}


def guard() -> DivergenceGuard:
    return DivergenceGuard(every_n_steps=5, max_loss=2.0, patience=PATIENCE)


def diverged_alone(losses: list[float]) -> int | None:
    """The step at which a guard stops a run of its own."""
    callback = guard()
    batch = torch.zeros(2)
    for step, loss in enumerate(losses, 1):
        trainer = SimpleNamespace(
            world_size=1, global_step=step, accumulate_grad_batches=1, should_stop=False
        )
        callback.on_train_batch_end(trainer, None, torch.tensor(loss), batch, step - 1)
        if trainer.should_stop:
            return callback.diverged_at
    return None


def test_each_member_diverges_when_its_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bn_lightning.callbacks.divergence_guard.is_last_batch_of_step", lambda trainer: True
    )
    running = list(LOSSES)
    watch = LossWatch(guard(), torch.device("cpu"), len(running))
    found: dict[str, int | None] = dict.fromkeys(LOSSES)
    for step in range(1, 9):
        losses = torch.tensor([LOSSES[name][step - 1] for name in running])
        gone = watch.diverged(losses, torch.zeros(2), step)
        found |= {running[member]: step for member in gone}
        stay = [member for member in range(len(running)) if member not in gone]
        running = [running[member] for member in stay]
        watch.take(stay)
    assert found == {name: diverged_alone(losses) for name, losses in LOSSES.items()}
    assert found["above"] == 1 + PATIENCE and found["below_in_between"] == 3 + PATIENCE


def test_a_batch_that_is_not_finite_is_an_error_of_the_data() -> None:
    watch = LossWatch(guard(), torch.device("cpu"), 2)
    with pytest.raises(ValueError, match="batch of step 1"):
        watch.diverged(torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), 1)


def test_the_state_is_that_of_a_guard() -> None:
    watch = LossWatch(guard(), torch.device("cpu"), 2)
    watch.diverged(torch.tensor([1.0, 3.0]), torch.zeros(2), 4)
    callback = guard()
    callback.load_state_dict(watch.member_state(1))
    assert callback.state_dict() == {"diverged_at": None, "above_since": 3}
    assert watch.member_state(0)["above_since"] is None
