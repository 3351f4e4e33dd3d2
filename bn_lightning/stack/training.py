"""Train runs that differ in numbers as one stack."""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bn_lightning.callbacks.divergence_guard import DivergenceGuard
from bn_lightning.callbacks.same_data import SameData
from bn_lightning.data.protocol import data_info
from bn_lightning.models.classifier import Classifier
from bn_lightning.runs.interruption import (
    Interrupted,
    LateInterrupt,
    handle_signals,
    raises_interrupted,
)
from bn_lightning.runs.record import logged_numbers, run_outcome
from bn_lightning.stack.builder import Builder
from bn_lightning.stack.context import DropoutStreams, Placed
from bn_lightning.stack.equivalence import check_equivalence
from bn_lightning.stack.evaluation import (
    evaluate_one,
    evaluate_stack,
    placed_batch,
    same_evaluation,
)
from bn_lightning.stack.loop_state import Validated, loop_state
from bn_lightning.stack.loss_watch import LossWatch
from bn_lightning.stack.member import Member
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.memory import StackSizeError, fitting_members
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.optimizers import StackedOptimizer, member_optimizers
from bn_lightning.stack.percentiles import StackPercentiles
from bn_lightning.stack.progress import StackProgress
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.seed_batches import SeedBatches, loaded_data
from bn_lightning.stack.stackable import (
    LOSS_GUARD,
    MIXED,
    OPTUNA_PRUNING,
    PROBE,
    PROGRESS_BAR,
    stack_key,
)
from bn_lightning.stack.step_graph import StepGraph, recordable
from bn_lightning.sweeps.engine.environment import STUDY_VARIABLE

if TYPE_CHECKING:
    from optuna.trial import Trial

    from bn_lightning.sweeps.engine.rungs import Rungs


def train_stack(
    configs: Sequence[DictConfig | dict[str, Any]], trials: "Sequence[Trial] | None" = None
) -> list[dict[str, Any]]:
    """Train and test runs as one batched model; each leaves what `bn_lightning.train` leaves.

    Every member has the initial weights, batches and dropout of its own run, and equals it up to
    rounding. A member that diverges, stops early or is pruned leaves the stack.

    Args:
        configs: one for each member, composed from `conf/train.yaml`, that differ in what
            `bn_lightning.stack.stackable.stack_key` allows, and in `paths.output_dir`.
        trials: one for each member, of an Optuna study that is asked for them. After each
            validation they report the metric of `callbacks.optuna_pruning`, and then the pruner of
            their study judges all of them (`bn_lightning.sweeps.engine.rungs.Rungs`). The caller
            tells the study how they ended.

    Returns:
        The `run_outcome` of each member, in the order of `configs`. That of a pruned one has
        `pruned_at`, the step, and is not tested.

    Raises:
        NotStackableError: the runs cannot be one stack, or do not fit into memory; nothing has been
            trained.
        ValueError: the pruner cannot judge a stack, there is no trial for each member, or no
            callback that names the metric.
    """
    resolved: list[Any] = [
        OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
        for config in configs
    ]
    if not resolved:
        raise ValueError("expected `configs` to have at least one configuration, got none")
    if len({stack_key(config) for config in resolved}) > 1:
        raise NotStackableError("the runs differ in more than seeds and numbers")
    if trials is None:
        return StackTraining(resolved).run()
    from bn_lightning.sweeps.engine.rungs import Rungs

    if len(trials) != len(resolved):
        raise ValueError(
            f"expected `trials` to be one for each of {len(resolved)} members, got {len(trials)}"
        )
    nodes = resolved[0]["callbacks"].values()
    if OPTUNA_PRUNING not in [node["_target_"] for node in nodes if node]:
        raise ValueError(
            f"expected `callbacks` to have {OPTUNA_PRUNING}, whose metric trials report, got none;"
            " add it"
        )
    return StackTraining(resolved, Rungs(trials)).run()


class StackTraining:
    """The training of one stack.

    Args:
        configs: resolved, with one `stack_key`.
        rungs: of the members' trials, in the order of `configs`; None prunes none.

    Raises:
        NotStackableError: something that is built cannot be stacked.
        StackSizeError: the members do not fit into memory.
    """

    def __init__(self, configs: Sequence[dict[str, Any]], rungs: "Rungs | None" = None) -> None:
        from hydra.utils import instantiate

        first = configs[0]
        if (threads := first["extras"]["num_threads"]) is not None:
            torch.set_num_threads(threads)
        self._trainer = first["trainer"]
        self._datamodule = loaded_data(first["data"])
        seeds = [config["data"].get("seed", 0) for config in configs]
        self.batches = SeedBatches(self._datamodule, seeds)
        device = self._device = _device(self._trainer["accelerator"])
        precision = self._trainer.get("precision")
        dtype = torch.float64 if precision == "64-true" else torch.float32
        self._is_mixed = precision in MIXED
        self.members: list[Member] = []
        builder = Builder()
        for config in configs:
            like = self.members[0].record if self.members else None
            member = Member(config, like, builder)
            member.model.network.to(device, dtype)
            self.members.append(member)
            if like is None:
                self._like = next(member.model.network.parameters())
                self._check_memory(member, len(configs))
        for member, trial in zip(self.members, rungs.numbers if rungs else (), strict=False):
            member.trial = trial
        self.runs = list(self.members)  # those that left, too
        self.network = StackedNetwork([member.model.network for member in self.members])
        states = [member.random_state for member in self.members]
        self.network.context.streams = DropoutStreams(states)
        models = [member.model for member in self.members]
        optimizers, self._schedulers = member_optimizers(models)
        parameters = list(self.network.network.parameters())
        clip = self._trainer.get("gradient_clip_val")
        self.optimizer = StackedOptimizer(parameters, optimizers, clip or None)
        self._interrupt = LateInterrupt()  # of a command, which lets the step end
        self._graph: StepGraph | None = None
        if device.type == "cuda" and self.optimizer.is_constant and not self._schedulers:
            self._graph = StepGraph(lambda x, target: self._train(x, target, logs=False)[0])
        nodes = {node["_target_"]: node for node in first["callbacks"].values() if node}
        # As in a run of its own, the callback prunes.
        self._rungs = rungs if OPTUNA_PRUNING in nodes else None
        self._monitor = nodes.get(OPTUNA_PRUNING, {}).get("monitor")
        guard = nodes.get(LOSS_GUARD)
        self._watch = None if guard is None else LossWatch(instantiate(guard), device, len(configs))
        self._percentiles: StackPercentiles | None = None
        if PROBE in nodes:
            self._percentiles = StackPercentiles(
                instantiate(nodes[PROBE]),
                self.members[0].model,
                self.network,
                self._datamodule.val_dataloader(),
                self._last_step(),
            )
        validation = self._validation()
        self._validation_batches = sum(len(batches) for _, batches in validation)
        tests = [batches for name, batches in validation if name == "test"]
        of_test = self._datamodule.test_dataloader()
        self._validates_test = any(same_evaluation(batches, of_test) for batches in tests)
        self._progress: StackProgress | None = None
        if PROGRESS_BAR in nodes:
            # A sweep has a table in the terminal.
            is_live = STUDY_VARIABLE not in os.environ
            self._progress = StackProgress(self._last_step(), is_live=is_live)
        check_equivalence(self.network, models, states, self._first_batch())

    def run(self) -> list[dict[str, Any]]:
        """Train and test all members, and return their outcomes."""
        info = data_info(self._datamodule)
        for index, member in enumerate(self.runs):
            member.planned_steps = self._last_step()
            member.record.update(data=info, stack={"size": len(self.runs), "index": index})
        try:
            with recordable(self._device):
                with handle_signals(self._interrupt) if raises_interrupted() else nullcontext():
                    self._fit()
                self._test()
        except BaseException as error:
            for member in self.members:
                with suppress(OSError):  # as on a full disk, of which the first error tells
                    if isinstance(error, Exception):
                        member.end("failed", error=f"{type(error).__name__}: {error}")
                    else:
                        member.end("interrupted")
            raise
        return [run_outcome(member.record.content) for member in self.runs]

    def _check_memory(self, member: Member, size: int) -> None:
        """Raise a StackSizeError if not all members fit."""
        x, target = (p.value if p.dim is None else p.value[0] for p in self._first_batch())
        fits = fitting_members(member.model, x, target)
        if fits < size:
            raise StackSizeError(size, fits)

    def _last_step(self) -> int:
        limits = [self._trainer["max_steps"]]
        limits.append((self._trainer.get("max_epochs") or -1) * len(self.batches))
        return min((limit for limit in limits if limit > 0), default=0)

    def _first_batch(self) -> tuple[Placed, Placed]:
        x, target = next(self.batches.epoch(0))
        return self._placed(x), self._placed(target)

    def _placed(self, x: Placed) -> Placed:
        return Placed(placed_batch(x.value, self._like), x.dim)

    def _fit(self) -> None:
        step, epoch, last = 0, 0, self._last_step()
        self.network.network.train()
        self._clock = time.perf_counter()
        if self._percentiles is not None:
            self._percentiles.log(0, self.members)
        while step < last and self.members:
            for member in self.members:
                member.begin_epoch(epoch)
            for x, target in self.batches.epoch(epoch):
                step += 1
                for member in self.members:
                    member.steps = step
                running = len(self.members)
                self._step(step, self._placed(x), self._placed(target))
                if self._progress is not None:
                    self._progress.update(step, running)
                if self._interrupt.signum is not None:
                    for k in range(len(self.members)):
                        self._save(k)
                    raise Interrupted(self._interrupt.signum)
                if step == last or not self.members:
                    break
            epoch += 1
            for member in self.members:
                member.end_epoch()
        if self._progress is not None:
            self._progress.end()

    def _step(self, step: int, x: Placed, target: Placed) -> None:
        """Train a step, log, validate, and let members leave, in the order of a run."""
        every = self._trainer["log_every_n_steps"]
        logs = bool(every) and step % every == 0
        if self._graph is None or logs:
            losses, accuracies = self._train(x, target, logs)
        else:
            losses, accuracies = self._graph(x, target), None
        for scheduler in self._schedulers:
            scheduler.step()
        if self._schedulers:
            self.optimizer.read_numbers()
        diverged = self._watch.diverged(losses, x.value, step) if self._watch else []
        if self._percentiles is not None:
            self._percentiles.log(step, self.members)
        if accuracies is not None:
            pairs = zip(losses.tolist(), accuracies.tolist(), strict=True)
            for member, (loss, accuracy) in zip(self.members, pairs, strict=True):
                member.log({"train/loss": loss, "train/accuracy": accuracy})
        pruned: set[int] = set()
        if step % self._trainer["val_check_interval"] == 0:
            self._validate()
            pruned = self._judge(step)
        elif diverged:
            for k in diverged:
                self._validate_one(k)
        self._share_time()
        stopped = {k for k, member in enumerate(self.members) if member.stop_reason}
        if leaving := stopped | pruned | set(diverged):
            for k in sorted(leaving):
                self._leave(k, is_diverged=k in diverged, is_pruned=k in pruned)
            self._take([k for k in range(len(self.members)) if k not in leaving])

    def _train(self, x: Placed, target: Placed, logs: bool) -> tuple[Tensor, Tensor | None]:
        """Step the optimizer; return the losses (K,), and accuracies (K,) if they are logged."""
        # An update needs a gradient in the dtype of the parameter.
        self.network.context.update = None if self._is_mixed else self.optimizer.update
        with self._autocast():
            losses, accuracies = member_losses(self.network, self.members[0].model, x, target, logs)
        losses.backward(torch.ones_like(losses))
        self.optimizer.step()
        return losses.detach(), accuracies

    def _autocast(self) -> torch.autocast:
        """Return the context of a forward, as the Trainer's precision has it."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_mixed)

    def _validate(self) -> None:
        for name, batches in self._validation():
            self._evaluate(name, batches)
        for k in range(len(self.members)):
            self._end_validation(k)

    def _validate_one(self, k: int) -> None:
        for name, batches in self._validation():
            self._evaluate_one(k, name, batches)
        self._end_validation(k)

    def _end_validation(self, k: int) -> None:
        member = self.members[k]
        member.log(logged_numbers(member.model.take_metrics()))
        member.end_validation(lambda: self.network.member_state(k))

    def _evaluate(self, name: str, batches: Any) -> None:
        models = [member.model for member in self.members]
        with self._autocast():
            evaluate_stack(self.network, models, name, batches)

    def _evaluate_one(self, k: int, name: str, batches: Any) -> None:
        with self._autocast():
            evaluate_one(self._alone(k), name, batches)

    def _validation(self) -> list[tuple[str, Any]]:
        loaders = self._datamodule.val_dataloader()
        loaders = loaders if isinstance(loaders, list) else [loaders]
        return list(zip(("val", "test"), loaders, strict=False))

    def _alone(self, k: int) -> Classifier:
        """Return a member's own module, with the state that it has in the stack."""
        model = self.members[k].model
        self.network.load_member(model.network, k)
        return model

    def _judge(self, step: int) -> set[int]:
        """Report the members' values to their study, and return which are pruned."""
        if self._rungs is None:
            return set()
        values: dict[Any, float] = {}
        for member in self.members:
            if self._monitor not in member.metrics:
                raise ValueError(
                    "expected `callbacks.optuna_pruning.monitor` to be one of"
                    f" {', '.join(member.metrics)}, got {self._monitor!r}; name one of them"
                )
            values[member.trial] = member.metrics[self._monitor]
        pruned = self._rungs.report(values, step, self._last_step())
        return {k for k, member in enumerate(self.members) if member.trial in pruned}

    def _leave(self, k: int, *, is_diverged: bool, is_pruned: bool) -> None:
        """End a member before the others."""
        member = self.members[k]
        member.end_epoch()
        self._save(k)
        if is_diverged:
            chance = member.model.chance_metrics()
            member.end("diverged", diverged_at=member.steps, metrics=chance)
        elif is_pruned:
            pruner = "" if self._rungs is None else self._rungs.pruner
            reason = f"{pruner}, by {self._monitor} {member.metrics[self._monitor]:.4g}"
            member.end("pruned", pruned_at=member.steps, prune_reason=reason)
        else:
            if not self._has_tested(member):
                self._evaluate_one(k, "test", self._datamodule.test_dataloader())
            self._end_tested(member)

    def _test(self) -> None:
        """Test and end the members that are left."""
        if not self.members:
            return
        if not all(map(self._has_tested, self.members)):
            self._evaluate("test", self._datamodule.test_dataloader())
        for k, member in enumerate(self.members):
            self._save(k)
            self._end_tested(member)

    def _end_tested(self, member: Member) -> None:
        """Log the test and end a member."""
        if self._has_tested(member):
            tested = {k: v for k, v in member.metrics.items() if k.startswith("test/")}
        else:
            tested = logged_numbers(member.model.take_metrics())
        member.log(tested)
        member.end_trained()

    def _has_tested(self, member: Member) -> bool:
        """Return whether the last validation has measured the test set with these weights."""
        return self._validates_test and member.validated_at == member.steps

    def _save(self, k: int) -> None:
        member = self.members[k]
        state = self._datamodule.state_dict()
        data_state = {type(self._datamodule).__qualname__: state} if state else {}
        member.save(self.network.member_state(k), self._state_of_run(k), data_state)

    def _state_of_run(self, k: int) -> dict[str, Any]:
        """Return what a run needs that goes on from a member's checkpoint."""
        member = self.members[k]
        callbacks = {SameData.__qualname__: {"sha256": self._datamodule.info.get("sha256")}}
        if self._watch is not None:
            callbacks[DivergenceGuard.__qualname__] = self._watch.member_state(k)
        schedulers = [self._schedulers[k]] if self._schedulers else []
        validated = Validated(member.validated_at, member.validations, self._validation_batches)
        return {
            "callbacks": callbacks,
            "loops": loop_state(
                member.steps,
                len(self.batches),
                self.batches.member_state(k),
                validated,
                is_scheduled=bool(schedulers),
            ),
            "optimizer_states": [self.optimizer.member_state(k)],
            "lr_schedulers": [scheduler.state_dict() for scheduler in schedulers],
        }

    def _share_time(self) -> None:
        """Give each member its share of the time since the last call."""
        now = time.perf_counter()
        for member in self.members:
            member.seconds += (now - self._clock) / len(self.members)
        self._clock = now

    def _take(self, members: list[int]) -> None:
        """Keep the given members only."""
        self.members = [self.members[k] for k in members]
        if not members:
            return
        self.network.take(members)
        self.optimizer.take(members, self.network.network.parameters())
        self.batches.take(members)
        if self._graph is not None:
            self._graph.forget()
        if self._schedulers:
            self._schedulers = [self._schedulers[k] for k in members]
        if self._watch is not None:
            self._watch.take(members)


def _device(accelerator: str) -> torch.device:
    is_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_gpu else "cpu")
