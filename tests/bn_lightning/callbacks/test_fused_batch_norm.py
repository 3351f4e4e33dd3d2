"""FusedBatchNorm: runs with it give the same values, and the model is restored."""

import copy
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import BatchNorm1d, BatchNorm2d, FusedBatchNorm, convert_batchnorm, fusion_counts

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning recommends worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Some runs only train a model that could validate.
    pytest.mark.filterwarnings("ignore:.*`validation_step` but have no `val_dataloader`.*"),
]


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Model(LightningModule):
    """A user's residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Block(4)
        self.head = nn.Linear(4, 3)
        self.losses: list[float] = []
        self.seen: list[type[nn.Module]] = []
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))

    def _loss(self, batch: list[Tensor]) -> Tensor:
        self.seen.append(type(self.stem[1]))
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(self.losses) == self.fails_at:
            raise ArithmeticError("as asked")
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._loss(batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(type(self.stem[1]))
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


def model() -> Model:
    seed_everything(0, verbose=False)
    return Model()


def loader(batches: int = 10) -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batches * 6, 1, 5, 5, generator=g)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=g)), 6)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options},
    )


def classes(module: nn.Module) -> list[Any]:
    """Return what the callback has to restore: classes, and names of attributes."""
    # Lightning adds attributes to the LightningModule.
    return [
        (name, type(m), sorted(m.__dict__) if name else "forward" in m.__dict__)
        for name, m in module.named_modules()
    ]


def untouched(module: nn.Module) -> bool:
    return classes(module) == classes(model())


class TestRuns:
    def test_fifty_steps_have_the_same_losses(self, tmp_path: Path) -> None:
        losses = []
        for callbacks in ([FusedBatchNorm()], []):
            a = model()
            trainer(tmp_path, *callbacks, max_epochs=5).fit(a, loader())
            assert len(a.losses) == 50
            assert set(a.seen) == {BatchNorm2d if callbacks else nn.BatchNorm2d}
            losses.append(a.losses)
        assert losses[1][-1] < losses[1][0]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)

    def test_the_model_is_given_back_after_each(self, tmp_path: Path) -> None:
        a, callback = model(), FusedBatchNorm()
        run = trainer(tmp_path, callback)
        for function in (run.fit, run.validate, run.test):
            function(a, loader(), **({} if function != run.fit else {"val_dataloaders": loader()}))
            assert set(a.seen) == {BatchNorm2d} and a.seen
            assert untouched(a)
            a.seen.clear()
        predictions = run.predict(a, loader())
        assert set(a.seen) == {BatchNorm2d} and untouched(a)
        torch.testing.assert_close(predictions[0], a.eval()(next(iter(loader()))[0]))
        assert callback.conversion is not None
        assert callback.conversion.fusable == ("stem.1", "block.bn1", "block.bn2")

    def test_a_line_says_what_may_be_fused_and_another_what_was(
        self, tmp_path: Path, caplog
    ) -> None:
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            trainer(tmp_path, FusedBatchNorm(), fast_dev_run=True).fit(model(), loader())
        lines = [m for m in caplog.messages if m.startswith("BatchNorm")]
        assert lines == [
            "BatchNorm: 3 converted, 3 may be fused, 0 skipped",
            "BatchNorm: 3 of 3 ran fused in the first batch",
        ]

    def test_the_message_has_the_reason_for_a_skipped_layer(self, tmp_path: Path, caplog) -> None:
        odd = model()
        odd.stem[1].forward = lambda x: x
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            trainer(tmp_path, FusedBatchNorm(), fast_dev_run=True).fit(odd, loader())
        line, _ = [m for m in caplog.messages if m.startswith("BatchNorm")]
        assert line.endswith("1 skipped; first stem.1: the instance has its own forward")

    def test_without_fusion(self, tmp_path: Path, fused_calls: list[bool]) -> None:
        callback = FusedBatchNorm(fuse=False, backend="native")
        trainer(tmp_path, callback, fast_dev_run=True).fit(model(), loader())
        assert callback.conversion.fusable == () and fused_calls and not any(fused_calls)

    def test_a_model_without_batch_norm(self, tmp_path: Path) -> None:
        a = model()
        a.stem[1], a.block = nn.Identity(), nn.ReLU()
        with pytest.warns(UserWarning, match="`model`.*BatchNorm, got Model"):
            trainer(tmp_path, FusedBatchNorm()).fit(a, loader(1))
        assert len(a.losses) == 2


class TestEndings:
    @pytest.mark.parametrize("revert", [True, False])
    def test_an_error_in_the_middle(self, tmp_path: Path, revert: bool) -> None:
        a = model()
        a.fails_at = 3
        with pytest.raises(ArithmeticError, match="as asked"):
            trainer(tmp_path, FusedBatchNorm(revert=revert)).fit(a, loader())
        assert a.seen == [BatchNorm2d] * 3
        assert untouched(a) == revert

    def test_a_run_after_an_error(self, tmp_path: Path) -> None:
        a, callback = model(), FusedBatchNorm()
        a.fails_at = 0
        with pytest.raises(ArithmeticError):
            trainer(tmp_path, callback).fit(a, loader())
        a.fails_at = None
        trainer(tmp_path, callback).fit(a, loader())
        assert set(a.seen) == {BatchNorm2d} and untouched(a)

    def test_it_may_stay(self, tmp_path: Path) -> None:
        a = model()
        run = trainer(tmp_path, FusedBatchNorm(revert=False))
        run.fit(a, loader())
        assert type(a.stem[1]) is BatchNorm2d and set(fusion_counts(a)) == {
            *("stem.1", "block.bn1", "block.bn2")
        }
        run.test(a, loader())
        assert type(a.stem[1]) is BatchNorm2d

    def test_what_was_converted_before_stays_converted(self, tmp_path: Path) -> None:
        a = model()
        convert_batchnorm(a, fuse=True)
        before = classes(a)
        trainer(tmp_path, FusedBatchNorm()).fit(a, loader())
        assert classes(a) == before and not untouched(a)


class TestCheckpoints:
    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
    def test_they_load_both_ways(self, tmp_path: Path) -> None:
        states = []
        for name, callbacks in (("ours", [FusedBatchNorm()]), ("plain", [])):
            saver = ModelCheckpoint(tmp_path / name, filename="last")
            run = trainer(tmp_path, *callbacks, saver, enable_checkpointing=True)
            run.fit(model(), loader())
            states.append(
                torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
            )
        assert list(states[0]) == list(states[1])
        torch.testing.assert_close(*states, rtol=0, atol=1e-6)
        for name, callbacks in (("plain", [FusedBatchNorm()]), ("ours", [])):
            a = model()
            trainer(tmp_path, *callbacks).test(
                a, loader(), ckpt_path=tmp_path / name / "last.ckpt", weights_only=True
            )
            assert untouched(a)
            torch.testing.assert_close(dict(a.state_dict()), states[name == "plain"])

    @pytest.mark.parametrize("first", [True, False], ids=["with_then_without", "the_other_way"])
    def test_a_run_goes_on_with_and_without(self, tmp_path: Path, first: bool) -> None:
        a, whole = model(), model()
        for epochs, fused in ((1, first), (3, not first)):
            run = trainer(tmp_path, *[FusedBatchNorm()] * fused, max_epochs=epochs)
            resumed = tmp_path / "a.ckpt" if epochs > 1 else None
            run.fit(a, loader(), ckpt_path=resumed, weights_only=True)
            run.save_checkpoint(tmp_path / "a.ckpt")
        trainer(tmp_path, max_epochs=3).fit(whole, loader())
        torch.testing.assert_close(a.losses, whole.losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(a.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)


class FrozenStem(BaseFinetuning):
    """Freezes the first layers, BatchNorm included, for one epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.stem, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer, train_bn=True)


USES: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "weight_averaging": (lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)], {}),
    "moving_average": (lambda: [EMAWeightAveraging(decay=0.5)], {}),
    "finetuning": (lambda: [FrozenStem()], {}),
    "accumulation": (list, {"accumulate_grad_batches": 3}),
    "bf16": (list, {"precision": "bf16-mixed"}),
    "fp64": (list, {"precision": "64-true"}),
    "clipping": (list, {"gradient_clip_val": 0.1}),
    "fast_dev_run": (list, {"fast_dev_run": 3}),
}


@pytest.mark.parametrize(
    ("use", "first"),
    [(use, True) for use in USES] + [(use, False) for use in USES if USES[use][0] is not list],
    ids=lambda value: {True: "ours_first", False: "ours_last"}.get(value, value),
)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_beside_what_people_use(tmp_path: Path, use: str, first: bool) -> None:
    callbacks, options = USES[use]
    a, b = model(), model()
    others = callbacks()
    ours = [FusedBatchNorm(), *others] if first else [*others, FusedBatchNorm()]
    trainer(tmp_path, *ours, **options).fit(a, loader(), loader(2))
    trainer(tmp_path, *callbacks(), **options).fit(b, loader(), loader(2))
    assert BatchNorm2d in a.seen and BatchNorm2d not in b.seen
    assert classes(a) == classes(b)
    torch.testing.assert_close(a.losses, b.losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=1e-6)


def test_a_compiled_module(tmp_path: Path) -> None:
    a, b = model(), model()
    torch.compiler.reset()
    a.compile(backend="aot_eager")
    trainer(tmp_path, FusedBatchNorm(), max_epochs=1).fit(a, loader())
    trainer(tmp_path, max_epochs=1).fit(b, loader())
    torch.testing.assert_close(a.losses, b.losses, rtol=0, atol=1e-5)
    assert type(a.stem[1]) is nn.BatchNorm2d


def test_two_processes(tmp_path: Path) -> None:
    a, b = model(), model()
    for module, callbacks in ((a, [FusedBatchNorm()]), (b, [])):
        run = trainer(tmp_path, *callbacks, strategy="ddp_fork", devices=2, max_steps=3)
        run.fit(module, loader())
    assert not torch.equal(a.head.weight, model().head.weight)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=1e-6)
    assert untouched(a)


def test_from_lightnings_command_line(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(
            Model,
            run=False,
            args=[
                "--trainer.accelerator=cpu",
                "--trainer.logger=false",
                f"--trainer.default_root_dir={tmp_path}",
                "--trainer.fast_dev_run=true",
                "--trainer.callbacks+=bn_lightning.FusedBatchNorm",
                "--trainer.callbacks.fuse=false",
            ],
        )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FusedBatchNorm)]
    cli.trainer.fit(cli.model, loader())
    assert not callback.fuse and set(cli.model.seen) == {BatchNorm2d}
    assert type(cli.model.stem[1]) is nn.BatchNorm2d


class HoldsANetwork(Model):
    """Its hyperparameters hold the network, as those of many templates do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.block(self.stem(x)).mean((2, 3))))


class During(Callback):
    """Calls a function in the middle of a fit."""

    def __init__(self, function: Callable[[Trainer, Any], None]) -> None:
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == 2:
            self.function(trainer, pl_module)


def with_network() -> HoldsANetwork:
    seed_everything(0, verbose=False)
    return HoldsANetwork(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`.*")
class TestInTheMiddle:
    """What is saved, copied or traced while the model is converted is torch's."""

    def test_saved(self, tmp_path: Path) -> None:
        def save(trainer: Trainer, module: HoldsANetwork) -> None:
            assert type(module.net[1]) is BatchNorm1d
            trainer.save_checkpoint(tmp_path / "all.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
            torch.save(module.net, tmp_path / "network.pt")
            torch.save(module.hparams, tmp_path / "hparams.pt")

        run = trainer(tmp_path, FusedBatchNorm(), During(save), max_epochs=1)
        run.fit(with_network(), loader())
        files = ["all.ckpt", "weights.ckpt", "network.pt", "hparams.pt"]
        for name in files:
            with zipfile.ZipFile(tmp_path / name) as archive:
                (pickled,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
                assert b"bn_lightning" not in archive.read(pickled), name

    def test_copied(self, tmp_path: Path) -> None:
        copies: list[nn.Module] = []
        run = trainer(
            tmp_path,
            FusedBatchNorm(),
            During(lambda trainer, module: copies.append(copy.deepcopy(module))),
            EMAWeightAveraging(decay=0.5),
            max_epochs=1,
        )
        run.fit(module := with_network(), loader())
        assert {type(m) for m in copies[0].modules()} == {type(m) for m in module.modules()}
        x = next(iter(loader()))[0]
        assert copies[0](x).shape == module(x).shape

    def test_traced(self, tmp_path: Path) -> None:
        x = next(iter(loader()))[0]

        def trace(trainer: Trainer, module: HoldsANetwork) -> None:
            module.eval()
            with torch.no_grad():
                traced = module.to_torchscript(method="trace", example_inputs=x)
                torch.testing.assert_close(traced(x), module(x))
            with pytest.raises(RuntimeError, match="revert_batchnorm"):
                torch.jit.script(module.net)
            module.train()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            run = trainer(tmp_path, FusedBatchNorm(), During(trace), max_epochs=1)
            run.fit(with_network(), loader())

    def test_logged_as_a_graph(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="needs TensorBoard")
        module = with_network()
        module.example_input_array = next(iter(loader()))[0]
        logger = TensorBoardLogger(tmp_path, log_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = trainer(tmp_path, FusedBatchNorm(), logger=logger, max_epochs=1)
            run.fit(module, loader(1))
        assert list(tmp_path.rglob("events*"))


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_quantizations_fusion_names_the_class_it_met() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    convert_batchnorm(model, fuse=True)
    with pytest.raises(AssertionError, match="bn_lightning"):
        torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])
