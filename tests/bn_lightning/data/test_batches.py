"""Batches by index: their order, their division among ranks, resuming them under Lightning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import SequentialSampler

from bn_lightning.data.batches import TensorBatches

# Lightning 2.6 asks torch 2.13 for a class that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SAMPLES = 23  # leaves 3 over batches of 4
BATCH = 4
EPOCH = SAMPLES // BATCH  # batches


def numbered(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Inputs and targets that both say which sample they are."""
    targets = torch.arange(samples)
    return targets[:, None].float().expand(-1, 3).contiguous(), targets


def shuffled(**options: Any) -> TensorBatches:
    options = {"shuffle": True, "drop_last": True, **options}
    return TensorBatches(*numbered(), BATCH, **options)


def order(batches: TensorBatches) -> list[list[int]]:
    return [targets.tolist() for _, targets in batches]


class TestOrder:
    def test_inputs_go_with_their_targets(self) -> None:
        for inputs, targets in shuffled():
            assert inputs.shape == (BATCH, 3)
            assert torch.equal(inputs[:, 0].long(), targets)

    def test_each_sample_once(self) -> None:
        taken = sum(order(shuffled()), [])
        assert len(taken) == len(set(taken)) == EPOCH * BATCH
        assert sorted(sum(order(shuffled(drop_last=False)), [])) == list(range(SAMPLES))

    def test_it_depends_on_seed_and_epoch_alone(self) -> None:
        orders = {}
        for seed in (0, 1):
            batches = shuffled(seed=seed)
            for epoch in (0, 1):
                batches.set_epoch(epoch)
                orders[seed, epoch] = order(batches)
        # All four differ; above all (0, 1) and (1, 0), which a sum would confuse.
        assert len({str(order) for order in orders.values()}) == 4

        torch.manual_seed(99)
        again = shuffled(seed=1)
        again.set_epoch(5)
        order(again)
        again.set_epoch(1)
        assert order(again) == orders[1, 1]
        assert order(again) == orders[1, 1], "the epoch changes by set_epoch alone"

    def test_the_global_random_stream_is_untouched(self) -> None:
        before = torch.get_rng_state()
        order(shuffled())
        assert torch.equal(torch.get_rng_state(), before)

    def test_unshuffled_batches_are_views_in_order(self) -> None:
        inputs, targets = numbered()
        batches = TensorBatches(inputs, targets, 10)
        assert [len(targets) for _, targets in batches] == [8, 8, 7]
        assert sum(order(batches), []) == list(range(SAMPLES))
        for part, _ in batches:
            assert part.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()

    def test_no_batch_of_one_is_left_over(self) -> None:
        batches = TensorBatches(*numbered(21), 20)
        assert [len(targets) for _, targets in batches] == [11, 10]

    def test_lightning_finds_what_it_looks_for(self) -> None:
        batches = shuffled()
        assert batches.sampler is batches.batch_sampler is batches
        assert isinstance(TensorBatches(*numbered(), BATCH).sampler, SequentialSampler)


class TestRanks:
    @pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in_order"])
    @pytest.mark.parametrize("drop_last", [True, False], ids=["full", "all"])
    def test_disjoint_and_equally_many(self, shuffle: bool, drop_last: bool) -> None:
        ranks = [
            order(shuffled(shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=2))
            for rank in range(2)
        ]
        assert len(ranks[0]) == len(ranks[1]) == (2 if drop_last else 3)
        taken = sum(sum(ranks, []), [])
        assert len(taken) == len(set(taken)) == (2 * 2 * BATCH if drop_last else SAMPLES)

    def test_together_they_take_the_batches_of_one(self) -> None:
        two = [order(shuffled(rank=rank, world_size=2)) for rank in range(2)]
        one = TensorBatches(*numbered(), 2 * BATCH, shuffle=True, drop_last=True)
        assert [first + second for first, second in zip(*two, strict=True)] == order(one)


class TestState:
    @pytest.mark.parametrize("position", range(EPOCH + 1))
    def test_goes_on_after_the_last_batch(self, position: int) -> None:
        batches = shuffled(seed=3)
        batches.set_epoch(2)
        iterator = iter(batches)
        for _ in range(position):
            next(iterator)
        state = batches.state_dict()
        whole = order(batches)

        resumed = shuffled(seed=3)
        resumed.load_state_dict(state)
        iter(resumed)  # Lightning makes one iterator only to see whether it can
        rest = iter(resumed)
        resumed.set_epoch(2)  # and calls this after it has made the one it uses
        assert resumed.state_dict() == state, "also before its first batch"
        assert [targets.tolist() for _, targets in rest] == whole[position:]
        assert order(resumed) == whole, "the next iteration is whole again"

    def test_a_new_epoch_forgets_the_position(self) -> None:
        batches = shuffled()
        batches.load_state_dict({**batches.state_dict(), "epoch": 1, "position": 2})
        batches.set_epoch(2)
        assert len(order(batches)) == EPOCH

    def test_in_order_too(self) -> None:
        batches = TensorBatches(*numbered(), 10)
        batches.load_state_dict({**batches.state_dict(), "position": 2})
        assert order(batches) == [list(range(16, 23))]

    def test_it_is_the_same_on_all_ranks(self) -> None:
        first, second = (shuffled(rank=rank, world_size=2) for rank in range(2))
        next(iter(first))
        next(iter(second))
        assert first.state_dict() == second.state_dict()

    @pytest.mark.parametrize(
        ("option", "message"),
        [({"seed": 1}, "seed 0, now 1"), ({"world_size": 2}, "world_size 1, now 2")],
        ids=["seed", "ranks"],
    )
    def test_another_run_is_refused(self, option: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            shuffled(**option).load_state_dict(shuffled().state_dict())


class TestArguments:
    @pytest.mark.parametrize("size", [True, 4.0, "4"], ids=repr)
    def test_batch_size_is_an_integer(self, size: Any) -> None:
        with pytest.raises(TypeError, match="`batch_size`"):
            TensorBatches(*numbered(), size)

    @pytest.mark.parametrize(
        ("size", "options", "message"),
        [
            (0, {}, "`batch_size`"),
            (24, {"drop_last": True}, "`batch_size`.*23 samples"),
            (12, {"drop_last": True, "world_size": 2}, "`batch_size`"),
            (1, {"world_size": 2}, "`batch_size`"),
            (4, {"seed": -1}, "`seed`"),
            (4, {"rank": 2, "world_size": 2}, r"`rank`.*\[0, 2\)"),
        ],
    )
    def test_out_of_range(self, size: int, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TensorBatches(*numbered(), size, **options)

    def test_lengths_agree(self) -> None:
        inputs, targets = numbered()
        with pytest.raises(ValueError, match="22 and 23"):
            TensorBatches(inputs, targets[:-1], BATCH)


class _Recorder(LightningModule):
    """Notes which samples each training step gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.taken: list[tuple[int, list[int]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.taken.append((self.current_epoch, targets.tolist()))
        return (self.linear(inputs / SAMPLES) - 1).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _SaveEverywhere(Callback):
    """A checkpoint from each hook that callbacks save from, named after hook and batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, hook: str, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"{hook}-{trainer.fit_loop.total_batch_idx}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save("batch", trainer)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.save("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        # With `max_steps`, Lightning 2.6 counts the epoch once more when it resumes from here.
        if trainer.max_steps == -1:
            self.save("epoch", trainer)


def fit(
    folder: Path, callbacks: list[Callback], ckpt_path: Path | None = None, **options: Any
) -> _Recorder:
    torch.manual_seed(0)
    module = _Recorder()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        **{"max_epochs": 3, "val_check_interval": 2, **options},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, shuffled(seed=7), TensorBatches(*numbered(), 20), ckpt_path=ckpt_path)
    return module


class TestLightning:
    def test_each_epoch_has_the_order_of_its_number(self, tmp_path: Path) -> None:
        taken = fit(tmp_path, []).taken
        batches = shuffled(seed=7)
        for epoch in range(3):
            batches.set_epoch(epoch)
            assert [samples for number, samples in taken if number == epoch] == order(batches)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"val_check_interval": 1.0},
            {"limit_train_batches": 4},
            {"accumulate_grad_batches": 2},
            {"max_steps": 12},
        ],
        ids=["mid_epoch", "epoch_end", "limited", "accumulating", "by_steps"],
    )
    def test_a_resumed_run_takes_the_batches_that_were_left(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        whole = fit(tmp_path, [_SaveEverywhere(tmp_path)], **options)
        checkpoints = sorted(tmp_path.glob("*.ckpt"))
        assert {path.name.split("-")[0] for path in checkpoints} >= {"batch", "validation"}
        for checkpoint in checkpoints:
            state = torch.load(checkpoint, weights_only=True)
            progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
            resumed = fit(tmp_path, [], checkpoint, **options)
            assert resumed.taken == whole.taken[progress["ready"] :], checkpoint.name
            if "accumulate_grad_batches" in options:
                continue  # Lightning keeps no half-accumulated gradients
            for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
                assert torch.equal(ours, theirs), checkpoint.name

    def test_overfitting_shuffles_nothing_away(self, tmp_path: Path) -> None:
        # An order that is already sequential needs no warning of Lightning's, which is an error.
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            overfit_batches=2,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = _Recorder()
        loaders = (TensorBatches(*numbered(), BATCH) for _ in range(2))
        trainer.fit(module, *loaders)
        assert [samples for _, samples in module.taken] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
