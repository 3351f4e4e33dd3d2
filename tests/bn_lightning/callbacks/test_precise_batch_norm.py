"""PreciseBatchNorm: statistics, when they are computed, and that nothing else changes."""

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
)

import bn_lightning
from bn_lightning.callbacks import PreciseBatchNorm, RunCheckpoints
from bn_lightning.data.batches import TensorBatches

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data, and its warning about a missing validation loader.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # Some layers are in evaluation mode on purpose.
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]

MAKERS = {"ours": bn_lightning, "torch": nn}

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

State = dict[str, Tensor]


class Module(LightningModule):
    """Trains a network with cross-entropy; records losses, random states and modes."""

    def __init__(self, network: nn.Module, lr: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.lr = lr
        self.losses: list[float] = []
        self.streams: list[Any] = []
        self.modes: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        streams = torch.get_rng_state(), np.random.get_state()[1], random.getstate()[1]
        self.streams.append([np.asarray(state).tolist() for state in streams])
        self.modes.append([module.training for module in self.modules()])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validations(Callback):
    """Records the state before, in and after each validation; precedes PreciseBatchNorm."""

    def __init__(self) -> None:
        self.before: list[State] = []
        self.seen: list[State] = []
        self.modes: list[bool] = []
        self.stream: Tensor | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self.stream = torch.get_rng_state()
            self.before.append(state_of(pl_module.network))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Module, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.modes += [module.training for module in pl_module.modules()]
            self.seen.append(state_of(pl_module.network))


def state_of(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def norms(network: nn.Module) -> dict[str, _BatchNorm]:
    return {name: x for name, x in network.named_modules() if isinstance(x, _BatchNorm)}


def statistics(state: State) -> State:
    return {name: value for name, value in state.items() if "running_" in name}


def assert_same(state: State, other: State) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def assert_close(state: State, other: State, **tolerances: float) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value.double(), other[name].double(), msg=name, **tolerances)


def plain_average(
    network: nn.Module, batches: Any, samples: int = 10_000, stream: Tensor | None = None
) -> State:
    """Compute the running statistics by definition, in fp64 except for the network's forward.

    The network must be in its training mode.
    """
    network = copy.deepcopy(network)
    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        columns = args[0].detach().double().movedim(1, -1).flatten(0, -2).numpy()
        found.setdefault(f"{name}.running_mean", []).append(columns.mean(0))
        found.setdefault(f"{name}.running_var", []).append(columns.var(0, ddof=1))

    for name, layer in norms(network).items():
        layer.register_forward_pre_hook(partial(keep, name))
    seen = 0
    with torch.random.fork_rng(), torch.no_grad():
        if stream is not None:
            torch.set_rng_state(stream)
        for x, _ in batches:
            network(x)
            seen += len(x)
            if seen >= samples:
                break
    return {name: torch.from_numpy(np.mean(values, 0)) for name, values in found.items()}


def mlp(make: Any = nn, dropout: float = 0.0, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3),
        make.BatchNorm1d(3, **options),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(3, 5),
        make.BatchNorm1d(5, **options),
        nn.Sigmoid(),
        nn.Linear(5, 2),
    )


def tensors(samples: int = 24, shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(samples, *shape, generator=generator) + 1
    return x, torch.randint(2, (samples,), generator=generator)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """A loader with batches of these sizes that draws no random numbers."""
    x, target = tensors(sum(sizes))
    return list(zip(x.split(sizes), target.split(sizes), strict=True))


def loader(samples: int = 24, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*tensors(samples)), **{"batch_size": 6, **options})


class Counted:
    """A loader that counts the batches read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.read: list[int] = []  # shared by copies

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.batches):
            self.read.append(i)
            yield batch


def fit(
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    train: Any = None,
    validation: Any = "default",
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=any(isinstance(x, RunCheckpoints) for x in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "num_sanity_val_steps": 0, **options},
    )
    trainer.fit(
        module,
        loader() if train is None else train,
        loader() if validation == "default" else validation,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return trainer


class Failing(Module):
    """Raises in its second step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise RuntimeError("no")


class TestStatistics:
    """After the validation at the end of an epoch the weights have not changed since."""

    def check(
        self,
        folder: Path,
        network: nn.Module,
        train: Any = None,
        samples: int = 10_000,
        **options: Any,
    ) -> State:
        """Train, compare the statistics with the plain average, and return them."""
        module, validations = Module(network), Validations()
        fit(folder, module, validations, PreciseBatchNorm(samples), train=train, **options)
        got = statistics(state_of(network))
        average = plain_average(
            network, loader() if train is None else train, samples, validations.stream
        )
        assert_close(got, average, rtol=1e-5, atol=1e-6)
        assert_same(statistics(validations.seen[-1]), got)
        for name, value in statistics(validations.before[-1]).items():
            assert not torch.allclose(value, got[name], rtol=1e-2), name
        return got

    @makers
    def test_are_the_plain_average(self, tmp_path: Path, make: Any) -> None:
        self.check(tmp_path, mlp(make))

    @makers
    def test_of_a_convolution(self, tmp_path: Path, make: Any) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 3, 2), make.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        )
        data = DataLoader(TensorDataset(*tensors(24, (1, 3, 3))), batch_size=6)
        self.check(tmp_path, network, data, validation=data)

    @makers
    def test_each_batch_has_equal_weight(self, tmp_path: Path, make: Any) -> None:
        self.check(tmp_path, mlp(make), DataLoader(batches(9, 2, 5), batch_size=None))

    def test_of_micro_batches(self, tmp_path: Path) -> None:
        """With gradient accumulation the micro-batches are averaged, under the last weights."""
        self.check(tmp_path, mlp(), accumulate_grad_batches=2)

    @makers
    def test_a_layer_used_twice(self, tmp_path: Path, make: Any) -> None:
        class Twice(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[1](self[0](self[0](x) ** 3 + 10))

        torch.manual_seed(0)
        self.check(tmp_path, Twice(make.BatchNorm1d(4), nn.Linear(4, 2)))

    @makers
    def test_with_dropout(self, tmp_path: Path, make: Any) -> None:
        """In training mode, with dropout active."""
        network = mlp(make, dropout=0.5)
        got = self.check(tmp_path, network)
        network[3].eval()
        without = plain_average(network, loader())
        assert not torch.allclose(got["5.running_var"].double(), without["5.running_var"], rtol=0.1)

    def test_of_a_shuffled_loader(self, tmp_path: Path) -> None:
        network = mlp()
        got = self.check(tmp_path, network, loader(shuffle=True), samples=12)
        in_order = plain_average(network, loader(), 12)
        assert not torch.allclose(got["1.running_mean"].double(), in_order["1.running_mean"])

    @pytest.mark.parametrize(
        ("samples", "read"),
        [(2, 1), (6, 1), (7, 2), (18, 3), (24, 4), (1000, 4)],
        ids=["one_batch", "a_whole", "begun", "three", "all", "more_than_there_are"],
    )
    def test_num_samples(self, tmp_path: Path, samples: int, read: int) -> None:
        data = Counted(batches(6, 6, 6, 6))
        network = mlp()
        self.check(tmp_path, network, data, samples)
        # Once for training and once for the statistics; the test itself has read the last ones.
        assert data.read == [0, 1, 2, 3, *range(read), *range(read)]

    def test_of_a_loader_of_its_own(self, tmp_path: Path) -> None:
        network, other = mlp(), [(x * 3 + 2, y) for x, y in batches(8, 8)]
        fit(tmp_path, Module(network), PreciseBatchNorm(1000, dataloader=other))
        average = plain_average(network, other)
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "pack", [tuple, list, lambda batch: batch[0]], ids=["tuple", "list", "input"]
    )
    def test_a_batch_may_be_the_input_alone(
        self, tmp_path: Path, pack: Callable[[Any], Any]
    ) -> None:
        network = mlp()
        own = [pack(batch) for batch in batches(8, 8)]
        fit(tmp_path, Module(network), PreciseBatchNorm(1000, dataloader=own))
        average = plain_average(network, batches(8, 8))
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)

    def test_the_running_averages_go_on_from_there(self, tmp_path: Path) -> None:
        network, validations = mlp(momentum=0.2), Validations()
        module = Module(network, lr=0.0)
        data = batches(8, 8)
        train = DataLoader(data, batch_size=None)
        fit(tmp_path, module, validations, PreciseBatchNorm(1000), train=train, max_epochs=2)
        first, second = (plain_average(network, [batch]) for batch in data)
        expected = {}
        for name, value in plain_average(network, data).items():
            for batch in (first, second):
                value = 0.8 * value + 0.2 * batch[name]
            expected[name] = value
        assert_close(statistics(validations.before[1]), expected, rtol=1e-5, atol=1e-6)

    @makers
    @pytest.mark.parametrize("momentum", [0.3, None], ids=str)
    def test_momentum_is_restored(self, tmp_path: Path, make: Any, momentum: float | None) -> None:
        network = mlp(make, momentum=momentum)
        self.check(tmp_path, network)
        assert [layer.momentum for layer in norms(network).values()] == [momentum] * 2


class TestPrecision:
    def test_double(self, tmp_path: Path) -> None:
        network = mlp()
        fit(tmp_path, Module(network), PreciseBatchNorm(1000), precision="64-true")
        average = plain_average(network, [(x.double(), y) for x, y in loader()])
        assert_close(statistics(state_of(network)), average, rtol=1e-12, atol=1e-12)

    def test_bf16(self, tmp_path: Path) -> None:
        """Lightning converts the loader's fp32 for the network."""
        network = mlp()
        fit(tmp_path, Module(network), PreciseBatchNorm(1000), precision="bf16-true")
        average = plain_average(network, [(x.bfloat16(), y) for x, y in loader()])
        # Four batches, each rounded to 8 bits.
        assert_close(statistics(state_of(network)), average, rtol=0.03, atol=0.01)

    def test_mixed(self, tmp_path: Path) -> None:
        network = mlp()
        fit(tmp_path, Module(network), PreciseBatchNorm(1000), precision="bf16-mixed")
        with torch.autocast("cpu", torch.bfloat16):
            average = plain_average(network, loader())
        exact = plain_average(network, loader())
        got = statistics(state_of(network))
        assert_close(got, average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(got["1.running_var"].double(), exact["1.running_var"], rtol=1e-5)

    def test_what_the_module_does_to_its_batches(self, tmp_path: Path) -> None:
        class Prepared(Module):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return batch[0] + 1, batch[1]

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return batch[0] * 3, batch[1]

        network = mlp()
        fit(tmp_path, Prepared(network), PreciseBatchNorm(1000))
        average = plain_average(network, [((x + 1) * 3, y) for x, y in loader()])
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)


class Noisy(Dataset):
    """Examples with noise from each global random generator."""

    def __init__(self) -> None:
        self.x, self.target = tensors()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = float(torch.randn(())) + np.random.rand() + random.random()
        return self.x[i] + noise, self.target[i]


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "in_order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "generator": lambda: loader(shuffle=True, generator=own_generator()),
    "sampler_generator": lambda: loader(
        sampler=RandomSampler(range(24), replacement=True, generator=own_generator())
    ),
    "batch_sampler_generator": lambda: DataLoader(
        TensorDataset(*tensors()),
        batch_sampler=BatchSampler(RandomSampler(range(24), generator=own_generator()), 6, True),
    ),
    "random_examples": lambda: DataLoader(Noisy(), batch_size=6, shuffle=True),
    "tensor_batches": lambda: TensorBatches(*tensors(), 6, shuffle=True, drop_last=True),
}


class TestLeftAlone:
    def run(
        self, folder: Path, *callbacks: Callback, network: nn.Module, train: Any, **options: Any
    ) -> Module:
        module = Module(network)
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        defaults = {"max_epochs": 3, "val_check_interval": 2}
        fit(folder, module, *callbacks, train=train, **{**defaults, **options})
        module.training_step(next(iter(loader())), 0)  # random states after the run
        return module

    def check(
        self, folder: Path, network: Callable[[], nn.Module], train: Callable[[], Any], **more: Any
    ) -> tuple[State, State]:
        """Check that training is bit-identical with and without; return both final states."""
        alone, validations = network(), Validations()
        first = self.run(folder, network=alone, train=train(), **more)
        precise = network()
        callbacks = (validations, PreciseBatchNorm(12))
        second = self.run(folder, *callbacks, network=precise, train=train(), **more)
        assert second.losses == first.losses
        assert second.streams == first.streams
        assert second.modes == first.modes
        assert len(validations.seen) > 3
        assert not any(validations.modes)
        states = state_of(alone), state_of(precise)
        rest = [{k: v for k, v in state.items() if "running_" not in k} for state in states]
        assert_same(*rest)  # num_batches_tracked among them
        return states

    @pytest.mark.parametrize("name", LOADERS)
    def test_training_is_bit_identical(self, tmp_path: Path, name: str) -> None:
        before, after = self.check(tmp_path, partial(mlp, dropout=0.5), LOADERS[name])
        for key, value in statistics(before).items():
            assert not torch.equal(value, after[key]), key

    def test_of_our_own_layers(self, tmp_path: Path) -> None:
        self.check(tmp_path, partial(mlp, bn_lightning, dropout=0.5), LOADERS["shuffled"])

    def test_while_gradients_accumulate(self, tmp_path: Path) -> None:
        """A validation between the batches of a step does not change their gradients."""
        more = {"accumulate_grad_batches": 2, "val_check_interval": 1}
        self.check(tmp_path, partial(mlp, dropout=0.5), LOADERS["shuffled"], **more)

    def test_buffers_of_other_modules(self, tmp_path: Path) -> None:
        """Spectral normalization updates its buffers in each training forward."""

        def network() -> nn.Module:
            layers = mlp()
            spectral_norm(layers[4])
            instance_norm = nn.InstanceNorm1d(2, track_running_stats=True)
            return nn.Sequential(nn.Unflatten(1, (2, 2)), instance_norm, nn.Flatten(), *layers)

        before, after = self.check(tmp_path, network, loader)
        assert not torch.equal(before["1.running_mean"], torch.zeros(2))
        assert torch.equal(before["1.running_mean"], after["1.running_mean"])
        assert torch.equal(before["1.running_var"], after["1.running_var"])

    @pytest.mark.parametrize("kind", ["eval", "stats_frozen", "not_tracked", "without"])
    @pytest.mark.parametrize("when", ["validation", "end"])
    def test_frozen_layers(self, tmp_path: Path, kind: str, when: Any) -> None:
        network = mlp(bn_lightning, dropout=0.5)
        if kind == "eval":
            network[1].eval()
        elif kind == "stats_frozen":
            network[1].freeze_stats()
        elif kind == "not_tracked":
            network[1].track_running_stats = False
        else:
            network[1] = bn_lightning.BatchNorm1d(3, track_running_stats=False)
        if kind != "without":
            nn.init.constant_(network[1].running_mean, 0.5)
            nn.init.constant_(network[1].running_var, 9.0)
        before = state_of(network[1])
        modes = {name: module.training for name, module in network.named_modules()}
        validations = Validations()
        callback = PreciseBatchNorm(1000, when)
        fit(tmp_path, Module(network), validations, callback, validation=loader())
        state = state_of(network[1])
        assert_same(
            *({k: v for k, v in s.items() if k not in ("weight", "bias")} for s in (before, state))
        )
        assert {name: module.training for name, module in network.named_modules()} == modes
        if when == "validation":
            average = plain_average(network, loader(), stream=validations.stream)
            got = statistics(state_of(network[5]))
            assert_close(got, {k: average[f"5.{k}"] for k in got}, rtol=1e-5, atol=1e-6)

    def test_all_of_them_frozen(self, tmp_path: Path) -> None:
        network, data = mlp(bn_lightning), Counted(batches(6, 6))
        for layer in norms(network).values():
            layer.freeze_stats()
        fit(tmp_path, Module(network), PreciseBatchNorm(1000), train=data)
        assert data.read == [0, 1]

    def test_no_batch_norm_at_all(self, tmp_path: Path) -> None:
        data = Counted(batches(6, 6))
        fit(tmp_path, Module(nn.Linear(4, 2)), PreciseBatchNorm(1000), train=data)
        assert data.read == [0, 1]

    def test_a_layer_that_the_forward_does_not_use(self, tmp_path: Path) -> None:
        class Auxiliary(Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__(network)
                self.head = nn.BatchNorm1d(4)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx) + self.head(batch[0]).square().sum()

        heads = []
        for callbacks in ((), (PreciseBatchNorm(1000),)):
            module = Auxiliary(mlp())
            fit(tmp_path, module, *callbacks)
            heads.append(state_of(module.head))
        assert_same(*heads)

    def test_a_data_set_that_keeps_what_it_makes(self, tmp_path: Path) -> None:
        """Lightning validates in inference mode; training cannot use inference tensors."""

        class Lazy(Dataset):
            def __init__(self) -> None:
                self.kept: dict[int, Any] = {}

            def __len__(self) -> int:
                return 4

            def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
                if i not in self.kept:
                    self.kept[i] = batches(6, 6, 6, 6)[i]
                return self.kept[i]

        module, data = Module(mlp()), DataLoader(Lazy(), batch_size=None)
        fit(tmp_path, module, PreciseBatchNorm(1000), train=data, val_check_interval=1)
        assert len(module.losses) == 4


class TestResuming:
    @pytest.mark.parametrize("saved_at", [2, 3, 4], ids=str)
    def test_resuming_is_bit_identical(self, tmp_path: Path, saved_at: int) -> None:
        class Save(Callback):
            def save(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == saved_at and not trainer.sanity_checking:
                    trainer.save_checkpoint(tmp_path / "a.ckpt")

            on_train_batch_end = on_validation_end = save

        def run(*callbacks: Callback, **options: Any) -> tuple[list[float], State]:
            module = Module(mlp())
            train = TensorBatches(*tensors(30), 6, shuffle=True, drop_last=True)
            more = {"max_epochs": 3, "val_check_interval": 2, **options}
            fit(tmp_path, module, PreciseBatchNorm(12), *callbacks, train=train, **more)
            return module.losses, state_of(module.network)

        losses, state = run(Save())
        resumed, resumed_state = run(ckpt_path=tmp_path / "a.ckpt")
        assert len(losses) == 15
        assert resumed == losses[saved_at:]
        assert_same(resumed_state, state)

    def test_the_position_in_the_epoch(self, tmp_path: Path) -> None:
        """The second pass does not move the training loader."""
        train = TensorBatches(*tensors(30), 6, shuffle=True, drop_last=True)
        positions = []

        class Position(Callback):
            def on_validation_end(self, *_: Any) -> None:
                positions.append(train.state_dict()["position"])

        fit(
            tmp_path,
            Module(mlp()),
            PreciseBatchNorm(24),
            Position(),
            train=train,
            val_check_interval=1,
        )
        assert positions == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("when", ["validation", "end"])
    def test_checkpoints(self, tmp_path: Path, when: Any) -> None:
        """Checkpoints have the new statistics, except with "end", which comes after them."""
        network, validations = mlp(), Validations()
        checkpoints = RunCheckpoints(tmp_path, monitor="val/loss", mode="min")
        callbacks = (validations, checkpoints, PreciseBatchNorm(1000, when))
        trainer = fit(tmp_path, Module(network), *callbacks)
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        average = plain_average(network, loader(), stream=validations.stream)
        running = statistics(validations.before[-1])
        expected = {"after": average, "last": average if when == "validation" else running}
        for name, state in {**expected, "best": expected["last"]}.items():
            saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
            got = {key.removeprefix("network."): value for key, value in saved.items()}
            assert_close(statistics(got), state, rtol=1e-5, atol=1e-6)


class TestWhen:
    def test_before_each_validation(self, tmp_path: Path) -> None:
        data = Counted(batches(6, 6))
        fit(tmp_path, Module(mlp()), PreciseBatchNorm(6), train=data, max_epochs=3)
        assert data.read == [0, 1, 0] * 3

    @pytest.mark.parametrize("failed_before", [False, True], ids=["first_fit", "after_a_failure"])
    def test_not_for_the_sanity_check(self, tmp_path: Path, failed_before: bool) -> None:
        data, callback = Counted(batches(6, 6)), PreciseBatchNorm(6)
        if failed_before:
            with pytest.raises(RuntimeError, match="no"):
                fit(tmp_path, Failing(mlp()), callback)
        more = {"num_sanity_val_steps": 2, "check_val_every_n_epoch": 5}
        fit(tmp_path, Module(mlp()), callback, train=data, **more)
        assert data.read == [0, 1]

    def test_without_gradients(self, tmp_path: Path) -> None:
        enabled: list[bool] = []
        network = mlp()
        network[0].register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
        callback, train = PreciseBatchNorm(1000, "end"), loader(12)
        fit(tmp_path, Module(network), callback, train=train, validation=None)
        assert enabled == [True, True, False, False]

    def test_at_the_end(self, tmp_path: Path) -> None:
        """Validations use the running averages, as without the callback."""
        seen = []
        for callbacks in ((), (PreciseBatchNorm(1000, "end"),)):
            network, validations, data = mlp(), Validations(), Counted(batches(6, 6))
            module = Module(network)
            fit(tmp_path, module, validations, *callbacks, train=data, max_epochs=2)
            seen.append(validations.seen)
        for alone, precise in zip(*seen, strict=True):
            assert_same(alone, precise)
        assert data.read == [0, 1] * 3
        average = plain_average(network, batches(6, 6))
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)
        tracked = {int(layer.num_batches_tracked) for layer in norms(network).values()}
        assert tracked == {4}

    def test_at_the_end_without_validation(self, tmp_path: Path) -> None:
        network = mlp()
        fit(tmp_path, Module(network), PreciseBatchNorm(1000, "end"), validation=None)
        average = plain_average(network, loader())
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("before", ["nothing", "fit", "failed_fit"])
    def test_a_validation_of_its_own_takes_none(self, tmp_path: Path, before: str) -> None:
        data, network = Counted(batches(6, 6)), mlp()
        callback, module = PreciseBatchNorm(6), Module(network)
        if before == "fit":
            fit(tmp_path, module, callback, train=data)
        elif before == "failed_fit":
            module = Failing(network)
            with pytest.raises(RuntimeError, match="no"):
                fit(tmp_path, module, callback, train=data)
        read, state = list(data.read), state_of(network)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
        )
        trainer.validate(module, loader(), verbose=False)
        assert data.read == read
        assert_same(state_of(network), state)

    def test_of_the_loader_of_the_epoch(self, tmp_path: Path) -> None:
        """`reload_dataloaders_every_n_epochs` replaces the loader."""
        made: list[Counted] = []

        class Reloading(Module):
            def train_dataloader(self) -> Any:
                made.append(Counted(batches(6, 6)))
                return made[-1]

        module = Reloading(mlp())
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[PreciseBatchNorm(6)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            max_epochs=2,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module, val_dataloaders=loader())
        # Two for training, one for the statistics; Lightning may first read from a new loader.
        assert [data.read[-3:] for data in made] == [[0, 1, 0]] * 2


class TestErrors:
    @makers
    @pytest.mark.parametrize("when", ["validation", "end"])
    @pytest.mark.parametrize("where", ["forward", "loader", "empty"])
    def test_statistics_do_not_change(
        self, tmp_path: Path, make: Any, when: Any, where: str
    ) -> None:
        network = mlp(make, momentum=0.3)
        good, wrong = batches(6, 6), torch.zeros(6, 5)

        class Breaking(Counted):
            def __iter__(self) -> Iterator[Any]:
                yield from super().__iter__()
                raise ValueError("no third batch")

        own = {"forward": [*good, (wrong, None)], "loader": Breaking(good), "empty": []}[where]
        states: list[Any] = []

        class Around(Callback):
            def note(self, trainer: Trainer, module: Module, *_: Any) -> None:
                modes = [part.training for part in network.modules()]
                states.append((state_of(network), modes))

            on_validation_start = on_train_end = on_exception = note

        message = {
            "forward": "shapes cannot be multiplied",
            "loader": "no third batch",
            "empty": "PreciseBatchNorm.*got none",
        }
        callbacks = (Around(), PreciseBatchNorm(1000, when, own))  # type: ignore[arg-type]
        with pytest.raises((RuntimeError, ValueError), match=message[where]):
            fit(tmp_path, Module(network), *callbacks)
        (before, modes), (after, modes_after) = states[-2:]
        assert_same(before, after)
        assert modes_after == modes
        assert [layer.momentum for layer in norms(network).values()] == [0.3, 0.3]


class TestRefused:
    def test_too_few_samples(self) -> None:
        with pytest.raises(ValueError, match="`num_samples`.*at least 2, got 1"):
            PreciseBatchNorm(1)

    def test_an_unknown_time(self) -> None:
        with pytest.raises(ValueError, match="`when`.*validation or end, got 'now'"):
            PreciseBatchNorm(10, "now")  # type: ignore[arg-type]

    LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
        "list": (lambda: [loader(), loader()], "several"),
        "dict": (lambda: {"a": loader(), "b": loader()}, "several"),
        "persistent": (
            lambda: loader(num_workers=1, persistent_workers=True, multiprocessing_context="fork"),
            "persistent_workers=True",
        ),
        "iterator": (lambda: iter(batches(6, 6)), "an iterator"),
    }

    @pytest.mark.parametrize("kind", LOADERS)
    def test_loaders_that_cannot_be_iterated_twice(self, tmp_path: Path, kind: str) -> None:
        make, message = self.LOADERS[kind]
        module = Module(mlp())
        with pytest.raises(ValueError, match=f"PreciseBatchNorm.*{message}.*`dataloader`"):
            fit(tmp_path, module, PreciseBatchNorm(6), train=make(), limit_train_batches=2)
        assert not module.losses

    def test_with_one_of_its_own_they_do_not_matter(self, tmp_path: Path) -> None:
        class Two(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch["a"], batch_idx)

        network, own = mlp(), batches(8, 8)
        callback = PreciseBatchNorm(1000, dataloader=own)
        fit(tmp_path, Two(network), callback, train={"a": loader(), "b": loader()})
        average = plain_average(network, own)
        assert_close(statistics(state_of(network)), average, rtol=1e-5, atol=1e-6)

    def test_an_iterator_of_its_own(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="PreciseBatchNorm.*an iterator"):
            fit(tmp_path, Module(mlp()), PreciseBatchNorm(6, dataloader=iter(batches(6))))


def test_two_ranks_average(tmp_path: Path, two_ranks: dict[str, Any]) -> None:
    """Each rank averages its own examples; the result is the mean over the ranks."""

    class Report(Callback):
        def on_validation_batch_start(self, trainer: Trainer, module: Module, *_: Any) -> None:
            mine = list(trainer.train_dataloader)
            report = {
                "x": torch.cat([x for x, _ in mine]),
                "mine": plain_average(copy.deepcopy(module.network).train(), mine),
                "got": state_of(module.network),
            }
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")

    # lr=0, because the order of summation in the gradient would change the weights.
    fit(
        tmp_path,
        Module(mlp(), lr=0.0),
        PreciseBatchNorm(1000),
        Report(),
        train=loader(),
        validation=loader(batch_size=12),
        **two_ranks,
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first["x"], second["x"])
    assert_same(first["got"], second["got"])
    mean = {name: (value + second["mine"][name]) / 2 for name, value in first["mine"].items()}
    assert_close(statistics(first["got"]), mean, rtol=1e-5, atol=1e-6)
    for name, value in mean.items():
        assert not torch.allclose(value, first["mine"][name], rtol=1e-2), name
    assert int(first["got"]["1.num_batches_tracked"]) == 2
