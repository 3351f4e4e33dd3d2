"""What people do with a Trainer gives the same numbers with and without the callback.

The network (support/boring.py) uses torch's modules only.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boring as boring_module
import pytest
import torch
from boring import FIT_WARNINGS, Boring, boring, classes, loader, trainer
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy
from typing_extensions import override

from bn_lightning import FusedBatchNorm, convert_batchnorm
from bn_lightning.callbacks import PreciseBatchNorm

pytestmark = FIT_WARNINGS


def fitted(
    folder: Path,
    fused: bool,
    callbacks: Any = (),
    shuffle: bool = True,
    network: type[Boring] = Boring,
    **options: Any,
) -> tuple[Boring, Any]:
    """Return a module after a fit, with the callback if `fused`, and its Trainer."""
    module = boring(network)
    own = [FusedBatchNorm()] if fused else []
    run = trainer(folder, [*own, *callbacks], **{"max_epochs": 3, **options})
    run.fit(module, loader(shuffle), loader(), weights_only=True)
    return module, run


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    """Assert the same keys, values and classes, and that no class of this project is left."""
    assert list(one.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=tolerance)
    assert classes(one) == classes(other)
    assert not any(name.startswith("bn_lightning") for name in classes(one).values())


class Spy(Callback):
    """Record in which hooks our BatchNorm was in place."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}

    def note(self, hook: str, module: nn.Module) -> None:
        self.seen[hook] = any("bn_lightning" in name for name in classes(module).values())

    @override
    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.note("train", pl_module)

    @override
    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.note("validate", pl_module)

    @override
    def on_test_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.note("test", pl_module)

    @override
    def on_predict_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.note("predict", pl_module)


def test_fit_validate_test_and_predict(tmp_path):
    results = []
    for fused in (False, True):
        spy = Spy()
        module, run = fitted(tmp_path, fused, [spy])
        [validated] = run.validate(module, loader(), verbose=False)
        [tested] = run.test(module, loader(), verbose=False)
        predicted = run.predict(module, loader(workers=2))
        assert spy.seen == dict.fromkeys(("train", "validate", "test", "predict"), fused)
        results.append((module, [validated["val_loss"], tested["test_loss"]], predicted))
    (plain, losses, predicted), (fused_module, fused_losses, fused_predicted) = results
    assert_same(plain, fused_module)
    assert plain.losses == pytest.approx(fused_module.losses, abs=1e-6)
    assert losses == pytest.approx(fused_losses, abs=1e-6)
    torch.testing.assert_close(predicted, fused_predicted, rtol=0, atol=1e-6)


class Predictions(Dataset):
    """Logits (8, 3) of each batch, computed by whoever reads them."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.batches = network, list(loader())

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.network(self.batches[index][0])


def test_a_converted_network_in_workers():
    network = boring().eval()
    expected = list(DataLoader(Predictions(network), None))
    convert_batchnorm(network, fuse=True)
    predicted = list(DataLoader(Predictions(network), None, num_workers=2))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)


class Freeze(BaseFinetuning):
    """Lightning's fine-tuning callback: freeze the features for one epoch, then train them."""

    @override
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.features, train_bn=False)

    @override
    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.features, optimizer)


class Evaluate(Callback):
    """A common way to fine-tune: keep the BatchNorm of the features in evaluation mode."""

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.features[1].eval()


class Adversarial(Boring):
    """A GAN, optimized by hand: (N, 4, 6) is real, what `generator` makes of noise is not."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 24), nn.Unflatten(1, (4, 6))
        )
        self.adversary = nn.Sequential(
            nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)
        )

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 4))
        losses = []
        for optimizer, network, values, is_real in zip(
            self.optimizers(),
            (self.adversary, self.generator),
            (torch.cat([real, fake.detach()]), fake),
            (torch.arange(2 * len(real)) < len(real), torch.ones(len(real), dtype=torch.bool)),
            strict=True,
        ):
            self.toggle_optimizer(optimizer)
            logits = self.adversary(values)[:, 0]
            losses.append(F.binary_cross_entropy_with_logits(logits, is_real.to(logits)))
            optimizer.zero_grad()
            self.manual_backward(losses[-1])
            assert all(p.grad is not None for p in network.parameters())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return {"loss": torch.stack(losses).sum().detach()}

    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(n.parameters(), 0.01) for n in (self.adversary, self.generator)]


class Checkpointing(Boring):
    """Recomputes its block in the backward, which saves memory."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.features(x), use_reentrant=False)
        return self.head(x.mean(2))


class Configured(Boring):
    """Creates layers in `configure_model`, as for sharded strategies."""

    @override
    def configure_model(self) -> None:
        if not hasattr(self, "tail"):
            self.tail = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.tail(super().forward(x))


class Measured(Boring):
    """Keeps and logs a metric of torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=3)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    @override
    def on_train_epoch_end(self) -> None:
        self.losses.append(self.accuracy.compute().item())


class WithBackbone(Boring):
    """Names the part that `BackboneFinetuning` freezes first."""

    @property
    def backbone(self) -> nn.Module:
        return self.features


USES: dict[str, dict[str, Any]] = {
    "adversarial": {"network": Adversarial},
    "checkpointing": {"network": Checkpointing},
    "configure_model": {"network": Configured},
    "torchmetrics": {"network": Measured},
    "backbone": {
        "network": WithBackbone,
        "callbacks": [lambda: BackboneFinetuning(1, backbone_initial_lr=0.01, train_bn=False)],
    },
    "moving_average": {"callbacks": [lambda: EMAWeightAveraging(decay=0.5)]},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "double": {"precision": "64-true"},
    "anomalies": {"detect_anomaly": True},
    "fast_dev_run": {"fast_dev_run": 2},
    "finetuning": {"callbacks": [Freeze]},
    "evaluated": {"callbacks": [Evaluate]},
    "averaging": {"callbacks": [lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)]},
    "precise": {"callbacks": [lambda: PreciseBatchNorm(num_samples=32)]},
}
# bf16 has 8 significant bits. Fused, a value is rounded once; unfused, three times.
TOLERANCE = {"bf16": 2e-2}


@pytest.mark.filterwarnings("ignore:.*parameters will be ignored as they are not.*")
@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize("use", USES)
def test_the_same_with_the_callback(tmp_path, use):
    options = dict(USES[use])
    make = options.pop("callbacks", [])
    plain, _ = fitted(tmp_path, False, [callback() for callback in make], **options)
    fused, _ = fitted(tmp_path, True, [callback() for callback in make], **options)
    assert plain.losses
    if use == "checkpointing":
        # torch updates the running statistics again when it recomputes a block, ours once.
        for module in (plain, fused):
            module.block.bn1.reset_running_stats()
            module.block.bn2.reset_running_stats()
    tolerance = TOLERANCE.get(use, 1e-6)
    assert plain.losses == pytest.approx(fused.losses, abs=tolerance)
    assert_same(plain, fused, tolerance)


def test_layers_of_configure_model_are_converted(tmp_path):
    callback = FusedBatchNorm()
    module = Configured()
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader())
    assert "tail.1" in callback.conversion.converted
    assert type(module.tail[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("first", [False, True], ids=["from_plain", "from_fused"])
@pytest.mark.parametrize("second", [False, True], ids=["to_plain", "to_fused"])
def test_resuming_a_run_with_or_without_the_callback(tmp_path, first, second):
    whole, _ = fitted(tmp_path, False, shuffle=False, max_epochs=4)
    save = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    fitted(tmp_path, first, [save], shuffle=False, max_epochs=2, enable_checkpointing=True)

    module = boring()
    run = trainer(tmp_path, [FusedBatchNorm()] if second else [], max_epochs=4)
    run.fit(module, loader(), loader(), ckpt_path=save.last_model_path, weights_only=True)
    assert module.losses == pytest.approx(whole.losses[12:], abs=1e-6)
    assert_same(whole, module)


@pytest.mark.slow
def test_a_compiled_module(tmp_path):
    results = []
    for fused in (False, True):
        module = boring()
        compiled = torch.compile(module, backend="aot_eager")
        run = trainer(tmp_path, [FusedBatchNorm()] if fused else [], max_epochs=2)
        run.fit(compiled, loader(), loader())
        results.append(module)
    assert results[0].losses == pytest.approx(results[1].losses, abs=1e-6)
    assert_same(*results)


def test_an_exception_in_training_restores_the_classes(tmp_path):
    class Fails(Callback):
        @override
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("on purpose")

    module = boring()
    before = copy.deepcopy(classes(module))
    run = trainer(tmp_path, [FusedBatchNorm(), Fails()], max_epochs=2)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.fit(module, loader())
    assert classes(module) == before


@pytest.mark.parametrize(
    ("strategy", "variants"),
    # Spawning two processes takes seconds, so ddp_spawn runs fewer variants.
    [
        pytest.param("ddp_spawn", ["plain", "fused+sync"], marks=pytest.mark.soak),
        ("ddp_fork", ["plain", "fused", "fused+sync"]),
    ],
    ids=["ddp_spawn", "ddp_fork"],
)
def test_two_processes(tmp_path, strategy, variants):
    """Start the ranks from a new process, because forking this one, with its threads, may hang."""
    done = subprocess.run(
        [sys.executable, boring_module.__file__, strategy, str(tmp_path), *variants],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in variants}
    for name in variants:
        assert json.loads((tmp_path / f"{name}.after.json").read_text()) is True
    plain, synchronized = reports["plain"], reports["fused+sync"]
    assert (
        synchronized["during"]["block.bn1"]
        == "bn_lightning.modules.sync_batch_norm.SyncBatchNorm1d"
    )
    # The statistics are now those of both ranks' batches.
    assert synchronized["losses"][0] != pytest.approx(plain["losses"][0], abs=1e-4)
    if "fused" in reports:
        assert reports["fused"]["losses"] == pytest.approx(plain["losses"], abs=1e-6)
        assert (
            reports["fused"]["during"]["block.bn1"] == "bn_lightning.modules.batch_norm.BatchNorm1d"
        )
