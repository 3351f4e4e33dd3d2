"""The plugin swaps and restores classes, alone and in Lightning's Trainer on two ranks.

Functions whose names start with `rank_` run on the ranks (see the fixture `ranks`).
"""

import copy
import itertools
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import (
    BatchNorm1d,
    BatchNorm2d,
    FusedSyncBatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    convert_batchnorm,
    revert_batchnorm,
)
from bn_lightning.conversion.class_swap import restore_class, swap_class


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _model() -> nn.Module:
    fused = BatchNorm2d(3, activation="relu", backend="native")
    return nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), fused
    )


AFTER = [SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncBatchNorm, SyncBatchNorm2d]


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return what `revert` must restore: class, identity, attributes, and tensors by identity."""
    return [
        (
            type(m),
            id(m),
            dict(m.__dict__),
            {k: id(v) for k, v in m.state_dict(keep_vars=True).items()},
        )
        for m in model.modules()
    ]


def test_classes_are_swapped_and_restored():
    model = _model()
    model[1].eval()
    model[2].weight.requires_grad_(False)
    model[4].freeze_stats()
    model[0].register_forward_hook(lambda *_: None)
    before = _state(model)
    plugin = FusedSyncBatchNorm()
    assert plugin.apply(model) is model
    assert [type(m) for m in model] == AFTER
    assert model[4].activation == "relu" and model[4].backend == "native" and model[4].stats_frozen
    assert not model[1].training and not model[2].weight.requires_grad
    assert len(model[0]._forward_hooks) == 1
    assert plugin.revert(model) is model
    assert _state(model) == before


def test_applying_and_reverting_twice_is_once():
    model = _model()
    before = _state(model)
    plugin = FusedSyncBatchNorm(backend="native")
    plugin.apply(plugin.apply(model))
    assert [type(m) for m in model] == AFTER
    plugin.revert(plugin.revert(model))
    assert _state(model) == before
    # A synchronized module that the user built stays as it is.
    own = SyncBatchNorm2d(3)
    plugin.apply(own)
    assert own.backend == "auto"
    plugin.revert(own)
    assert type(own) is SyncBatchNorm2d


def test_backend_and_process_group():
    model = _model()
    own_group, group = object(), object()
    model[3].process_group = own_group
    before = _state(model)
    plugin = FusedSyncBatchNorm(process_group=group, backend="native")
    plugin.apply(model)
    assert {m.backend for m in model} == {"native"}
    assert [m.process_group for m in model] == [group, group, group, own_group, group]
    plugin.revert(model)
    assert _state(model) == before
    with pytest.raises(ValueError, match="`backend`"):
        FusedSyncBatchNorm(backend="cuda")


@pytest.mark.parametrize("order", list(itertools.permutations(["sync", "convert"])), ids="-".join)
def test_two_swaps_end_in_any_order(order):
    module = nn.BatchNorm2d(3)
    before = _state(module)
    swap_class(module, BatchNorm2d, "convert")
    plugin = FusedSyncBatchNorm()
    plugin.apply(module)
    assert type(module) is SyncBatchNorm2d
    for key in order:
        plugin.revert(module) if key == "sync" else restore_class(module, key)
    assert _state(module) == before


def test_skipped_modules_are_named():
    parametrised = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    model = nn.ModuleDict({"own": OwnBatchNorm(3), "lazy": nn.LazyBatchNorm1d(), "p": parametrised})
    classes = [type(m) for m in model.modules()]
    with pytest.warns(
        UserWarning,
        match=r"own \(OwnBatchNorm\), lazy \(LazyBatchNorm1d\), p \(ParametrizedBatchNorm2d\)",
    ):
        FusedSyncBatchNorm().apply(model)
    assert [type(m) for m in model.modules()] == classes
    FusedSyncBatchNorm().revert(model)


def test_a_copy_can_be_reverted():
    model = _model()
    FusedSyncBatchNorm().apply(model)
    twin = copy.deepcopy(model)
    FusedSyncBatchNorm().revert(twin)
    assert [type(m) for m in twin] == [type(m) for m in _model()]
    assert "process_group" not in twin[0].__dict__


class Small(LightningModule):
    """A network with one BatchNorm of torch and one of ours with an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5),
            BatchNorm1d(5, activation="relu"), nn.Linear(5, 3),
        ).double()  # fmt: skip
        self.seen: list[list[type]] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        self.seen.append([type(self.network[at]) for at in (1, 4)])
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def _fit(
    module: LightningModule, batch_size: int, part: slice, tmp_path: Path | str, **options: Any
) -> None:
    """Train ten steps, each on `part` of the next eight samples."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(80, 4, generator=g, dtype=torch.float64).view(10, 8, 4)[:, part].flatten(0, 1)
    target = torch.randint(3, (80,), generator=g).view(10, 8)[:, part].flatten()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, target), batch_size=batch_size))


class _OneRank(LightningEnvironment):
    """Tell Lightning that the process group exists and this process is one of its ranks."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return dist.get_rank()


def rank_ten_steps(tmp_path: str) -> None:
    warnings.simplefilter("ignore")
    whole = Small()
    _fit(whole, 8, slice(None), tmp_path, devices=1)
    part = slice(0, 4) if dist.get_rank() == 0 else slice(4, 8)
    for sync_batchnorm in (False, True):
        module = Small()
        _fit(
            module,
            4,
            part,
            tmp_path,
            devices=2,
            strategy="ddp",
            sync_batchnorm=sync_batchnorm,
            plugins=[FusedSyncBatchNorm(), _OneRank()],
        )
        assert module.seen == [[SyncBatchNorm1d, SyncBatchNorm1d]] * 10
        assert [type(module.network[at]) for at in (1, 4)] == [nn.BatchNorm1d, BatchNorm1d]
        assert module.network[4].activation == "relu"
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_ten_steps_of_ddp_equal_one_process_with_the_double_batch(ranks, tmp_path):
    ranks(rank_ten_steps, str(tmp_path))


def test_it_is_a_lightning_plugin(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    assert isinstance(FusedSyncBatchNorm(), TorchSyncBatchNorm)
    assert repr(FusedSyncBatchNorm()) == "FusedSyncBatchNorm(process_group=None, backend=None)"


def test_its_repr_names_the_import_to_use_with_pytorch_lightning(monkeypatch):
    # The error of pytorch_lightning's Trainer contains the repr of the plugin and nothing else.
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    error = f"Found invalid type for plugin {FusedSyncBatchNorm()}."
    assert "write `from lightning.pytorch import Trainer, LightningModule` instead of" in error


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_the_error_of_pytorch_lightning_contains_that_repr(sync_batchnorm):
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(Exception, match="instead of `from pytorch_lightning import"):
        other.Trainer(plugins=[FusedSyncBatchNorm()], sync_batchnorm=sync_batchnorm)


@pytest.mark.parametrize("plugin_first", [True, False])
def test_plugin_and_conversion_can_be_reverted_in_either_order(plugin_first: bool) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    before = dict(module[0].__dict__)
    convert_batchnorm(module, fuse=True, backend="native")
    plugin = FusedSyncBatchNorm(backend="native")
    plugin.apply(module)
    assert type(module[0]) is SyncBatchNorm1d
    reverts = [plugin.revert, revert_batchnorm]
    for revert in reverts if plugin_first else reversed(reverts):
        revert(module)
    assert type(module[0]) is nn.BatchNorm1d and module[0].__dict__ == before
