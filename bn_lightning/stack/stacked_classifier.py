"""A stack as a LightningModule, for any Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from bn_lightning.models.classifier import Batch, Classifier, evaluation_name
from bn_lightning.stack.context import DropoutStreams, Placed
from bn_lightning.stack.equivalence import check_equivalence
from bn_lightning.stack.evaluation import evaluate_stack
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.optimizers import StackedOptimizer, clip_members, member_optimizers
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.stackable import check_module


class StackedClassifier(LightningModule):
    """K classifiers that a Trainer trains as one model, on the batches of one data loader.

    Each member equals the classifier that the Trainer would train alone on these batches, up to
    rounding. A NaN of one member does not reach another. The loss that callbacks see is the sum of
    the members'. Before the first batch, its losses, gradients, buffers and evaluation are
    compared with those of each member alone.

    Logs what `Classifier` logs, with `member_K/` before each name: `member_0/train/loss`,
    `member_0/val/accuracy`, `member_0/test/loss`. Rates of the members are not logged:
    `LearningRateMonitor` finds none, and `StochasticWeightAveraging`, which sets one, fails.

    Args:
        members: the classifiers, at least one, in their initial state. They are not trained
            themselves; `member` updates them.
        seeds: of the random numbers of each member's dropout, which are those after
            `torch.manual_seed(seed)`; None for one stream of all, which begins at torch's state.

    Raises:
        NotStackableError: the members cannot be one stack.
        ValueError: there are no members, or not as many seeds.

    Source: as `Classifier`.
    """

    def __init__(self, members: Sequence[Classifier], seeds: Sequence[int] | None = None) -> None:
        super().__init__()
        if not members:
            raise ValueError("expected `members` to have at least one classifier, got none")
        if seeds is not None and len(seeds) != len(members):
            raise ValueError(
                f"expected `seeds` to be one for each of {len(members)} members, got {len(seeds)}"
            )
        self._members = tuple(check_module(member) for member in members)  # no modules of this one
        if len({type(member) for member in members}) > 1:
            raise NotStackableError("the members are of different classes")
        self.stack = StackedNetwork([member.network for member in members])
        # The Trainer moves the metrics.
        self.evaluations = nn.ModuleList([member.evaluations for member in members])
        self._random_states = [torch.get_rng_state()] * len(members)
        if seeds is not None:
            self._random_states = [torch.Generator().manual_seed(s).get_state() for s in seeds]
        self.stack.context.streams = DropoutStreams(self._random_states)
        self._is_checked = False

    @override
    def setup(self, stage: str) -> None:
        self._members[0].check_classes(self.trainer.datamodule)  # type: ignore[attr-defined]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, target = (Placed(part, None) for part in batch)
        self._begin(x, target)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        logs = bool(every) and (self.global_step + 1) % every == 0
        losses, accuracies = member_losses(self.stack, self._members[0], x, target, logs)
        if accuracies is not None:
            pairs = zip(losses.detach(), accuracies, strict=True)
            values = [{"train/loss": loss, "train/accuracy": right} for loss, right in pairs]
            self._log(values, self.global_step + 1)
        return losses.sum()

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(evaluation_name(dataloader_idx), batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluations()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluations()

    @override
    def configure_optimizers(self) -> Any:
        return MemberOptimizers(self.stack, self._members)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each member as if it were alone."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            gradients = [p.grad for p in self.stack.parameters() if p.grad is not None]
            clip_members(gradients, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def member(self, k: int) -> Classifier:
        """Return a member's own classifier, with the state that it has in the stack now."""
        model = self._members[k]
        first = next(self.stack.parameters())
        with torch.inference_mode(False):  # in a validation, too, so that the member can be trained
            model.network.to(first.device, first.dtype)
            self.stack.load_member(model.network, k)
        return model

    def _begin(self, x: Placed, target: Placed) -> None:
        """Compare the first batch of all with the members, and follow the Trainer's device."""
        context = self.stack.context
        with torch.inference_mode(False):  # autograd reads it in the steps after a validation
            context.index = context.index.to(x.value.device)
        if not self._is_checked:
            mode = self.stack.training
            models = [self.member(k) for k in range(self.stack.size)]
            check_equivalence(self.stack, models, self._random_states, (x, target))
            self.stack.train(mode)
            self._is_checked = True

    def _evaluate(self, name: str, batch: Batch) -> None:
        x, target = batch
        self._begin(Placed(x, None), Placed(target, None))
        evaluate_stack(self.stack, self._members, name, [batch])

    def _log_evaluations(self) -> None:
        measured = [member.take_metrics() for member in self._members]
        self._log(measured, self.global_step, sync_dist=True)

    def _log(
        self, values: Sequence[Mapping[str, Any]], step: int, *, sync_dist: bool = False
    ) -> None:
        """Log values of each member."""
        named = {f"member_{k}/{name}": v for k, own in enumerate(values) for name, v in own.items()}
        self.log_dict({**named, "step": float(step)}, sync_dist=sync_dist)


class MemberOptimizers(Optimizer):
    """The optimizers and schedulers of a stack's members as one optimizer of torch.

    Its `state_dict` has those of the members under "optimizers" and "schedulers".

    Args:
        stack: the stacked network.
        members: the classifiers.

    Raises:
        NotStackableError: see `member_optimizers` and `StackedOptimizer`.
    """

    def __init__(self, stack: StackedNetwork, members: Sequence[Classifier]) -> None:
        parameters = list(stack.parameters())
        super().__init__(parameters, {})
        optimizers, self.schedulers = member_optimizers(members)
        self.stacked = StackedOptimizer(parameters, optimizers)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.stacked.step()
        for scheduler in self.schedulers:
            scheduler.step()
        if self.schedulers:
            self.stacked.read_numbers()
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        count = len(self.stacked.members)
        return {
            "optimizers": [self.stacked.member_state(k) for k in range(count)],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.stacked.load_members(state_dict["optimizers"])
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)


def member_checkpoint(checkpoint: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Return the checkpoint of a member, from which a Trainer goes on with it alone.

    Args:
        checkpoint: that a Trainer wrote of a `StackedClassifier`, loaded.
        k: number of the member.
    """
    start, optimizer = "stack.network.", checkpoint["optimizer_states"][0]
    weights: Iterable[tuple[str, Tensor]] = checkpoint["state_dict"].items()
    return {
        **checkpoint,
        "state_dict": {
            f"network.{name.removeprefix(start)}": tensor[k].clone() for name, tensor in weights
        },
        "optimizer_states": [optimizer["optimizers"][k]],
        "lr_schedulers": optimizer["schedulers"][k : k + 1],
        "callbacks": {},
    }
