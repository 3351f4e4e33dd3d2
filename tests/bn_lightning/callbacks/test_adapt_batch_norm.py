"""AdaptBatchNorm and adapt_batchnorm: the statistics, and that the model comes back as it was."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boring import Boring, boring, classes, loader, trainer
from lightning import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import bn_lightning
from bn_lightning import FusedBatchNorm, adapt_batchnorm
from bn_lightning.callbacks import AdaptBatchNorm, FreezeBatchNorm
from bn_lightning.data import DigitsDataModule

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]

makers = pytest.mark.parametrize("make", [bn_lightning, nn], ids=["ours", "torch"])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
Statistics = dict[str, Tensor]


def network(make: Any = nn, **options: Any) -> nn.Sequential:
    """A network in evaluation mode, with statistics of its own and active dropout in training."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(4, 3),
        make.BatchNorm1d(3, **options),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(3, 5),
        make.BatchNorm1d(5, **options),
    )
    for layer in norms(layers).values():
        if layer.running_mean is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return layers.eval()


def norms(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: x for name, x in module.named_modules() if isinstance(x, _BatchNorm)}


def inputs(*sizes: int, shift: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, generator=generator) * 2 + shift for size in sizes]


def by_definition(module: nn.Module, batches: list[Tensor], mix: float, samples: int) -> Statistics:
    """Mix the average statistics of the batches with the running ones, from each layer's input."""
    collecting = copy.deepcopy(module).eval()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in norms(collecting).items():
        layer.train()

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            columns = args[0].detach().movedim(1, -1).flatten(0, -2)
            found.setdefault(name, []).append((columns.mean(0), columns.var(0)))

        layer.register_forward_pre_hook(keep)
    count = 0
    with torch.no_grad():
        for x in batches:
            collecting(x)
            count += len(x)
            if count >= samples:
                break
    mixed = {}
    for name, batch in found.items():
        layer = norms(module)[name]
        for key, values in zip(
            ("running_mean", "running_var"), zip(*batch, strict=True), strict=True
        ):
            average = torch.stack(values).mean(0)
            mixed[f"{name}.{key}"] = (mix * getattr(layer, key) + count * average) / (mix + count)
    return mixed


def statistics(module: nn.Module) -> Statistics:
    return {k: v.clone() for k, v in module.state_dict().items() if "running_" in k}


def snapshot(module: nn.Module) -> Any:
    """All that must come back: classes, modes, momenta, tensors by identity and by value."""
    state = module.state_dict(keep_vars=True)
    return (
        classes(module),
        [part.training for part in module.modules()],
        [(layer.momentum, sorted(vars(layer))) for layer in norms(module).values()],
        {name: id(value) for name, value in state.items()},
        {name: value.tolist() for name, value in state.items()},
    )


@makers
@pytest.mark.parametrize("mix", [0.0, 16.0], ids=["inputs_alone", "mixed"])
@pytest.mark.parametrize(
    ("samples", "taken"), [(None, 1000), (8, 8), (9, 9)], ids=["all", "one_batch", "begun"]
)
def test_statistics_of_a_loader(make: Any, mix: float, samples: int | None, taken: int) -> None:
    model, batches = network(make), inputs(8, 8, 4)
    before, expected = snapshot(model), by_definition(model, batches, mix, taken)
    with adapt_batchnorm(model, batches, samples=samples, mix=mix):
        torch.testing.assert_close(statistics(model), expected, **TOLERANCE)
        moved = copy.deepcopy(model)
        y = model(batches[0])
    assert snapshot(model) == before
    assert torch.equal(y, moved(batches[0]))
    assert not torch.allclose(y, model(batches[0]), rtol=0.1)


@makers
def test_each_batch_by_itself(make: Any) -> None:
    """Without `mix`, the outputs are those of BatchNorms in training mode."""
    model = network(make)
    before = snapshot(model)
    trained = copy.deepcopy(model)
    for layer in norms(trained).values():
        layer.train()
    with adapt_batchnorm(model):
        for x in inputs(8, 3, shift=5.0):
            torch.testing.assert_close(model(x), trained(x), **TOLERANCE)
    assert snapshot(model) == before


@makers
@pytest.mark.parametrize("samples", [1, 6], ids=["one", "several"])
def test_each_batch_mixed(make: Any, samples: int) -> None:
    layer = network(make)[1]
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(samples, 3) * 2 + 1
    share = samples / (samples + 16)
    mean = (1 - share) * mean + share * x.mean(0)
    var = (1 - share) * var + share * x.var(0, correction=0)
    with adapt_batchnorm(layer, mix=16):
        y = layer(x)
    torch.testing.assert_close(y, (x - mean) / (var + layer.eps).sqrt(), **TOLERANCE)


@pytest.mark.parametrize("form", [lambda x: [x], lambda x: (x, None)], ids=["list", "tuple"])
def test_a_batch_may_hold_more_than_the_input(form: Callable[[Tensor], Any]) -> None:
    model, batches = network(), inputs(8, 8)
    expected = by_definition(model, batches, 0, 16)
    with adapt_batchnorm(model, map(form, batches)):
        torch.testing.assert_close(statistics(model), expected, **TOLERANCE)


def test_images_in_half_precision() -> None:
    layer = nn.BatchNorm2d(3).eval().bfloat16()
    x = (torch.randn(4, 3, 5, 5) + 1).bfloat16()
    expected = nn.BatchNorm2d(3)(x.float())
    with adapt_batchnorm(layer):
        # bf16 has 8 significant bits.
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("loading", [True, False], ids=["loader", "by_batch"])
def test_layers_that_keep_their_statistics(loading: bool) -> None:
    model = network(bn_lightning)
    model[5].freeze_stats()
    model.append(nn.BatchNorm1d(5, track_running_stats=False))
    model.unused = nn.Identity()
    model[0].head = nn.BatchNorm1d(4)  # never called
    before = statistics(model)
    with adapt_batchnorm(model, inputs(8) if loading else None):
        model(inputs(8)[0])
        after = statistics(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.running_mean", "1.running_var"}


def test_buffers_of_other_modules_and_training_mode() -> None:
    """Spectral normalization updates its buffers in training mode only, as dropout draws."""
    model = network()
    spectral_norm(model[4])
    model.train()
    before, stream = snapshot(model), torch.get_rng_state()
    with adapt_batchnorm(model, inputs(8)):
        assert snapshot(model)[1] == before[1]
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), stream)


def broken_loader() -> Iterator[Tensor]:
    yield from inputs(8)
    raise KeyboardInterrupt


ERRORS: dict[str, tuple[Any, type[BaseException]]] = {
    "in_the_loader": (broken_loader, KeyboardInterrupt),
    "in_the_forward": (lambda: [*inputs(8), torch.zeros(8, 5)], RuntimeError),
    "empty": (lambda: [], ValueError),
}


@makers
@pytest.mark.parametrize(("make_loader", "error"), ERRORS.values(), ids=ERRORS)
def test_after_an_error_the_model_is_as_before(
    make: Any, make_loader: Any, error: type[BaseException]
) -> None:
    model = network(make)
    before = snapshot(model)
    with pytest.raises(error):
        adapt_batchnorm(model, make_loader())
    assert snapshot(model) == before


@pytest.mark.parametrize("loading", [True, False], ids=["loader", "by_batch"])
def test_close_and_errors_in_the_context_restore(loading: bool) -> None:
    model = network()
    before = snapshot(model)
    adaptation = adapt_batchnorm(model, inputs(8) if loading else None)
    model(inputs(6)[0])
    adaptation.close()
    assert snapshot(model) == before
    with pytest.raises(KeyboardInterrupt), adapt_batchnorm(model, inputs(8) if loading else None):
        model(inputs(6)[0])
        raise KeyboardInterrupt
    assert snapshot(model) == before


@pytest.mark.parametrize("loading", [True, False], ids=["loader", "by_batch"])
def test_training_in_the_context_leaves_no_buffer_changed(loading: bool) -> None:
    model = network().train()
    before = snapshot(model)
    with adapt_batchnorm(model, inputs(8) if loading else None):
        model(inputs(6)[0])
    assert snapshot(model) == before


@pytest.mark.parametrize("loading", [True, False], ids=["loader", "by_batch"])
def test_a_model_is_adapted_once(loading: bool) -> None:
    model = network()
    before = snapshot(model)
    batches = inputs(8) if loading else None
    with adapt_batchnorm(model, batches):
        with pytest.raises(ValueError, match="leave that first"):
            adapt_batchnorm(model, batches)
        adapt_batchnorm(copy.deepcopy(model), inputs(8)).close()
    assert snapshot(model) == before
    adapt_batchnorm(model, batches).close()


def test_an_input_may_be_a_dict() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.network(batch["x"])

    model, batches = ByName(), inputs(6, 6, 6)
    expected = by_definition(model.network, batches[:2], 3.0, 12)
    with adapt_batchnorm(model, [{"x": x, "mask": x > 0} for x in batches], samples=8, mix=3.0):
        for name, value in expected.items():
            assert torch.allclose(model.network.state_dict()[name], value, **TOLERANCE)


@pytest.mark.parametrize("kind", ["torch", pytest.param("ours", marks=pytest.mark.slow)])
def test_a_compiled_model(kind: str) -> None:
    """Code that was compiled before is adapted, too, without a graph break."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network({"torch": nn, "ours": bn_lightning}[kind])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.compiler.reset()
    model = Own().eval()
    x = inputs(8)[0]
    eager = copy.deepcopy(model)
    model.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        source = model(x)
        with adapt_batchnorm(model), adapt_batchnorm(eager):
            torch.testing.assert_close(model(x), eager(x), **TOLERANCE)
        torch.testing.assert_close(model(x), source, rtol=0, atol=0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "samples": (network, {"samples": 1}, "`samples`.*got 1"),
    "negative": (network, {"mix": -1.0}, "`mix`.*got -1"),
    "infinite": (network, {"mix": float("inf")}, "`mix`.*got inf"),
    "none": (lambda: nn.Linear(4, 3), {}, "`model`.*got Linear"),
    "untracked": (lambda: nn.BatchNorm1d(3, track_running_stats=False), {}, "`model`"),
    "frozen": (lambda: bn_lightning.BatchNorm1d(3).freeze_stats(), {}, "`model`"),
}


@pytest.mark.parametrize(("make_model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments(
    make_model: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        adapt_batchnorm(make_model(), inputs(8), **options)


def test_one_value_per_channel_has_no_statistics() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`mix`=0"), adapt_batchnorm(model):
        model(inputs(1)[0])
    assert snapshot(model) == before


@pytest.mark.slow
def test_digits_of_less_contrast() -> None:
    """The accuracies that docs/plugin.md names: what adaptation wins, and where it fails."""
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64, eval_batch_size=400, validation_fraction=0.1, seed=1)
    data.setup("fit")
    layers: list[nn.Module] = [nn.Flatten()]
    for features in (784, 100):
        layers += [nn.Linear(features, 100), nn.BatchNorm1d(100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        for x, target in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    model.eval()
    [(x, target)] = data.test_dataloader()
    order = torch.randperm(len(x))
    x, target = x[order], target[order]
    grey = 0.3 * x + 0.4

    def accuracy(x: Tensor, target: Tensor, batch_size: int) -> float:
        with torch.no_grad():
            predicted = torch.cat([model(batch).argmax(1) for batch in x.split(batch_size)])
        return round((predicted == target).float().mean().item(), 2)

    by_class = target.argsort()
    found = {"clean": accuracy(x, target, 64), "grey": accuracy(grey, target, 64)}
    with adapt_batchnorm(model, [grey]):
        found["loader"] = accuracy(grey, target, 64)
    with adapt_batchnorm(model):
        found["batches_of_64"] = accuracy(grey, target, 64)
        found["batches_of_8"] = accuracy(grey, target, 8)
        found["sorted_by_class"] = accuracy(grey[by_class], target[by_class], 8)
    assert found["clean"] > 0.9 and found["loader"] > 0.9 and found["batches_of_64"] > 0.9
    assert found["grey"] < 0.5 and 0.7 < found["batches_of_8"] < 0.9, found
    assert found["sorted_by_class"] < 0.3


# The callback.


class Watch(Callback):
    """Records statistics and random states at each batch of test and predict."""

    def __init__(self) -> None:
        self.seen: list[Statistics] = []
        self.streams: list[Any] = []

    @override
    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(statistics(pl_module))
        streams = torch.get_rng_state(), np.random.get_state()[1], random.getstate()[1]
        self.streams.append([np.asarray(state).tolist() for state in streams])

    @override
    def on_predict_batch_end(self, *args: Any) -> None:
        self.on_test_batch_end(*args)


def shifted(shift: float) -> DataLoader:
    """Other data than `loader`, in batches of 8."""
    x, y = loader().dataset.tensors
    return DataLoader(TensorDataset(x * 2 + shift, y), 8)


def expected_statistics(module: Boring, data: DataLoader, mix: float, samples: int) -> Statistics:
    return by_definition(module, [x for x, _ in data], mix, samples)


class SeveralLoaders(Boring):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("inference_mode", [True, False], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("use", ["test", "predict"])
def test_of_the_data(tmp_path: Path, use: str, inference_mode: bool) -> None:
    """Each loader is adapted to by itself, from the statistics of training."""
    module, watch = boring().eval(), Watch()
    module.__class__ = SeveralLoaders
    before = snapshot(module)
    data = [shifted(3.0), shifted(-5.0)]
    callbacks = [watch, AdaptBatchNorm(samples=20, mix=8)]
    run = trainer(tmp_path, callbacks, inference_mode=inference_mode)
    if use == "test":
        run.test(module, data, verbose=False)
    else:
        predicted = run.predict(module, data)
    assert snapshot(module) == before
    assert len(watch.seen) == 12
    for number, loaded in enumerate(data):
        expected = expected_statistics(module, loaded, 8, 20)
        for seen in watch.seen[6 * number : 6 * number + 6]:
            torch.testing.assert_close(seen, expected, **TOLERANCE)
    if use == "predict":
        with adapt_batchnorm(module, data[1], samples=20, mix=8):
            expected_y = [module(x) for x, _ in data[1]]
        torch.testing.assert_close(predicted[1], expected_y, **TOLERANCE)


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_of_each_batch(tmp_path: Path, fused: bool) -> None:
    module, data = boring().eval(), shifted(4.0)
    before = snapshot(module)
    callbacks: list[Callback] = [FusedBatchNorm()] if fused else []
    predicted = trainer(tmp_path, [*callbacks, AdaptBatchNorm()]).predict(module, data)
    assert snapshot(module) == before
    trained = copy.deepcopy(module)
    for layer in norms(trained).values():
        layer.train()
    expected = [trained(x) for x, _ in data]
    torch.testing.assert_close(predicted, expected, **TOLERANCE)


@pytest.mark.parametrize("samples", [None, 16], ids=["by_batch", "loader"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "ctrl_c"]
)
def test_after_an_error_in_a_test(
    tmp_path: Path, samples: int | None, error: BaseException
) -> None:
    class Fails(Callback):
        @override
        def on_test_batch_end(self, *args: Any) -> None:
            raise error

    module = boring().eval()
    before = snapshot(module)
    run = trainer(tmp_path, [AdaptBatchNorm(samples), Fails()])
    with pytest.raises((RuntimeError, SystemExit)):
        run.test(module, loader(), verbose=False)
    assert snapshot(module) == before


def test_fit_and_validate_are_not_changed(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [AdaptBatchNorm(16)], [AdaptBatchNorm()]):
        module = boring()
        run = trainer(tmp_path, callbacks, max_epochs=1)
        run.fit(module, loader(), loader())
        results.append((module.losses, run.validate(module, loader(), verbose=False)))
    assert results[0] == results[1] == results[2]


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*")
def test_random_states_are_not_changed(tmp_path: Path) -> None:
    streams = []
    for callbacks in ([], [AdaptBatchNorm(16)]):
        watch = Watch()
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        trainer(tmp_path, [watch, *callbacks]).test(boring(), loader(True), verbose=False)
        streams.append(watch.streams)
    assert streams[0] == streams[1]


def test_after_training_with_frozen_statistics(tmp_path: Path) -> None:
    """The fit's freezing has ended when the test begins."""
    module, watch = boring(), Watch()
    run = trainer(tmp_path, [FreezeBatchNorm(), watch, AdaptBatchNorm(1000)], max_epochs=1)
    run.fit(module, loader())
    run.test(module, shifted(4.0), verbose=False)
    expected = expected_statistics(module, shifted(4.0), 0, 1000)
    torch.testing.assert_close(watch.seen[0], expected, **TOLERANCE)


LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "iterator": (lambda: iter([*loader()]), "an iterator"),
    "persistent": (
        lambda: DataLoader(
            loader().dataset,
            8,
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context="fork",
        ),
        "persistent_workers=True",
    ),
}


@pytest.mark.parametrize(("make_loader", "message"), LOADERS.values(), ids=LOADERS)
def test_a_loader_that_cannot_be_read_twice_is_refused(
    tmp_path: Path, make_loader: Callable[[], Any], message: str
) -> None:
    module = boring().eval()
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"AdaptBatchNorm.*{message}"):
        trainer(tmp_path, [AdaptBatchNorm(16)]).test(module, make_loader(), verbose=False)
    assert snapshot(module) == before


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`.*")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*")
def test_two_ranks_average(tmp_path: Path, two_ranks: dict[str, Any]) -> None:
    """Both ranks have the statistics of both ranks' inputs."""

    class Report(Callback):
        def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            mine = [x for x, _ in trainer.test_dataloaders]
            report = {"x": mine, "got": statistics(pl_module)}
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")

    run = trainer(tmp_path, [AdaptBatchNorm(1000, mix=12), Report()], **two_ranks)
    run.test(boring(), loader(), verbose=False)
    reports = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert not torch.equal(reports[0]["x"][0], reports[1]["x"][0])
    of_ranks = [by_definition(boring(), report["x"], 6, 1000) for report in reports]
    for name, got in reports[0]["got"].items():
        assert torch.equal(got, reports[1]["got"][name])
        expected = (of_ranks[0][name] + of_ranks[1][name]) / 2
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_lightning_cli_takes_the_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    # Lightning uses a function of jsonargparse that is deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI warns about arguments beside its own
    callbacks = [
        {
            "class_path": "bn_lightning.callbacks.FreezeBatchNorm",
            "init_args": {"from_epoch": 1, "modules": ["features"], "affine": True},
        },
        {
            "class_path": "bn_lightning.callbacks.AdaptBatchNorm",
            "init_args": {"samples": 64, "mix": 16},
        },
    ]
    options = {"callbacks": callbacks, "logger": False, "accelerator": "cpu"}
    cli = LightningCLI(
        Boring,
        run=False,
        args={"trainer": options},
        save_config_callback=None,
        seed_everything_default=False,
    )
    freeze, adapt = cli.trainer.callbacks[:2]
    assert isinstance(freeze, FreezeBatchNorm) and isinstance(adapt, AdaptBatchNorm)
    assert (freeze.from_epoch, freeze.modules, freeze.affine) == (1, ["features"], True)
    assert (adapt.samples, adapt.mix) == (64, 16)
