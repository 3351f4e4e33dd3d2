"""DivergenceGuard: NaN or high losses stop the run at a known step; bad data are an error."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import DivergenceGuard

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning recommends worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Losses(LightningModule):
    """Has a given loss at each step, then 1. None skips the step."""

    def __init__(self, *losses: float | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.losses = losses
        self.taken = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.losses[self.taken] if self.taken < len(self.losses) else 1.0
        self.taken += 1
        return None if loss is None else self.weight * loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(*batches: Any) -> DataLoader:
    """Return a loader of the given batches, or of ten of ones; the last one repeats."""
    return DataLoader(list(batches) or [torch.ones(2)] * 10, batch_size=None)


def fit(
    folder: Path,
    guard: DivergenceGuard,
    module: LightningModule,
    data: DataLoader | None = None,
    *,
    ckpt_path: Path | None = None,
    save_to: Path | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 10, **options},
    )
    data = loader() if data is None else data
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return trainer


class TestDivergence:
    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("step", [1, 4])
    def test_it_ends_the_run_at_that_step(self, tmp_path: Path, loss: float, step: int) -> None:
        guard = DivergenceGuard(every_n_steps=50)
        module = Losses(*[1.0] * (step - 1), loss)
        trainer = fit(tmp_path, guard, module)
        assert guard.diverged_at == step
        assert trainer.global_step == module.taken == step

    @pytest.mark.parametrize("loss", [0.0, -1e38, 1e38], ids=str)
    def test_finite_losses_are_none_of_its_business(self, tmp_path: Path, loss: float) -> None:
        guard = DivergenceGuard(every_n_steps=1)
        trainer = fit(tmp_path, guard, Losses(loss, loss))
        assert guard.diverged_at is None
        assert trainer.global_step == 10

    def test_weights_that_explode(self, tmp_path: Path) -> None:
        class Quadratic(Losses):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.taken += 1
                return (self.weight * batch).square().sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=1e12)

        guard, module = DivergenceGuard(every_n_steps=50), Quadratic()
        fit(tmp_path, guard, module)
        # Each step multiplies the weight by about -4e12; in the fifth its square exceeds 2**128.
        assert guard.diverged_at is not None
        assert 1 < guard.diverged_at == module.taken < 10

    @pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
    def test_a_skipped_step_is_no_divergence(self, tmp_path: Path) -> None:
        """A training step may return None."""
        guard = DivergenceGuard(every_n_steps=1)
        fit(tmp_path, guard, Losses(1.0, None, math.nan), max_steps=-1, max_epochs=1)
        assert guard.diverged_at == 3  # Lightning counts the skipped step

    def test_manual_optimization_may_return_nothing(self, tmp_path: Path) -> None:
        class Manual(Losses):
            automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.weight * 1.0)
                optimizer.step()

        guard = DivergenceGuard(every_n_steps=1)
        assert fit(tmp_path, guard, Manual()).global_step == 10
        assert guard.diverged_at is None


class TestMaxLoss:
    @pytest.mark.parametrize(
        ("losses", "patience", "diverged_at"),
        [
            ([5.0] * 10, 3, 3),
            ([5.0], 1, 1),
            ([1.0, 1.0, 5.0, 5.0, 5.0], 3, 5),
            ([5.0, 5.0, 1.0, 5.0, 5.0, 5.0], 3, 6),
            ([5.0, 5.0, 1.0] * 3, 3, None),
            ([2.0] * 10, 1, None),
            ([2.001], 1, 1),
            ([5.0, math.nan], 3, 2),
            ([5.0, -5.0, 5.0, 5.0], 2, 4),
        ],
        ids=[
            "from_the_first_step",
            "without_patience",
            "later",
            "anew_after_a_lower_one",
            "never_for_long",
            "equal_is_not_above",
            "just_above",
            "nan_waits_for_nothing",
            "negative_is_below",
        ],
    )
    def test_it_ends_the_run_when_above_for_long(
        self, tmp_path: Path, losses: list[float], patience: int, diverged_at: int | None
    ) -> None:
        guard = DivergenceGuard(every_n_steps=50, max_loss=2.0, patience=patience)
        trainer = fit(tmp_path, guard, Losses(*losses))
        assert guard.diverged_at == diverged_at
        assert trainer.global_step == (diverged_at or 10)

    def test_the_default_patience(self, tmp_path: Path) -> None:
        guard = DivergenceGuard(every_n_steps=50, max_loss=2.0)
        fit(tmp_path, guard, Losses(*[5.0] * 200), max_steps=150)
        assert guard.diverged_at == 100

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
    def test_it_is_finite(self, value: float) -> None:
        with pytest.raises(ValueError, match="`max_loss`.*finite"):
            DivergenceGuard(every_n_steps=1, max_loss=value)

    @pytest.mark.parametrize("value", [0, -5])
    def test_patience_is_positive(self, value: int) -> None:
        with pytest.raises(ValueError, match=f"`patience`.*positive integer, got {value}"):
            DivergenceGuard(every_n_steps=1, max_loss=1.0, patience=value)


class TestAccumulatedGradients:
    def test_the_loss_is_that_of_the_module(self, tmp_path: Path) -> None:
        """Lightning divides the loss by the number of accumulated batches."""
        guard = DivergenceGuard(every_n_steps=50, max_loss=2.0, patience=1)
        fit(tmp_path, guard, Losses(*[1.9] * 10, *[2.1] * 5), accumulate_grad_batches=5)
        assert guard.diverged_at == 3

    def test_patience_counts_steps(self, tmp_path: Path) -> None:
        guard = DivergenceGuard(every_n_steps=50, max_loss=2.0, patience=3)
        module = Losses(*[5.0] * 20)
        trainer = fit(tmp_path, guard, module, accumulate_grad_batches=2)
        assert guard.diverged_at == trainer.global_step == 3
        assert module.taken == 6

    @pytest.mark.parametrize(("batch", "step"), [(1, 1), (2, 1), (3, 2)], ids=str)
    def test_the_step_is_that_of_the_batch(self, tmp_path: Path, batch: int, step: int) -> None:
        guard = DivergenceGuard(every_n_steps=50)
        module = Losses(*[1.0] * (batch - 1), math.nan)
        fit(tmp_path, guard, module, accumulate_grad_batches=2)
        assert guard.diverged_at == step
        assert module.taken == batch


class TestData:
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
    def test_inputs_that_are_no_numbers_are_an_error(self, tmp_path: Path, value: float) -> None:
        spoiled = torch.tensor([1.0, value, value])
        data = loader((torch.ones(3), torch.tensor(1)), (spoiled, torch.tensor(1)))
        guard = DivergenceGuard(every_n_steps=1)
        with pytest.raises(ValueError, match="batch of step 2.*finite inputs, got 2"):
            fit(tmp_path, guard, Losses(1.0, math.nan), data)

    @pytest.mark.parametrize(
        "batch",
        [torch.tensor([math.nan, 1.0]), {"x": torch.tensor([math.nan, 1.0])}],
        ids=["tensor", "dict"],
    )
    def test_whatever_the_batch_is(self, tmp_path: Path, batch: Any) -> None:
        with pytest.raises(ValueError, match="finite inputs, got 1"):
            fit(tmp_path, DivergenceGuard(every_n_steps=1), Losses(math.nan), loader(batch))

    def test_integers_are_finite(self, tmp_path: Path) -> None:
        guard = DivergenceGuard(every_n_steps=1)
        dataset = TensorDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))
        fit(tmp_path, guard, Losses(math.nan), DataLoader(dataset, 2))
        assert guard.diverged_at == 1


class TestAccelerator:
    """Reading a loss synchronizes the device, so off the CPU it is read at some steps only."""

    def looks(self, guard: DivergenceGuard, losses: list[float]) -> list[int]:
        class OnDevice:
            is_cpu = False

            def __init__(self, step: int) -> None:
                self.step = step

            def item(self) -> float:
                looked.append(self.step)
                return losses[self.step - 1]

        looked: list[int] = []
        trainer: Any = SimpleNamespace(
            global_step=0,
            should_stop=False,
            world_size=1,
            accumulate_grad_batches=1,
            fit_loop=SimpleNamespace(batch_idx=0),
        )
        module: Any = None
        while not trainer.should_stop and trainer.global_step < len(losses):
            trainer.global_step += 1
            loss = OnDevice(trainer.global_step)
            guard.on_train_batch_end(trainer, module, {"loss": loss}, [], 0)
        return looked

    def test_it_looks_every_n_steps(self) -> None:
        guard = DivergenceGuard(every_n_steps=5)
        assert self.looks(guard, [1.0] * 7 + [math.nan] * 13) == [5, 10]
        assert guard.diverged_at == 10

    @pytest.mark.parametrize(
        ("losses", "patience", "diverged_at"),
        [
            ([5.0] * 20, 5, 10),
            ([5.0] * 20, 7, 15),
            ([1.0] * 5 + [5.0] * 15, 5, 15),
            (([1.0] * 4 + [5.0]) * 4, 5, 10),
            (([5.0] * 4 + [1.0]) * 4, 5, None),
            ([5.0] * 20, 1, 5),
        ],
        ids=["patience_5", "patience_7", "later", "at_looks", "between_looks", "at_once"],
    )
    def test_patience_counts_steps_from_look_to_look(
        self, losses: list[float], patience: int, diverged_at: int | None
    ) -> None:
        guard = DivergenceGuard(every_n_steps=5, max_loss=2.0, patience=patience)
        self.looks(guard, losses)
        assert guard.diverged_at == diverged_at


@pytest.mark.parametrize(
    ("losses", "diverged_at"),
    [([1.0, math.nan], 2), ([5.0] * 10, 4)],
    ids=["no_number", "high"],
)
def test_one_of_two_ranks_ends_both(
    tmp_path: Path, two_ranks: dict[str, Any], losses: list[float], diverged_at: int
) -> None:
    class Reporting(DivergenceGuard):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            report = self.diverged_at, trainer.global_step
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")

    class SecondRank(Losses):
        def setup(self, stage: str) -> None:
            if self.global_rank == 0:
                self.losses = ()

    guard = Reporting(every_n_steps=2, max_loss=2.0, patience=3)
    data = DataLoader(torch.ones(20, 2))
    fit(tmp_path, guard, SecondRank(*losses), data, **two_ranks)
    reports = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert reports == [(diverged_at, diverged_at)] * 2


class TestState:
    def test_checkpoints_remember_the_step(self, tmp_path: Path) -> None:
        guard = DivergenceGuard(every_n_steps=1)
        trainer = fit(tmp_path, guard, Losses(1.0, math.nan))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)
        other = DivergenceGuard(every_n_steps=1)
        other.load_state_dict(state["callbacks"][other.state_key])
        assert other.diverged_at == 2

    def test_resuming_goes_on_counting(self, tmp_path: Path) -> None:
        def run(losses: list[float], steps: int, **options: Any) -> DivergenceGuard:
            guard = DivergenceGuard(every_n_steps=50, max_loss=2.0, patience=4)
            data = loader(torch.ones(2), torch.ones(2))  # epochs of two steps
            fit(tmp_path, guard, Losses(*losses), data, max_steps=steps, **options)
            return guard

        path = tmp_path / "a.ckpt"
        assert run([1.0, 5.0], 2, save_to=path).diverged_at is None
        assert run([5.0] * 10, 10, ckpt_path=path).diverged_at == 5
        assert run([1.0] + [5.0] * 10, 10, ckpt_path=path).diverged_at == 7

    def test_checkpoints_from_before_there_was_a_limit(self) -> None:
        guard = DivergenceGuard(every_n_steps=1, max_loss=2.0)
        guard.load_state_dict({"diverged_at": None})
        assert guard.state_dict() == DivergenceGuard(every_n_steps=1).state_dict()

    def test_validation_still_follows(self, tmp_path: Path) -> None:
        """The log of the run then ends with the diverged loss."""
        seen: list[int] = []

        class Seen(Callback):
            def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
                seen.append(trainer.global_step)

        class Validated(Losses):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                pass

        guard = DivergenceGuard(every_n_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[guard, Seen()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            max_steps=10,
        )
        trainer.fit(Validated(1.0, 1.0, math.nan), loader(), loader())
        assert seen == [3]

    @pytest.mark.parametrize("value", [0, -5])
    def test_every_n_steps_is_positive(self, value: int) -> None:
        with pytest.raises(ValueError, match=f"`every_n_steps`.*positive integer, got {value}"):
            DivergenceGuard(every_n_steps=value)
