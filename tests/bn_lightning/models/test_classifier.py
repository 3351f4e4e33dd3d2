"""Classifier in a plain script: a Trainer and torch's DataLoader, no Hydra."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import Classifier
from bn_lightning.models.mlp import MLP

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning recommends worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning warns about training without validation, and logging less than once per epoch.
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]

FEATURES, CLASSES = 6, 7
SGD = partial(torch.optim.SGD, lr=0.1)


class Recorder(Logger):
    """Records what is logged as (step, metrics)."""

    name = version = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))

    def series(self, name: str) -> dict[int | None, float]:
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}


def mlp(classes: int = CLASSES) -> MLP:
    torch.manual_seed(0)
    norm = lambda n, spatial_dims=0: nn.BatchNorm1d(n)  # noqa: E731  a factory as short as it gets
    return MLP(FEATURES, [8], classes, "relu", norm, "before")


def classifier(**options: Any) -> Classifier:
    return Classifier(**{"network": mlp(), "optimizer": SGD, "num_classes": CLASSES, **options})


def data(samples: int, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(classes, (samples,), generator=generator))


def loader(samples: int, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(data(samples, **options), batch_size)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "max_steps": 10,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, callbacks=[*callbacks], **{**defaults, **options})


def by_hand(module: Classifier, dataset: TensorDataset) -> dict[str, float]:
    """Compute loss, accuracy and top-5 accuracy over a whole data set, sample by sample."""
    x, target = dataset.tensors
    module.eval()
    with torch.no_grad():
        logits = module(x).double()
    losses = logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    ranked = logits.argsort(1, descending=True)
    hits = ranked == target[:, None]
    return {
        "loss": losses.mean().item(),
        "accuracy": hits[:, 0].double().mean().item(),
        "accuracy_top5": hits[:, :5].any(1).double().mean().item(),
    }


class TestTrainingLog:
    def test_names_and_steps(self, tmp_path: Path) -> None:
        recorder = Recorder()
        trainer(tmp_path, logger=recorder, log_every_n_steps=3, max_steps=10).fit(
            classifier(), loader(16)
        )
        assert {name for _, row in recorder.rows for name in row} == {
            "train/loss",
            "train/accuracy",
        }
        # Four batches per epoch: steps continue across epochs.
        assert [step for step, _ in recorder.rows] == [3, 6, 9]

    def test_loss_and_accuracy_of_the_batch(self, tmp_path: Path) -> None:
        recorder, module, batches = Recorder(), classifier(), loader(20)
        expected: list[tuple[float, float]] = []

        class ByHand(Callback):
            def on_train_batch_start(
                self, trainer: Trainer, pl_module: Classifier, batch: Any, batch_idx: int
            ) -> None:
                x, target = batch
                # As in training, but without updating the running statistics twice.
                state = {k: v.clone() for k, v in pl_module.state_dict().items()}
                with torch.no_grad():
                    logits = pl_module(x)
                pl_module.load_state_dict(state)
                right = (logits.argmax(1) == target).float().mean().item()
                expected.append((F.cross_entropy(logits, target).item(), right))

        trainer(tmp_path, ByHand(), logger=recorder, max_steps=5).fit(module, batches)
        losses, accuracies = zip(*expected, strict=True)
        assert [row["train/loss"] for _, row in recorder.rows] == pytest.approx(losses)
        assert [row["train/accuracy"] for _, row in recorder.rows] == pytest.approx(accuracies)

    def test_steps_are_optimizer_steps(self, tmp_path: Path) -> None:
        recorder = Recorder()
        trainer(tmp_path, logger=recorder, accumulate_grad_batches=2, max_steps=4).fit(
            classifier(), loader(16)
        )
        assert [step for step, _ in recorder.rows] == [1, 2, 3, 4]

    def test_the_weights_learn(self, tmp_path: Path) -> None:
        dataset = data(40)
        x, _ = dataset.tensors
        dataset = TensorDataset(x, (x[:, 0] > 0).long())
        module = classifier()
        before = by_hand(module, dataset)
        trainer(tmp_path, max_steps=100).fit(module.train(), DataLoader(dataset, 8))
        after = by_hand(module, dataset)
        assert after["loss"] < before["loss"] / 3
        assert after["accuracy"] > 0.9

    @pytest.mark.parametrize("every", [0, 1], ids=["never", "every_step"])
    def test_logging_does_not_change_the_weights(self, tmp_path: Path, every: int) -> None:
        """A Trainer with `log_every_n_steps=0` trains the same and logs nothing."""
        modules = [classifier(), classifier()]
        trainer(tmp_path, log_every_n_steps=1000).fit(modules[0], loader(40))
        trainer(tmp_path, log_every_n_steps=every).fit(modules[1], loader(40))
        for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)


class TestEvaluation:
    @pytest.mark.parametrize("samples", [8, 9, 11], ids=["even", "last_of_1", "last_of_3"])
    def test_test_metrics_are_those_of_the_whole_set(self, tmp_path: Path, samples: int) -> None:
        module, recorder = classifier(), Recorder()
        trainer(tmp_path, logger=recorder).test(module, loader(samples), verbose=False)
        ((_, row),) = recorder.rows
        expected = by_hand(module, data(samples))
        assert row == pytest.approx({f"test/{name}": v for name, v in expected.items()})

    def test_one_validation_loader(self, tmp_path: Path) -> None:
        module, recorder = classifier(), Recorder()
        run = trainer(tmp_path, logger=recorder, max_steps=9, val_check_interval=2)
        run.fit(module, loader(20), loader(11, seed=1))
        series = recorder.series("val/accuracy")
        # Five batches per epoch; Lightning restarts the interval in each.
        assert list(series) == [2, 4, 7, 9]
        expected = by_hand(module, data(11, seed=1))
        assert recorder.series("val/loss")[9] == pytest.approx(expected["loss"])
        assert series[9] == pytest.approx(expected["accuracy"])
        assert recorder.series("val/accuracy_top5")[9] == pytest.approx(expected["accuracy_top5"])
        assert not recorder.series("test/accuracy")

    def test_the_second_validation_loader_is_the_test_set(self, tmp_path: Path) -> None:
        module, recorder = classifier(), Recorder()
        run = trainer(tmp_path, logger=recorder, max_steps=4, val_check_interval=2)
        run.fit(module, loader(8), [loader(11, seed=1), loader(13, seed=2)])
        for name, samples, seed in (("val", 11, 1), ("test", 13, 2)):
            expected = by_hand(module, data(samples, seed=seed))
            for metric, value in expected.items():
                series = recorder.series(f"{name}/{metric}")
                assert list(series) == [2, 4]
                assert series[4] == pytest.approx(value)
                assert run.callback_metrics[f"{name}/{metric}"] == pytest.approx(value)

    def test_it_is_fitted_after_an_evaluation(self, tmp_path: Path) -> None:
        module = classifier()
        for _ in range(2):
            trainer(tmp_path).validate(module, loader(11), verbose=False)
            trainer(tmp_path, max_epochs=1).fit(module, loader(8), loader(11))

    def test_each_evaluation_starts_anew(self, tmp_path: Path) -> None:
        module, recorder = classifier(optimizer=partial(SGD, lr=0.0)), Recorder()
        network = mlp().eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        run = trainer(tmp_path, logger=recorder)
        for samples, seed in ((11, 1), (6, 2)):
            run.validate(module, loader(samples, seed=seed), verbose=False)
            assert recorder.rows[-1][1] == pytest.approx(
                {f"val/{k}": v for k, v in by_hand(module, data(samples, seed=seed)).items()}
            )

    def test_a_sanity_check_leaves_no_trace(self, tmp_path: Path) -> None:
        module, recorder = classifier(), Recorder()
        run = trainer(
            tmp_path, logger=recorder, num_sanity_val_steps=1, max_steps=2, val_check_interval=2
        )
        run.fit(module, loader(8), loader(11, seed=1))
        assert list(recorder.series("val/loss")) == [2]
        expected = by_hand(module, data(11, seed=1))["loss"]
        assert recorder.series("val/loss")[2] == pytest.approx(expected)

    def test_a_network_that_diverged_has_the_loss_nan(self, tmp_path: Path) -> None:
        module, recorder = classifier(), Recorder()
        nn.init.constant_(module.network.output.bias, math.nan)
        trainer(tmp_path, logger=recorder).test(module, loader(8), verbose=False)
        assert math.isnan(recorder.rows[0][1]["test/loss"])

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_with_five_classes_or_fewer_all_are_among_the_top(
        self, tmp_path: Path, classes: int
    ) -> None:
        module, recorder = classifier(network=mlp(classes), num_classes=classes), Recorder()
        batches = loader(9, classes=classes)
        trainer(tmp_path, logger=recorder).test(module, batches, verbose=False)
        row = recorder.rows[0][1]
        assert row["test/accuracy_top5"] == 1
        expected = by_hand(module, data(9, classes=classes))
        assert row["test/accuracy"] == pytest.approx(expected["accuracy"])


class TestOptimization:
    def test_the_optimizer_gets_the_networks_parameters(self) -> None:
        given: list[Tensor] = []

        def factory(parameters: Any) -> torch.optim.Optimizer:
            given.extend(parameters)
            return SGD(given)

        module = classifier(optimizer=factory)
        assert isinstance(module.configure_optimizers(), torch.optim.SGD)
        expected = list(module.network.parameters())
        assert [id(parameter) for parameter in given] == [id(p) for p in expected]

    def test_the_scheduler_is_stepped_every_batch(self, tmp_path: Path) -> None:
        rates: list[float] = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        # Two batches per epoch: a scheduler stepped every epoch would give pairs.
        trainer(tmp_path, Rates(), max_steps=5).fit(classifier(scheduler=scheduler), loader(8))
        assert rates == pytest.approx([0.1 * 0.5**step for step in range(5)])


class TestSpeed:
    def test_channels_last_reaches_every_layer(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU())
        x = torch.randn(2, 2, 5, 5)
        expected = network(x)
        got = classifier(network=network, channels_last=True)(x)
        assert not expected.is_contiguous(memory_format=torch.channels_last)
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("kind", ["mlp", "sequential"])
    def test_a_compiled_network_has_the_same_checkpoints(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Backend eager, because generating code takes half a minute.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        network: nn.Module = mlp()
        if kind == "sequential":
            network = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
            )
        plain = classifier(network=copy.deepcopy(network))
        compiled = classifier(network=network, compile=True)
        for module in (plain, compiled):
            trainer(tmp_path, max_steps=3).fit(module, loader(8))
        counters = torch._dynamo.utils.counters["stats"]
        assert counters["unique_graphs"] > 0
        torch.compiler.reset()
        assert compiled.state_dict().keys() == plain.state_dict().keys()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


class TestUse:
    def test_predict_gives_probabilities_in_order(self, tmp_path: Path) -> None:
        module = classifier()
        x, _ = data(11).tensors
        got = torch.cat(trainer(tmp_path).predict(module, loader(11)))
        module.eval()
        with torch.no_grad():
            expected = module(x).softmax(1)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got.sum(1), torch.ones(11))

    def test_forward_is_the_network(self) -> None:
        network = mlp().eval()
        x = torch.randn(3, FEATURES)
        assert torch.equal(classifier(network=network)(x), network(x))

    def test_checkpoints_hold_plain_tensors_of_the_network(self, tmp_path: Path) -> None:
        module = classifier(optimizer=partial(torch.optim.Adam, lr=0.1))
        run = trainer(tmp_path, max_steps=6, val_check_interval=2)
        run.fit(module, loader(8), loader(8))
        run.save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 6
        names = {f"network.{name}" for name in module.network.state_dict()}
        assert checkpoint["state_dict"].keys() == names
        other = classifier()
        other.load_state_dict(checkpoint["state_dict"])
        assert torch.equal(other.network.output.weight, module.network.output.weight)

    def test_resuming_from_a_checkpoint(self, tmp_path: Path) -> None:
        """With momentum and a stateful scheduler, at the end of the second epoch."""
        options = {
            "optimizer": partial(SGD, momentum=0.9),
            "scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        }
        whole, part, rest = (classifier(**options) for _ in range(3))
        trainer(tmp_path, max_epochs=4, max_steps=-1).fit(whole, loader(8))
        first = trainer(tmp_path, max_epochs=2, max_steps=-1)
        first.fit(part, loader(8))
        first.save_checkpoint(tmp_path / "a.ckpt")
        trainer(tmp_path, max_epochs=4, max_steps=-1).fit(
            rest, loader(8), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
        for ours, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_chance(self) -> None:
        chance = {"loss": math.log(7), "accuracy": 1 / 7, "accuracy_top5": 5 / 7}
        assert classifier().chance_metrics() == pytest.approx(
            {
                f"{split}/{name}": value
                for split in ("val", "test")
                for name, value in chance.items()
            }
        )
        assert classifier(num_classes=3).chance_metrics()["test/accuracy_top5"] == 1

    def test_chance_has_the_names_of_validation_and_test(self, tmp_path: Path) -> None:
        module, run = classifier(), trainer(tmp_path)
        run.validate(module, loader(8), verbose=False)
        names = run.callback_metrics.keys() - {"step"}
        run.test(module, loader(8), verbose=False)
        names |= run.callback_metrics.keys() - {"step"}
        assert module.chance_metrics().keys() == names

    @pytest.mark.parametrize("classes", [1, 0, -3])
    def test_at_least_two_classes(self, classes: int) -> None:
        with pytest.raises(ValueError, match=f"`num_classes`.*at least 2, got {classes}"):
            classifier(num_classes=classes)

    def test_attributes_work_as_in_any_module(self) -> None:
        """Strings, which bypass torch's `__setattr__`, and all other values."""
        module = classifier()
        module.note = "first"
        module.note = "second"
        module.head = nn.Linear(2, 2)
        assert module.note == "second"
        assert "head.weight" in module.state_dict()
        with pytest.raises(TypeError, match="cannot assign"):
            module.head = 3.0


@pytest.mark.parametrize("outputs", [4, 8], ids=["fewer", "more"])
def test_another_number_of_outputs(outputs: int) -> None:
    module = classifier()
    logits, target = torch.randn(3, outputs), torch.zeros(3, dtype=torch.long)
    for call in (module.loss, lambda *given: module.update_metrics("val", *given)):
        with pytest.raises(ValueError, match=rf"\(N, 7\).*got \(3, {outputs}\); set model.num_cla"):
            call(logits, target)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_data_with_more_classes_than_outputs(tmp_path: Path, stage: str) -> None:
    """The error comes before the first batch is loaded."""

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            pytest.fail("asked for batches")

        val_dataloader = test_dataloader = train_dataloader

    data = Data()
    data.num_classes = CLASSES + 1
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="`num_classes`.*at least 8.*got 7; set"):
        getattr(trainer, stage)(classifier(), datamodule=data)
