"""FreezeBatchNorm: what a step does to a frozen layer, from when on, and that it ends."""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boring import FIT_WARNINGS, Boring, boring, classes, loader, trainer
from lightning import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from typing_extensions import override

import bn_lightning
from bn_lightning import FusedBatchNorm, FusedSyncBatchNorm
from bn_lightning.callbacks import FreezeBatchNorm, PreciseBatchNorm

pytestmark = FIT_WARNINGS

State = dict[str, Tensor]


class OwnBatchNorm(nn.BatchNorm1d):
    """A user's subclass, whose forward must be kept."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5


def layers_of(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: x for name, x in module.named_modules() if isinstance(x, _BatchNorm)}


def statistics(module: nn.Module) -> State:
    state = module.state_dict()
    return {k: v.clone() for k, v in state.items() if "running_" in k or "num_batches" in k}


def affine(module: nn.Module) -> State:
    layers = layers_of(module).items()
    return {f"{n}.{k}": p.detach().clone() for n, x in layers for k, p in x.named_parameters()}


def assert_same(state: State, other: State) -> None:
    assert state.keys() == other.keys() and state
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def assert_all_differ(state: State, other: State) -> None:
    for name, value in state.items():
        assert not torch.equal(value, other[name]), name


def replace_layers(module: Boring, make: Callable[[int], nn.Module]) -> Boring:
    """Replace all BatchNorms of a module."""
    module.features[1], module.block.bn1, module.block.bn2 = (make(5) for _ in range(3))
    return module


def with_statistics(module: Boring) -> Boring:
    """Give all BatchNorms statistics that evaluation can be told apart by."""
    generator = torch.Generator().manual_seed(4)
    for layer in layers_of(module).values():
        layer.running_mean.copy_(torch.rand(5, generator=generator))
        layer.running_var.copy_(torch.rand(5, generator=generator) + 1)
    return module


class Watch(Callback):
    """Records the statistics and the losses of evaluation after each step."""

    def __init__(self) -> None:
        self.after: list[State] = []

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.after.append(statistics(pl_module))


class Fails(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        raise self.error


class Unruly(Boring):
    """Calls `.train()` where it would thaw layers in evaluation mode."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.train()
        for layer in layers_of(self).values():
            layer.train()
        return super().training_step(batch, batch_idx)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "torch": nn.BatchNorm1d,
    "ours": bn_lightning.BatchNorm1d,
    "ghost": lambda channels: bn_lightning.GhostBatchNorm1d(channels, ghost_size=4),
    "torch_sync": nn.SyncBatchNorm,
    "own": OwnBatchNorm,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_step_is_that_of_a_network_in_evaluation_mode(tmp_path: Path, make: Any) -> None:
    """Losses and weights equal those of a fit in which every BatchNorm is put in evaluation."""

    class Evaluated(Boring):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            for layer in layers_of(self).values():
                layer.eval()
            return super().training_step(batch, batch_idx)

    results = []
    for cls, callbacks in ((Evaluated, []), (Unruly, [FreezeBatchNorm()])):
        boring_state = boring().state_dict()
        module = cls()
        module.load_state_dict(boring_state)
        module = with_statistics(replace_layers(module, make))
        before, names = statistics(module), classes(module)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader())
        assert_same(statistics(module), before)
        assert classes(module) == names
        results.append(module)
    evaluated, frozen = results
    assert frozen.losses == evaluated.losses
    assert_same(dict(frozen.state_dict()), dict(evaluated.state_dict()))


# Options, micro-batches of a step, batches of training before it begins; an epoch has 6 batches.
START: dict[str, tuple[dict[str, Any], int, int]] = {
    "from_step": ({"from_step": 4}, 1, 4),
    "from_step_in_a_later_epoch": ({"from_step": 8}, 1, 8),
    "from_step_of_two_batches": ({"from_step": 4}, 2, 8),
    "from_epoch": ({"from_epoch": 1}, 1, 6),
    "from_epoch_of_three_steps": ({"from_epoch": 1}, 2, 6),
    "from_the_first_epoch": ({"from_epoch": 0}, 1, 0),
}


@pytest.mark.parametrize(("options", "accumulate", "batches"), START.values(), ids=START)
def test_when_it_begins(
    tmp_path: Path, options: dict[str, Any], accumulate: int, batches: int
) -> None:
    watch = Watch()
    callbacks = [watch, FreezeBatchNorm(**options)]
    run = trainer(tmp_path, callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
    run.fit(boring(), loader())
    for before, after in itertools.pairwise(watch.after[:batches]):
        assert_all_differ(before, after)
    assert len(watch.after) == 12
    for state in watch.after[max(batches - 1, 0) :]:
        assert_same(state, watch.after[-1])


@pytest.mark.parametrize("when", ["later", "at_once"])
def test_a_resumed_run(tmp_path: Path, when: str) -> None:
    """Statistics are frozen as in a run that was not interrupted."""
    step = 9 if when == "later" else 2

    def fit(epochs: int, *more: Callback, **options: Any) -> Boring:
        module = boring()
        saving = {"enable_checkpointing": True} if more else {}
        run = trainer(tmp_path, [FreezeBatchNorm(step), *more], max_epochs=epochs, **saving)
        run.fit(module, loader(), weights_only=True, **options)
        return module

    whole = fit(4)
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(1, save)
    resumed = fit(4, ckpt_path=save.last_model_path)
    assert resumed.losses == whole.losses[6:]
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_two_ranks(tmp_path: Path, two_ranks: dict[str, Any]) -> None:
    """Synchronized layers freeze at one step on all ranks, and then communicate nothing."""

    class Report(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            names = [type(layer).__name__ for layer in layers_of(pl_module).values()]
            report = {"after": watch.after, "names": names, "losses": pl_module.losses}
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")

    watch = Watch()
    callbacks = [watch, FreezeBatchNorm(2, affine=True), Report()]
    plugins = [FusedSyncBatchNorm()]
    run = trainer(tmp_path, callbacks, plugins=plugins, max_epochs=2, **two_ranks)
    run.fit(boring(), loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["names"] == ["SyncBatchNorm1d"] * 3
    assert first["losses"] != second["losses"]
    assert_all_differ(first["after"][0], first["after"][1])
    for state in first["after"][2:] + second["after"][1:]:
        assert_same(state, first["after"][1])


def test_modules(tmp_path: Path) -> None:
    """Layers inside the named modules are frozen, and no others."""
    module = boring()
    before = statistics(module)
    callback = FreezeBatchNorm(modules=["block.bn2", "features"])
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader())
    after = statistics(module)
    frozen = {k for k in before if k.startswith(("block.bn2.", "features."))}
    assert frozen and len(frozen) < len(before)
    assert_same({k: before[k] for k in frozen}, {k: after[k] for k in frozen})
    others = before.keys() - frozen
    assert_all_differ({k: before[k] for k in others}, after)


def test_a_shared_layer_by_its_second_name(tmp_path: Path) -> None:
    module = boring()
    module.alias = module.block
    before = statistics(module)
    callbacks = [FreezeBatchNorm(modules=["alias"]), FreezeBatchNorm(modules=["block.bn1"])]
    trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader())
    frozen = {k: v for k, v in before.items() if k.startswith("block.")}
    assert_same(frozen, {k: v for k, v in statistics(module).items() if k in frozen})
    assert type(module.block.bn1) is nn.BatchNorm1d


def test_a_parametrized_weight(tmp_path: Path) -> None:
    module = boring()
    layer: Any = module.block.bn1
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    before = layer.parametrizations.weight.original.detach().clone()
    trainer(tmp_path, [FreezeBatchNorm(affine=True)], max_epochs=1).fit(module, loader())
    assert torch.equal(layer.parametrizations.weight.original, before)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_weight_and_bias(tmp_path: Path, frozen: bool) -> None:
    """Only `affine` freezes them, weight decay included."""
    module = boring()
    before, head = affine(module), module.head.weight.detach().clone()

    class Decaying(Boring):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)

    module.__class__ = Decaying
    callback = FreezeBatchNorm(2, affine=frozen)
    states = []

    class Note(Callback):
        @override
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states.append(affine(pl_module))

    run = trainer(tmp_path, [Note(), callback], max_epochs=2, gradient_clip_val=1.0)
    run.fit(module, loader())
    assert_all_differ(before, states[1])
    if frozen:
        assert_same(states[1], states[-1])
    else:
        assert_all_differ(states[1], states[-1])
    assert not torch.equal(head, module.head.weight)
    assert all(p.requires_grad for p in module.parameters())


class Finetuning(BaseFinetuning):
    """Freezes the features until epoch 1, and then makes them trainable."""

    def __init__(self, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn

    @override
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.features, train_bn=self.train_bn)

    @override
    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.features, optimizer)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist.*")
@pytest.mark.parametrize(
    ("train_bn", "first"),
    [(False, False), (True, False), (True, True)],
    ids=["without_bn", "with_bn", "with_bn_after_it"],
)
def test_lightnings_finetuning(tmp_path: Path, train_bn: bool, first: bool) -> None:
    """BaseFinetuning sets track_running_stats and requires_grad; neither thaws a layer."""
    module = with_statistics(boring())
    before, parameters = statistics(module), affine(module)
    callbacks: list[Callback] = [Finetuning(train_bn), FreezeBatchNorm(affine=True)]
    run = trainer(tmp_path, callbacks[::-1] if first else callbacks, max_epochs=3)
    run.fit(module, loader())
    assert_same(statistics(module), before)
    assert_same(affine(module), parameters)
    assert module.features[1].track_running_stats


def test_backbone_finetuning_ignores_train_bn_and_this_does_not(tmp_path: Path) -> None:
    """docs/plugin.md says that BackboneFinetuning(train_bn=False) moves statistics."""
    moved = {}
    for name, more in {"alone": [], "frozen": [FreezeBatchNorm(modules=["backbone"])]}.items():
        module = boring()
        module.backbone = module.features
        before = statistics(module.backbone)
        finetuning = BackboneFinetuning(5, train_bn=False)
        trainer(tmp_path, [finetuning, *more], max_epochs=1).fit(module, loader())
        after = statistics(module.backbone)
        moved[name] = [not torch.equal(before[k], after[k]) for k in before]
    assert all(moved["alone"]) and not any(moved["frozen"])


@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize(
    ("make", "first"),
    [(nn.BatchNorm1d, False), (bn_lightning.BatchNorm1d, True)],
    ids=["torch", "ours_before_it"],
)
def test_stochastic_weight_averaging(tmp_path: Path, make: Any, first: bool) -> None:
    """SWA resets all statistics before a last epoch that would average them anew."""
    module = with_statistics(replace_layers(boring(), make))
    before = statistics(module)
    momenta = [layer.momentum for layer in layers_of(module).values()]
    callbacks: list[Callback] = [
        StochasticWeightAveraging(0.05, swa_epoch_start=1),
        FreezeBatchNorm(),
    ]
    run = trainer(tmp_path, callbacks[::-1] if first else callbacks, max_epochs=3)
    run.fit(module, loader())
    assert_same(statistics(module), before)
    assert [layer.momentum for layer in layers_of(module).values()] == momenta


def test_exponential_moving_average(tmp_path: Path) -> None:
    """The averaged model has the frozen statistics."""
    module = with_statistics(boring())
    before = statistics(module)
    callbacks = [EMAWeightAveraging(decay=0.9), FreezeBatchNorm()]
    trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader(), loader())
    for name, value in statistics(module).items():
        # decay * x + (1 - decay) * x rounds twice in each of 12 steps.
        torch.testing.assert_close(value, before[name], rtol=12 * 2**-23, atol=0)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("fails", [False, True], ids=["completes", "fails"])
def test_with_fused_batch_norm(
    tmp_path: Path, fused_calls: list[bool], first: bool, fails: bool
) -> None:
    """A frozen layer stays fused, and the classes are torch's again in either order."""
    results = []
    for fused in (False, True):
        module = with_statistics(boring())
        before, names = statistics(module), classes(module)
        callbacks: list[Callback] = [FusedBatchNorm()] if fused else []
        callbacks.insert(0 if first else len(callbacks), FreezeBatchNorm(2))
        run = trainer(tmp_path, [*callbacks, *([Late(RuntimeError("no"))] if fails else [])])
        run.fit_loop.max_epochs = 2
        if fails:
            with pytest.raises(RuntimeError, match="no"):
                run.fit(module, loader())
        else:
            run.fit(module, loader())
        assert classes(module) == names
        assert not any("stats_frozen" in vars(layer) for layer in layers_of(module).values())
        assert_all_differ(before, statistics(module))
        results.append(module)
    assert any(fused_calls[-3:])
    assert results[0].losses == pytest.approx(results[1].losses, abs=1e-6)


class Late(Fails):
    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 8:
            raise self.error


def test_precise_batch_norm_leaves_frozen_layers_alone(tmp_path: Path) -> None:
    for when in ("validation", "end"):
        module = with_statistics(boring())
        before = statistics(module)
        callbacks = [FreezeBatchNorm(modules=["block"]), PreciseBatchNorm(32, when)]
        trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader(), loader())
        after = statistics(module)
        assert_same(
            *({k: v for k, v in s.items() if k.startswith("block")} for s in (before, after))
        )
        assert_all_differ({k: v for k, v in before.items() if k.startswith("features")}, after)


# Dynamo asks each tensor for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", ["torch", pytest.param("ours", marks=pytest.mark.slow)])
def test_a_compiled_network(tmp_path: Path, kind: str) -> None:
    """Freezing in the middle of a run reaches code that is compiled already."""
    torch.compiler.reset()
    module = replace_layers(boring(), LAYERS[kind])
    module.block.compile(backend="aot_eager")
    watch = Watch()
    trainer(tmp_path, [watch, FreezeBatchNorm(3)], max_epochs=1).fit(module, loader())
    assert_all_differ(watch.after[1], watch.after[2])
    assert_same(watch.after[2], watch.after[-1])


@pytest.mark.parametrize(
    ("make", "error"),
    [(nn.BatchNorm1d, KeyboardInterrupt()), (bn_lightning.BatchNorm1d, RuntimeError("no"))],
    ids=["torch_ctrl_c", "ours_error"],
)
def test_after_an_error_the_layers_are_as_before(
    tmp_path: Path, make: Any, error: BaseException
) -> None:
    module = replace_layers(boring(), make)
    before = {name: dict(vars(layer)) for name, layer in layers_of(module).items()}
    names = classes(module)
    run = trainer(tmp_path, [FreezeBatchNorm(), Fails(error)], max_epochs=1)
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(module, loader())
    assert classes(module) == names
    assert {name: dict(vars(layer)) for name, layer in layers_of(module).items()} == before
    # The next fit without the callback trains the statistics.
    state = statistics(module)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert_all_differ(state, statistics(module))


@pytest.mark.parametrize("make", [OwnBatchNorm, bn_lightning.BatchNorm1d], ids=["own", "ours"])
def test_a_copy_and_a_pickle_of_a_frozen_layer_are_frozen(tmp_path: Path, make: Any) -> None:
    class Copies(Callback):
        @override
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layer = pl_module.block.bn1
            x = torch.randn(3, 5, 4)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert other.training
                assert torch.equal(other(x), layer(x))
                assert_same(statistics(other), statistics(layer))

    module = replace_layers(boring(), make)
    trainer(tmp_path, [FreezeBatchNorm(), Copies()], max_steps=1).fit(module, loader())


def test_a_user_frozen_layer_stays_frozen(tmp_path: Path) -> None:
    module = replace_layers(boring(), bn_lightning.BatchNorm1d)
    module.block.bn1.freeze_stats()
    trainer(tmp_path, [FreezeBatchNorm()], max_epochs=1).fit(module, loader())
    assert module.block.bn1.stats_frozen and not module.block.bn2.stats_frozen


REFUSED: dict[str, tuple[Callable[[Boring], Any], dict[str, Any], str]] = {
    "no_statistics": (
        lambda m: replace_layers(m, lambda c: nn.BatchNorm1d(c, track_running_stats=False)),
        {"from_step": 1000},
        "running statistics, got features.1, block.bn1, block.bn2",
    ),
    "lazy": (
        lambda m: setattr(m.block, "bn2", nn.LazyBatchNorm1d()),
        {},
        "running statistics, got block.bn2",
    ),
    "none": (
        lambda m: replace_layers(m, lambda c: nn.Identity()),
        {},
        "FreezeBatchNorm, got Boring",
    ),
    "unknown_name": (lambda m: None, {"modules": ["backbone"]}, "`modules`.*got 'backbone'"),
    "part_of_a_name": (lambda m: None, {"modules": ["feat"]}, "`modules`.*got 'feat'"),
}


@pytest.mark.parametrize(("change", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_frozen_is_named(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    module = boring()
    change(module)
    if any(isinstance(x, nn.LazyBatchNorm1d) for x in module.modules()):
        optimizer = torch.optim.SGD(module.head.parameters())
        module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    run = trainer(tmp_path, [FreezeBatchNorm(**options)], max_epochs=1)
    with pytest.raises(ValueError, match=message):
        run.fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize(
    ("options", "name"),
    [({"from_step": -1}, "from_step"), ({"from_epoch": -1}, "from_epoch")]
    + [({"from_step": 3, "from_epoch": 1}, "from_epoch"), ({"modules": "block"}, "modules")],
    ids=["step", "epoch", "both", "one_name"],
)
def test_wrong_arguments(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"expected `{name}` to be"):
        FreezeBatchNorm(**options)
