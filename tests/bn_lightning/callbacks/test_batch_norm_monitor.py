"""BatchNormMonitor: values and steps, and that measuring changes nothing else."""

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bn_lightning
from bn_lightning.callbacks import BatchNormMonitor
from bn_lightning.callbacks.batch_norm_monitor import dead_fraction, distances
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

NUMBERS = {"scale", "shift", "mean_distance", "log_std_distance", "dead"}
MAKERS = {"ours": bn_lightning, "torch": nn}

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Recorder(Logger):
    """Records the logged values by step, those of the layers apart from the others."""

    name = version = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.others: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = any(name.startswith("batch_norm/") for name in metrics)
        (self.rows if ours else self.others).append((step, metrics))

    @property
    def steps(self) -> list[int | None]:
        return [step for step, _ in self.rows]


class Module(LightningModule):
    """Trains a network on (x, class) with cross-entropy, and records the losses."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Journal(Callback):
    """Copies the network before and after each batch, and the inputs of the batch.

    Comes before the monitor in the list of callbacks, so that the copies have no hooks.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[nn.Module, Tensor, nn.Module]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.before = copy.deepcopy(pl_module.network), batch[0].clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        after = copy.deepcopy(pl_module.network)
        for module in after.modules():  # on_train_batch_end comes before the monitor's, too
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.entries.append((*self.before, after))


def norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    kind = nn.modules.batchnorm._BatchNorm
    return {name: x for name, x in network.named_modules() if isinstance(x, kind)}


def expected(before: nn.Module, x: Tensor, after: nn.Module) -> dict[str, float]:
    """Compute the statistics in fp64, from copies of the network before and after the batch `x`."""
    network = copy.deepcopy(before).double()
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(name: str, _: nn.Module, args: Any, kwargs: dict[str, Tensor], y: Tensor) -> None:
        pair = (*args, *kwargs.values(), y)
        inputs, outputs = (t.detach().movedim(1, -1).flatten(0, -2).numpy() for t in pair)
        if len(outputs):
            seen.setdefault(name, (inputs, outputs))

    for name, layer in norms(network).items():
        layer.register_forward_hook(partial(keep, name), with_kwargs=True)
    network(x.double())
    values = {}
    for name, layer in norms(before).items():
        weight, bias = norms(after)[name].weight, norms(after)[name].bias
        values[f"{name}/scale"] = 1.0 if weight is None else weight.double().abs().mean().item()
        values[f"{name}/shift"] = 0.0 if bias is None else bias.double().abs().mean().item()
        if name not in seen:
            continue
        inputs, outputs = seen[name]
        if layer.running_mean is not None and layer.running_var is not None:
            deviation = np.sqrt(layer.running_var.double().numpy() + layer.eps)
            away = (inputs.mean(0) - layer.running_mean.double().numpy()) / deviation
            ratio = np.log(np.sqrt(inputs.var(0) + layer.eps) / deviation)
            values[f"{name}/mean_distance"] = np.sqrt((away**2).mean())
            values[f"{name}/log_std_distance"] = np.sqrt((ratio**2).mean())
        dead = (outputs <= 0).all(0) | (outputs == outputs[0]).all(0)
        values[f"{name}/dead"] = dead.mean()
    return {f"batch_norm/network.{name}": float(value) for name, value in values.items()}


def mlp(make: Any = nn, dropout: float = 0.0, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return scattered(
        nn.Sequential(
            nn.Linear(4, 3),
            make.BatchNorm1d(3, **options),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(3, 5),
            make.BatchNorm1d(5, **options),
            nn.Sigmoid(),
            nn.Linear(5, 2),
        )
    )


def scattered(network: nn.Module) -> nn.Module:
    """Give the layers statistics and parameters other than the initial ones."""
    for layer in norms(network).values():
        if layer.running_mean is not None and layer.running_var is not None:
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.2, 5)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return network


def tensors(samples: int = 24, shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(samples, *shape, generator=generator) + 1
    return x, torch.randint(2, (samples,), generator=generator)


def loader(x: Tensor | None = None, **options: Any) -> DataLoader:
    data = tensors() if x is None else (x, torch.zeros(len(x), dtype=torch.long))
    return DataLoader(TensorDataset(*data), **{"batch_size": 6, **options})


def fit(
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    train: Any = None,
    validation: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_steps": 6,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": recorder,
            **options,
        },
    )
    trainer.fit(
        module,
        loader() if train is None else train,
        validation,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return recorder


def check(
    folder: Path, network: nn.Module, x: Tensor | None = None, **options: Any
) -> list[dict[str, float]]:
    """Measure every step of a short run, compare with fp64, and return the rows."""
    journal = Journal()
    recorder = fit(
        folder,
        Module(network),
        journal,
        BatchNormMonitor(1),
        train=None if x is None else loader(x),
        **{"max_steps": 3, **options},
    )
    assert recorder.steps == [1, 2, 3]
    for (_, row), entry in zip(recorder.rows, journal.entries, strict=True):
        assert row == pytest.approx(expected(*entry), rel=1e-4, abs=1e-6)
    return [row for _, row in recorder.rows]


class TestDistances:
    @pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (2, 1, 3, 2), (2, 3, 2, 1, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_as_numpy(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x = (3 * torch.randn(shape) + 2).to(dtype)
        mean, var = torch.randn(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)
        columns = x.double().movedim(1, -1).flatten(0, -2).numpy()
        deviation = np.sqrt(var.double().numpy() + 1e-3)
        away = (columns.mean(0) - mean.double().numpy()) / deviation
        ratio = np.log(np.sqrt(columns.var(0) + 1e-3) / deviation)
        got = distances(x, mean, var, 1e-3)
        assert [value.dtype for value in got] == [torch.float32] * 2
        assert [value.shape for value in got] == [()] * 2
        for value, channels in zip(got, (away, ratio), strict=True):
            assert value.item() == pytest.approx(math.sqrt((channels**2).mean()), rel=1e-5)

    def test_by_hand(self) -> None:
        """A batch of mean 3 and std 2; running std 1 and 4."""
        x = torch.tensor([1.0, 5.0]).repeat(2, 1).T
        mean, std = distances(x, torch.tensor([2.0, 7.0]), torch.tensor([1.0, 16.0]), 0.0)
        assert mean.item() == pytest.approx(1)  # one std above and one below
        assert std.item() == pytest.approx(math.log(2))  # twice as wide and half as wide

    def test_statistics_of_the_batch_itself_are_no_distance_away(self) -> None:
        x = torch.randn(50, 3)
        got = distances(x, x.mean(0), x.var(0, correction=0), 1e-5)
        assert torch.stack(got).abs().max() < 1e-6

    def test_a_mean_far_from_zero_loses_no_precision(self) -> None:
        x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
        _, std = distances(x, torch.zeros(2), torch.ones(2), 0.0)
        exact = x.double().std(0, correction=0).log().square().mean().sqrt().item()
        assert std.item() == pytest.approx(exact, rel=1e-2)


class TestDeadShare:
    CHANNELS = {
        "negative": ([-1.0, -2.0, -3.0], True),
        "negative or zero": ([-1.0, 0.0, -3.0], True),
        "zero": ([0.0, 0.0, 0.0], True),
        "one positive number": ([2.0, 2.0, 2.0], True),
        "one negative number": ([-2.0, -2.0, -2.0], True),
        "once positive": ([-1.0, 1e-4, -1.0], False),
        "positive": ([1.0, 2.0, 3.0], False),
    }

    @pytest.mark.parametrize("name", CHANNELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_by_hand(self, name: str, dtype: torch.dtype) -> None:
        values, dead = self.CHANNELS[name]
        got = dead_fraction(torch.tensor(values, dtype=dtype)[:, None])
        assert got.dtype == torch.float32
        assert got.item() == dead

    @pytest.mark.parametrize("space", [(), (2,), (2, 3)], ids=str)
    def test_a_channel_is_dead_over_batch_and_space(self, space: tuple[int, ...]) -> None:
        y = -torch.rand(4, 5, *space) - 0.1
        y[1, 2] = y[3, 4] = 1.0
        assert dead_fraction(y).item() == pytest.approx(3 / 5)


class TestNumbers:
    @makers
    def test_of_each_layer_at_each_step(self, tmp_path: Path, make: Any) -> None:
        rows = check(tmp_path, mlp(make))
        names = {f"batch_norm/network.{layer}/{number}" for layer in (1, 5) for number in NUMBERS}
        assert all(set(row) == names for row in rows)

    @makers
    def test_of_a_convolution(self, tmp_path: Path, make: Any) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 3, 2), make.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        )
        check(tmp_path, scattered(network), tensors(24, (1, 3, 3))[0])

    @makers
    @pytest.mark.parametrize("momentum", [0.5, None], ids=str)
    def test_whatever_the_momentum(self, tmp_path: Path, make: Any, momentum: float | None) -> None:
        check(tmp_path, mlp(make, momentum=momentum, eps=0.1))

    @makers
    def test_without_weight_and_bias(self, tmp_path: Path, make: Any) -> None:
        for row in check(tmp_path, mlp(make, affine=False)):
            assert row["batch_norm/network.1/scale"] == 1
            assert row["batch_norm/network.1/shift"] == 0

    @makers
    def test_without_bias(self, tmp_path: Path, make: Any) -> None:
        network = mlp(make)
        for layer in norms(network).values():
            layer.bias = None
        for row in check(tmp_path, network):
            assert row["batch_norm/network.1/scale"] != 1
            assert row["batch_norm/network.1/shift"] == 0

    @makers
    def test_without_running_statistics(self, tmp_path: Path, make: Any) -> None:
        for row in check(tmp_path, mlp(make, track_running_stats=False)):
            assert {name.rpartition("/")[2] for name in row} == {"scale", "shift", "dead"}

    def test_frozen_layers_are_measured_too(self, tmp_path: Path) -> None:
        network = mlp(bn_lightning)
        network[1].freeze_stats()
        network[5].eval()
        state = copy.deepcopy(dict(network.named_buffers()))
        check(tmp_path, network)
        for name, buffer in network.named_buffers():
            assert torch.equal(buffer, state[name]), name

    def test_dead_channels(self, tmp_path: Path) -> None:
        network = mlp()
        with torch.no_grad():
            network[5].weight[:2] = 0.0  # constant: after a sigmoid they have no gradient here
            network[5].bias[0] = 5.0
            network[1].bias[:] = torch.tensor([-100.0, 100.0, 0.0])
        row = check(tmp_path, network)[0]
        assert row["batch_norm/network.1/dead"] == pytest.approx(1 / 3)
        assert row["batch_norm/network.5/dead"] == pytest.approx(2 / 5)

    def test_a_fused_activation_is_part_of_the_layer(self, tmp_path: Path) -> None:
        network = mlp(bn_lightning, activation="relu")
        with torch.no_grad():
            network[1].bias[:] = torch.tensor([-100.0, -100.0, 0.0])
        assert check(tmp_path, network)[0]["batch_norm/network.1/dead"] == pytest.approx(2 / 3)

    @pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "bf16-mixed"])
    def test_the_precision_of_the_run(self, tmp_path: Path, precision: Any) -> None:
        """The layer comes first, so that its inputs are known exactly."""
        network = scattered(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
        dtype = {"64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}
        x = tensors()[0][:6]
        if precision.endswith("true"):
            x = x.to(dtype[precision.partition("-")[0]])
        before = copy.deepcopy(network).to(x.dtype)
        module = Module(network)
        recorder = fit(
            tmp_path, module, BatchNormMonitor(1), train=loader(x), max_steps=1, precision=precision
        )
        ((_, row),) = recorder.rows
        # Half precision may round an output to zero; here none is near zero.
        assert row == pytest.approx(expected(before, x, module.network), rel=1e-4)

    def test_the_first_call_of_a_layer_is_measured(self, tmp_path: Path) -> None:
        class Twice(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[1](self[0](self[0](x) ** 3 + 10))

        check(tmp_path, scattered(Twice(nn.BatchNorm1d(4), nn.Linear(4, 2))))

    def test_a_use_without_examples_does_not_count(self, tmp_path: Path) -> None:
        class Empty(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                self[0](x[:0])
                return super().forward(x)

        for row in check(tmp_path, scattered(Empty(nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)))):
            assert len(row) == len(NUMBERS)

    def test_a_layer_that_training_does_not_use(self, tmp_path: Path) -> None:
        class Unused(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[0](x)

        for row in check(tmp_path, Unused(nn.Linear(4, 2), nn.BatchNorm1d(2))):
            assert set(row) == {"batch_norm/network.1/scale", "batch_norm/network.1/shift"}

    def test_an_input_passed_by_name(self, tmp_path: Path) -> None:
        class ByName(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[1](self[0](input=x))

        for row in check(tmp_path, scattered(ByName(nn.BatchNorm1d(4), nn.Linear(4, 2)))):
            assert len(row) == len(NUMBERS)

    def test_a_compiled_network(self, tmp_path: Path) -> None:
        network = torch.compile(mlp(), backend="eager")
        recorder = fit(tmp_path, Module(network), BatchNormMonitor(3))
        assert recorder.steps == [1, 3, 6]
        for _, row in recorder.rows:
            assert {name.rpartition("/")[2] for name in row} == {"scale", "shift"}


class TestSteps:
    @pytest.mark.parametrize(
        ("every", "steps"),
        [(1, [*range(1, 11)]), (4, [1, 4, 8]), (5, [1, 5, 10]), (11, [1])],
        ids=["1", "4", "5", "11"],
    )
    def test_the_first_and_every_nth(self, tmp_path: Path, every: int, steps: list[int]) -> None:
        recorder = fit(tmp_path, Module(mlp()), BatchNormMonitor(every), max_steps=10)
        assert recorder.steps == steps

    def test_accumulated_gradients(self, tmp_path: Path) -> None:
        """Each step once, with its first batch and the parameters after its last batch."""
        journal = Journal()
        recorder = fit(
            tmp_path,
            Module(mlp()),
            journal,
            BatchNormMonitor(2),
            accumulate_grad_batches=2,
            max_steps=4,
        )
        assert recorder.steps == [1, 2, 4]
        for step, row in recorder.rows:
            first, last = journal.entries[2 * step - 2], journal.entries[2 * step - 1]
            assert row == pytest.approx(expected(first[0], first[1], last[2]), rel=1e-4, abs=1e-6)

    def test_two_optimizers_in_manual_optimization(self, tmp_path: Path) -> None:
        """Lightning counts the steps of both; each measurement is of its own batch."""

        class Manual(Module):
            automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                    optimizer.step()

            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD([p], lr=0.1) for p in self.network[1].parameters()]

        journal = Journal()
        recorder = fit(tmp_path, Manual(mlp()), journal, BatchNormMonitor(4), max_steps=16)
        assert recorder.steps[0] == 2
        assert len(recorder.steps) >= 3
        for step, row in recorder.rows:
            entry = journal.entries[step // 2 - 1]
            assert row == pytest.approx(expected(*entry), rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("saved_at", [3, 7, 8], ids=str)
    def test_the_same_measurements_after_resuming(self, tmp_path: Path, saved_at: int) -> None:
        class Save(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == saved_at:
                    trainer.save_checkpoint(tmp_path / "a.ckpt")

        def run(*callbacks: Callback, **options: Any) -> Recorder:
            return fit(
                tmp_path,
                Module(mlp()),
                BatchNormMonitor(4),
                *callbacks,
                train=TensorBatches(*tensors(), 6, shuffle=True, drop_last=True),
                max_steps=16,
                **options,
            )

        whole = run(Save())
        resumed = run(ckpt_path=tmp_path / "a.ckpt")
        assert whole.steps == [1, 4, 8, 12, 16]
        assert resumed.rows == [(step, row) for step, row in whole.rows if step > saved_at]

    def test_one_callback_in_two_runs(self, tmp_path: Path) -> None:
        monitor = BatchNormMonitor(4)
        for _ in range(2):
            assert fit(tmp_path, Module(mlp()), monitor).steps == [1, 4]


class Hooks(Callback):
    """Counts the forward hooks of the network in every hook of the Trainer."""

    def __init__(self) -> None:
        self.outside: list[int] = []

    def count(self, trainer: Trainer, pl_module: Module, *_: Any) -> None:
        self.outside.append(hooks(pl_module))

    on_train_batch_end = on_validation_start = on_train_end = on_exception = count


def hooks(module: nn.Module) -> int:
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in module.modules())


class Watched(Module):
    """Records the number of hooks in training, and fails where a test tells it to."""

    def __init__(self, network: nn.Module, failure: BaseException | None = None) -> None:
        super().__init__(network)
        self.inside: list[int] = []
        self.failure = failure

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.inside.append(hooks(self))
        loss = super().training_step(batch, batch_idx)
        if self.failure is not None:
            raise self.failure
        return loss


class TestLeftAlone:
    @pytest.mark.parametrize("accumulate", [1, 2], ids=["each_batch", "accumulated"])
    @makers
    def test_the_run_is_bit_identical_without_the_callback(
        self, tmp_path: Path, make: Any, accumulate: int
    ) -> None:
        """With dropout, shuffling with the global random state, and validations."""

        def run(*callbacks: Callback) -> tuple[Module, Recorder, list[Any]]:
            module = Module(mlp(make, dropout=0.5))
            torch.manual_seed(7)
            random.seed(7)
            np.random.seed(7)
            recorder = fit(
                tmp_path,
                module,
                *callbacks,
                train=loader(shuffle=True),
                validation=loader(),
                val_check_interval=1,
                accumulate_grad_batches=accumulate,
            )
            streams = [torch.get_rng_state().tolist(), random.getstate()]
            return module, recorder, [*streams, np.random.get_state()[1].tolist()]

        (alone, other_log, streams), (watched, log, streams_too) = run(), run(BatchNormMonitor(2))
        assert log.steps == [1, 2, 4, 6]
        assert watched.losses == alone.losses
        assert log.others == other_log.others
        assert streams_too == streams
        assert not other_log.rows
        for name, value in alone.state_dict().items():
            assert torch.equal(watched.state_dict()[name], value), name

    @pytest.mark.parametrize("accumulate", [1, 2], ids=["each_batch", "accumulated"])
    def test_hooks_exist_only_while_measuring(self, tmp_path: Path, accumulate: int) -> None:
        module, hooks = Watched(mlp()), Hooks()
        fit(
            tmp_path,
            module,
            BatchNormMonitor(3),
            hooks,
            validation=loader(),
            val_check_interval=1,
            accumulate_grad_batches=accumulate,
        )
        rest = [0] * (accumulate - 1)  # only the first batch of a step is measured
        looked, not_looked = [4, *rest], [0, *rest]
        steps = [looked, not_looked, looked, not_looked, not_looked, looked]
        assert module.inside == [number for step in steps for number in step]
        assert len(hooks.outside) > 6
        assert not any(hooks.outside)

    @pytest.mark.parametrize(
        ("failure", "raised"),
        [(RuntimeError("no"), RuntimeError), (KeyboardInterrupt(), SystemExit)],
        ids=["error", "interruption"],
    )
    def test_hooks_are_gone_after_an_exception(
        self, tmp_path: Path, failure: BaseException, raised: type[BaseException]
    ) -> None:
        module, hooks = Watched(mlp(), failure), Hooks()
        with pytest.raises(raised):
            fit(tmp_path, module, BatchNormMonitor(3), hooks)
        assert module.inside == [4]
        assert hooks.outside == [0]

    def test_other_hooks_stay(self, tmp_path: Path) -> None:
        network, calls = mlp(), []
        network[1].register_forward_hook(lambda *_: calls.append(1))
        fit(tmp_path, Module(network), BatchNormMonitor(2))
        assert len(calls) == 6
        assert len(network[1]._forward_hooks) == 1


class TestLoggers:
    def test_each_gets_all(self, tmp_path: Path) -> None:
        loggers = [Recorder(), Recorder()]
        fit(tmp_path, Module(mlp()), BatchNormMonitor(3), logger=loggers)
        assert loggers[0].rows == loggers[1].rows
        assert loggers[0].steps == [1, 3, 6]

    def test_none_is_allowed(self, tmp_path: Path) -> None:
        module = Module(mlp())
        fit(tmp_path, module, BatchNormMonitor(3), logger=False)
        assert len(module.losses) == 6


class TestRefused:
    @pytest.mark.parametrize("value", [0, -5])
    def test_every_n_steps_is_positive(self, value: int) -> None:
        with pytest.raises(ValueError, match=f"`every_n_steps`.*positive integer, got {value}"):
            BatchNormMonitor(value)

    @pytest.mark.parametrize(
        "make",
        [lambda: nn.Linear(4, 2), lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))],
        ids=["none", "another"],
    )
    def test_no_batch_norm(self, tmp_path: Path, make: Callable[[], nn.Module]) -> None:
        module = Module(make())
        with pytest.raises(ValueError, match="BatchNormMonitor.*Module without one"):
            fit(tmp_path, module, BatchNormMonitor(3))
        assert not module.losses
