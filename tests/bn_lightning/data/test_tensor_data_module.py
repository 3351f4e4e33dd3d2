"""What all data modules over whole tensors share, on arrays made here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bn_lightning.data.errors import DataError
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule, split_samples

TRAIN, TEST = 48, 10


def arrays(dtype: type = np.uint8) -> Arrays:
    """Each input holds the number of its sample, tests counting from 100."""

    def numbered(first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count, dtype=dtype)[:, None].repeat(3, axis=1)

    return Arrays(
        train_inputs=numbered(0, TRAIN),
        train_targets=np.arange(TRAIN, dtype=np.uint8) % 10,
        test_inputs=numbered(100, TEST),
        test_targets=np.arange(TEST, dtype=np.uint8) % 10,
        classes=10,
        source="numbers",
        root="memory",
        sha256={"numbers": "0" * 64},
    )


class Numbers(TensorDataModule):
    def __init__(self, data: Arrays | None = None, **options: Any) -> None:
        defaults = {
            "batch_size": 4,
            "eval_batch_size": 6,
            "validation_fraction": 1 / 12,
            "seed": 0,
        }
        super().__init__(**{**defaults, **options})
        self.data = data or arrays()

    def load(self) -> Arrays:
        return self.data


def ready(data: Arrays | None = None, **options: Any) -> Numbers:
    module = Numbers(data, **options)
    module.setup("fit")
    return module


def samples(inputs: Tensor) -> list[int]:
    return (inputs[:, 0] * 255).round().int().tolist()


class TestSplit:
    def test_it_divides_the_training_set(self) -> None:
        train, validation = split_samples(60_000, 1 / 12, "validation_fraction")
        assert (len(train), len(validation)) == (55_000, 5_000)
        assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(60_000))

    def test_it_never_moves(self) -> None:
        # Pinned: with another cut, runs of different versions could not be compared.
        assert split_samples(60_000, 1 / 12, "validation_fraction")[1][:5].tolist() == [
            9,
            24,
            49,
            60,
            65,
        ]
        # The fraction as the configs round it.
        assert np.array_equal(
            split_samples(60_000, 0.0833333333, "validation_fraction")[1],
            split_samples(60_000, 1 / 12, "validation_fraction")[1],
        )

    def test_the_seed_of_a_run_does_not_change_it(self) -> None:
        first, second = ready(seed=0), ready(seed=1)
        for mine, other in (
            (first.train_dataloader(), second.train_dataloader()),
            (first.val_dataloader(), second.val_dataloader()),
        ):
            assert torch.equal(mine.inputs, other.inputs)
        assert [t.tolist() for _, t in first.train_dataloader()] != [
            t.tolist() for _, t in second.train_dataloader()
        ]

    @pytest.mark.parametrize("fraction", [0.001, 0.999])
    def test_neither_part_may_be_empty(self, fraction: float) -> None:
        with pytest.raises(DataError, match="`validation_fraction`.*48 samples"):
            ready(validation_fraction=fraction)

    def test_fewer_training_samples(self) -> None:
        module, whole, other = ready(train_samples=20), ready(), ready(train_samples=20, seed=1)
        kept = samples(module.train_dataloader().inputs)
        everything = samples(whole.train_dataloader().inputs)
        assert len(set(kept)) == module.info["train"] == 20
        assert set(kept) < set(everything)
        assert kept != everything[:20]  # a file may be sorted by class
        assert kept == samples(other.train_dataloader().inputs)
        assert torch.equal(module.val_dataloader().inputs, whole.val_dataloader().inputs)
        assert samples(ready(train_samples=44).train_dataloader().inputs) == everything
        with pytest.raises(DataError, match="`train_samples`.*44"):
            ready(train_samples=45)
        with pytest.raises(ValueError, match="`train_samples`"):
            ready(train_samples=0)


class TestLoaders:
    def test_the_three_parts(self) -> None:
        module = ready()
        train, validation = module.train_dataloader(), module.val_dataloader()
        assert (len(train), len(validation), len(module.test_dataloader())) == (11, 1, 2)
        assert train.shuffle
        assert train.drop_last
        together = samples(train.inputs) + samples(validation.inputs)
        assert sorted(together) == list(range(TRAIN))
        assert samples(module.test_dataloader().inputs) == list(range(100, 100 + TEST))

    def test_bytes_become_floats_in_the_unit_interval(self) -> None:
        batches = ready().test_dataloader()
        assert batches.inputs.dtype == torch.float32
        assert batches.targets.dtype == torch.int64
        expected = torch.arange(100, 110, dtype=torch.uint8).float().div(255)
        assert torch.equal(batches.inputs[:, 0], expected)

    def test_floats_stay(self) -> None:
        batches = ready(arrays(np.float64)).test_dataloader()
        assert batches.inputs.dtype == torch.float32
        assert batches.inputs[0, 0] == 100

    @pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int64, np.float16], ids=str)
    def test_other_numbers_are_not_scaled(self, dtype: type) -> None:
        data = replace(arrays(), test_inputs=np.ones((TEST, 3), dtype))
        inputs = ready(data).test_dataloader().inputs
        assert inputs.dtype == torch.float32 and (inputs == 1).all()

    def test_samples_of_others_as_the_tests(self) -> None:
        """With a transform or without; `epoch` is 0, as in evaluations."""
        given = np.full((2, 3), 51, np.uint8)
        assert torch.equal(ready().evaluated(given), torch.full((2, 3), 0.2))

        class Shifted(Numbers):
            def transform(self, split: str) -> Any:
                return lambda x, indices, epoch: x.float() + indices[:, None] + 100 * epoch

        expected = torch.tensor([[51.0], [52.0]]).expand(2, 3)
        assert torch.equal(Shifted().evaluated(given), expected)

    def test_test_curve_adds_the_test_set_second(self) -> None:
        validation, test = ready(test_curve=True).val_dataloader()
        assert len(validation.targets) == 4
        assert samples(test.inputs) == list(range(100, 100 + TEST))

    def test_the_data_is_loaded_and_held_once(self) -> None:
        module = ready(test_curve=True)
        inputs = module.test_dataloader().inputs
        module.setup("test")
        assert module.test_dataloader().inputs is inputs
        assert module.val_dataloader()[1].inputs is inputs


class TestInfo:
    def test_plain_values(self) -> None:
        module = ready()
        assert module.info == {
            "source": "numbers",
            "root": "memory",
            "sha256": {"numbers": "0" * 64},
            "classes": 10,
            "train": 44,
            "validation": 4,
            "test": 10,
        }
        module.info["sha256"].clear()
        assert module.info["sha256"]

    def test_setup_comes_first(self) -> None:
        with pytest.raises(RuntimeError, match="`setup`"):
            _ = Numbers().info
        with pytest.raises(RuntimeError, match="`setup`"):
            Numbers().train_dataloader()


class TestRefusals:
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_values_that_are_not_finite(self, value: float, split: str) -> None:
        data = arrays(np.float32)
        inputs = getattr(data, f"{split}_inputs")
        inputs[3, 0] = inputs[3, 1] = inputs[7, 2] = value
        with pytest.raises(DataError, match=r"3 values.*in 2 samples.*at \[3, 7\]") as caught:
            ready(data)
        assert ("training" if split == "train" else "test") in str(caught.value)

    @pytest.mark.parametrize("target", [10, 255, -1])
    def test_targets_that_are_no_class(self, target: int) -> None:
        targets = arrays().test_targets.astype(np.int64)
        targets[2] = target
        with pytest.raises(DataError, match=rf"\[0, 10\), got {target} and 0 more.*at \[2\]"):
            ready(replace(arrays(), test_targets=targets))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train_targets": np.zeros(47, np.uint8)}, "48 inputs and 47 targets"),
            ({"train_targets": np.zeros(49, np.uint8)}, "48 inputs and 49 targets"),
            (
                {"test_inputs": np.zeros((0, 3), np.uint8), "test_targets": np.zeros(0, np.uint8)},
                "0 inputs and 0 targets",
            ),
        ],
        ids=["fewer", "more", "empty"],
    )
    def test_numbers_that_do_not_agree(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            ready(replace(arrays(), **change))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"batch_size": 0}, ValueError, "`batch_size`"),
            ({"batch_size": 2.5}, TypeError, "`batch_size`"),
            ({"eval_batch_size": True}, TypeError, "`eval_batch_size`"),
            ({"eval_batch_size": 0}, ValueError, "`eval_batch_size`"),
            ({"seed": -1}, ValueError, "`seed`"),
            ({"validation_fraction": 0}, ValueError, "`validation_fraction`"),
            ({"validation_fraction": -0.5}, ValueError, "`validation_fraction`"),
            ({"validation_fraction": 1}, ValueError, "`validation_fraction`"),
            ({"validation_fraction": 1.5}, ValueError, "`validation_fraction`"),
            ({"validation_fraction": 5000}, ValueError, "`validation_fraction`"),
            (
                {"validation_fraction": float("nan")},
                ValueError,
                "`validation_fraction`",
            ),
        ],
    )
    def test_arguments(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Numbers(**options)

    def test_the_smallest_batches(self) -> None:
        module = ready(batch_size=1, eval_batch_size=1, validation_fraction=1 / TRAIN)
        assert [len(m) for m in (module.val_dataloader(), module.test_dataloader())] == [1, TEST]

    def test_five_samples_are_named(self) -> None:
        targets = arrays().test_targets.astype(np.int64)
        targets[1:8] = np.arange(20, 27)
        message = r"got 20 and 6 more outside.* \[1, 2, 3, 4, 5\]$"
        with pytest.raises(DataError, match=message):
            ready(replace(arrays(), test_targets=targets))

    def test_a_batch_larger_than_the_training_set(self) -> None:
        with pytest.raises(ValueError, match="`batch_size`.* 45 with 44 samples"):
            ready(batch_size=45).train_dataloader()


class _Taken(LightningModule):
    """Notes the samples of each step of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.train_samples: list[list[int]] = []
        self.eval_samples: dict[int, list[int]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.train_samples.append(samples(batch[0]))
        return self.linear(batch[0]).square().mean()

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.eval_samples.setdefault(dataloader_idx, []).extend(samples(batch[0]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch, 0, -1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Lightning 2.6 asks torch 2.13 for a class that the latter has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
class TestTrainer:
    def trainer(self, folder: Path, **options: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )

    def test_fit_and_test(self, tmp_path: Path) -> None:
        module, data = _Taken(), Numbers(test_curve=True)
        trainer = self.trainer(tmp_path, max_epochs=2)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        first, second = module.train_samples[:11], module.train_samples[11:]
        assert len(second) == 11
        assert first != second
        assert sorted(sum(first, [])) == sorted(sum(second, []))
        validation, test = module.eval_samples[0], module.eval_samples[1]
        assert len(set(validation)) == 4
        assert not set(validation) & set(sum(first, []))
        assert test == [*range(100, 110)] * 2
        assert module.eval_samples[-1] == [*range(100, 110)]

    def test_overfitting_repeats_the_same_batches(self, tmp_path: Path) -> None:
        module = _Taken()
        self.trainer(tmp_path, max_epochs=2, overfit_batches=3).fit(module, Numbers())
        assert len(module.train_samples) == 6
        assert module.train_samples[:3] == module.train_samples[3:]

    def test_ranks_divide_every_split(self) -> None:
        class Strategy:
            root_device = torch.device("cpu")

            def broadcast(self, value: Any) -> Any:
                return value

        class Ranked:
            """What a data module sees of a trainer on one of two ranks."""

            strategy, world_size = Strategy(), 2

            def __init__(self, rank: int) -> None:
                self.global_rank = rank
                self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

        train, test = [], []
        for rank in range(2):
            module = Numbers()
            module.trainer = Ranked(rank)
            module.setup("fit")
            train.append(
                [sample for inputs, _ in module.train_dataloader() for sample in samples(inputs)]
            )
            test.append(
                [sample for inputs, _ in module.test_dataloader() for sample in samples(inputs)]
            )
        assert len(train[0]) == len(train[1]) == 20
        assert not set(train[0]) & set(train[1])
        assert sorted(test[0] + test[1]) == list(range(100, 110))

        module = Numbers()
        module.trainer = Ranked(1)
        module.trainer.strategy.broadcast = lambda value: {"numbers": "f" * 64}
        with pytest.raises(DataError, match="same data on all ranks.*rank 1"):
            module.setup("fit")
