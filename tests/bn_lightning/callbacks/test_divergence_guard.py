"""A loss that is no number ends the run and says at which step; data that are none are an error."""

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
    # Lightning 2.6 asks torch 2.13 for a class that the latter has deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning advises worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Losses(LightningModule):
    """Its loss at each step is given; 1 after the last of them. None skips the step."""

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
    """Batches as given, or ten of ones; the last is repeated for more steps."""
    return DataLoader(list(batches) or [torch.ones(2)] * 10, batch_size=None)


def fit(
    folder: Path,
    guard: DivergenceGuard,
    module: LightningModule,
    data: DataLoader | None = None,
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
    trainer.fit(module, loader() if data is None else data, weights_only=True)
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
        # Each step multiplies the weight by some -4e12; its square passes 2**128 in the fifth.
        assert guard.diverged_at is not None
        assert 1 < guard.diverged_at == module.taken < 10

    @pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
    def test_a_skipped_step_is_no_divergence(self, tmp_path: Path) -> None:
        """Lightning lets a training step return None."""
        guard = DivergenceGuard(every_n_steps=1)
        fit(tmp_path, guard, Losses(1.0, None, math.nan), max_steps=-1, max_epochs=1)
        assert guard.diverged_at == 3  # Lightning counts the skipped step

    def test_a_module_that_optimises_by_hand_may_return_nothing(self, tmp_path: Path) -> None:
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


class TestData:
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
    def test_inputs_that_are_no_numbers_are_an_error(self, tmp_path: Path, value: float) -> None:
        spoiled = torch.tensor([1.0, value, value])
        data = loader((torch.ones(3), torch.tensor(1)), (spoiled, torch.tensor(1)))
        guard = DivergenceGuard(every_n_steps=1)
        with pytest.raises(ValueError, match="batch of step 2 expected finite inputs, got 2"):
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
    def test_it_looks_every_n_steps(self) -> None:
        """A look waits for the device: a loss that is not the CPU's is read at those steps only."""

        class OnDevice:
            is_cpu = False

            def __init__(self, looked: list[int], step: int) -> None:
                self.looked, self.step = looked, step

            def item(self) -> float:
                self.looked.append(self.step)
                return math.nan if self.step > 7 else 1.0

        guard, looked = DivergenceGuard(every_n_steps=5), []
        trainer: Any = SimpleNamespace(global_step=0, should_stop=False, world_size=1)
        module: Any = None
        for step in range(1, 11):
            trainer.global_step = step
            guard.on_train_batch_end(trainer, module, {"loss": OnDevice(looked, step)}, [], 0)
        assert looked == [5, 10]
        assert guard.diverged_at == 10
        assert trainer.should_stop


class TestState:
    def test_checkpoints_remember_the_step(self, tmp_path: Path) -> None:
        guard = DivergenceGuard(every_n_steps=1)
        trainer = fit(tmp_path, guard, Losses(1.0, math.nan))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)
        other = DivergenceGuard(every_n_steps=1)
        other.load_state_dict(state["callbacks"][other.state_key])
        assert other.diverged_at == 2

    def test_validation_still_follows(self, tmp_path: Path) -> None:
        """So that the last thing in the log of the run is how bad it was."""
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
