"""ActivationPercentiles: values and steps, and that measuring changes nothing else."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import Classifier
from bn_lightning.callbacks import ActivationPercentiles
from bn_lightning.callbacks.activation_percentiles import (
    activation_inputs,
    first_inputs,
    last_activation,
    probe_steps,
    unit_percentiles,
)
from bn_lightning.data.batches import TensorBatches

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data, and its warning about a missing validation loader.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
]

NAMES = [f"activation/p{p}{suffix}" for p in (15, 50, 85) for suffix in ("", "_median")]


class Recorder(Logger):
    """Records the logged percentiles by step."""

    name = version = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "activation/p50" in metrics:
            self.rows.append((step, metrics))

    @property
    def steps(self) -> list[int | None]:
        return [step for step, _ in self.rows]


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3),
        nn.BatchNorm1d(3),
        nn.Sigmoid(),
        nn.Dropout(dropout),
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.Sigmoid(),
        nn.Linear(5, 2),
    )


def classifier(net: nn.Module | None = None) -> Classifier:
    return Classifier(net or network(), partial(torch.optim.SGD, lr=0.1), num_classes=2)


def tensors(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator) + 1
    return x, torch.randint(2, (samples,), generator=generator)


def loader(samples: int, batch_size: int = 4, seed: int = 0, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*tensors(samples, seed)), batch_size, shuffle=shuffle)


VALIDATION = partial(loader, 11, seed=1)


def fit(
    folder: Path,
    *callbacks: Callback,
    module: LightningModule | None = None,
    train: Any = None,
    validation: Any = "default",
    ckpt_path: Path | None = None,
    **options: Any,
) -> Recorder:
    recorder = Recorder()
    defaults = {
        "max_steps": 6,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )
    trainer.fit(
        module or classifier(),
        train or loader(16),
        VALIDATION() if validation == "default" else validation,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return recorder


class TestUnitPercentiles:
    def test_by_hand(self) -> None:
        # Of the shuffled values 0..20 the 15th percentile is 3, the 85th 17.
        column = torch.arange(21.0)[torch.randperm(21)]
        got = unit_percentiles(torch.stack([column, 10 * column - 5], 1))
        expected = torch.tensor([[3.0, 25.0], [10.0, 95.0], [17.0, 165.0]])
        torch.testing.assert_close(got, expected)

    def test_interpolated_linearly(self) -> None:
        got = unit_percentiles(torch.tensor([[0.0], [1.0]]))
        torch.testing.assert_close(got, torch.tensor([[0.15], [0.5], [0.85]]))

    def test_as_numpy(self) -> None:
        x = torch.randn(37, 5)
        expected = np.percentile(x.double().numpy(), (15, 50, 85), axis=0)
        torch.testing.assert_close(unit_percentiles(x), torch.from_numpy(expected).float())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_read_as_fp32(self, dtype: torch.dtype) -> None:
        x = torch.randn(9, 2).to(dtype)
        got = unit_percentiles(x)
        assert got.dtype == torch.float32
        assert torch.equal(got, unit_percentiles(x.float()))

    def test_a_column_with_a_nan_gives_nan(self) -> None:
        x = torch.randn(9, 2)
        x[3, 1] = torch.nan
        got = unit_percentiles(x)
        assert got[:, 1].isnan().all()
        assert got[:, 0].isfinite().all()


class TestProbeSteps:
    @settings(deadline=None, derandomize=True)
    @given(st.integers(1, 200_000), st.integers(1, 300))
    def test_few_and_within_the_run(self, max_steps: int, points: int) -> None:
        steps = probe_steps(max_steps, points)
        assert 1 <= len(steps) <= points
        assert min(steps) >= 1
        assert max(steps) == max_steps

    @settings(deadline=None, derandomize=True)
    @given(st.integers(100, 200_000), st.integers(10, 80))
    def test_half_evenly_spaced(self, max_steps: int, points: int) -> None:
        """No interval of the run longer than that spacing is without a measurement."""
        steps = sorted(probe_steps(max_steps, points) | {0})
        gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
        assert max(gaps) <= max_steps / (points // 2) + 1

    @settings(deadline=None, derandomize=True)
    @given(st.integers(1000, 200_000), st.integers(10, 80))
    def test_half_by_equal_ratios(self, max_steps: int, points: int) -> None:
        """Every interval with that ratio of steps has a measurement."""
        steps = probe_steps(max_steps, points)
        assert 1 in steps
        ratio = max_steps ** (1 / (points - points // 2 - 1))
        steps = sorted(steps)
        for before, after in zip(steps, steps[1:], strict=False):
            # Rounding moves each end by at most half a step.
            assert (after - 0.5) / (before + 0.5) <= ratio * 1.001

    def test_the_first_steps_are_measured_most_often(self) -> None:
        steps = probe_steps(50_000, 60)
        assert len([step for step in steps if step <= 500]) >= 15
        assert len([step for step in steps if 25_000 < step <= 25_500]) <= 1


class TestActivationInputs:
    def test_what_the_layer_receives(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        x = torch.randn(7, 4)
        assert torch.equal(activation_inputs(net, "1", x), net[0](x).detach())

    def test_with_batch_norm_they_are_of_the_batch_itself(self) -> None:
        """Normalized with the probe's own mean and biased variance, not the running statistics."""
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Sigmoid())
        nn.init.constant_(net[0].running_mean, 100.0)
        x = torch.randn(50, 4) * 3 + 5
        got = activation_inputs(net, "1", x)
        assert net[0].training
        torch.testing.assert_close(got.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(got.std(0, correction=0), torch.ones(4))

    def test_state_random_state_and_gradients_do_not_change(self) -> None:
        net = network(dropout=0.5)
        x = torch.randn(9, 4)
        net(x)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        stream = torch.get_rng_state()
        got = activation_inputs(net, "6", x)
        assert not got.requires_grad
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert torch.equal(torch.get_rng_state(), stream)
        assert not any(module._forward_pre_hooks for module in net.modules())

    def test_also_when_the_network_fails(self) -> None:
        net = network()
        with pytest.raises(RuntimeError):
            activation_inputs(net, "6", torch.randn(9, 3))
        assert not net[6]._forward_pre_hooks

    @pytest.mark.parametrize("space", [(5,), (2, 3), (2, 1, 3)], ids=["1d", "2d", "3d"])
    def test_channels_of_a_convolution_become_columns(self, space: tuple[int, ...]) -> None:
        x = torch.randn(4, 3, *space)
        net = nn.Sequential(nn.Identity(), nn.ReLU())
        got = activation_inputs(net, "1", x)
        assert got.shape == (4 * int(np.prod(space)), 3)
        for channel in range(3):
            assert torch.equal(got[:, channel].sort().values, x[:, channel].flatten().sort().values)


class TestLastActivation:
    def test_of_a_nest(self) -> None:
        net = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Tanh(), nn.Linear(2, 2))
        assert last_activation(net) == "1"
        assert last_activation(classifier()) == "network.6"

    def test_there_must_be_one(self) -> None:
        with pytest.raises(ValueError, match="`layer`.*no activation"):
            last_activation(nn.Linear(2, 2))


class TestFirstInputs:
    @pytest.mark.parametrize("size", [1, 4, 6, 11])
    def test_across_batches(self, size: int) -> None:
        assert torch.equal(first_inputs(VALIDATION(), size), tensors(11, 1)[0][:size])

    def test_all_where_there_are_fewer(self) -> None:
        assert torch.equal(first_inputs(VALIDATION(), 500), tensors(11, 1)[0])

    def test_of_the_first_loader(self) -> None:
        assert torch.equal(first_inputs([VALIDATION(), loader(5)], 3), tensors(11, 1)[0][:3])

    def test_there_must_be_one(self) -> None:
        with pytest.raises(ValueError, match="validation loader"):
            first_inputs(None, 3)

    def test_no_more_is_read_than_needed(self) -> None:
        def endless() -> Iterator[tuple[Tensor, None]]:
            for i in range(100):
                assert i < 2, "a batch that is not needed"
                yield torch.zeros(4, 1), None

        assert len(first_inputs(endless(), 8)) == 8


class TestArguments:
    @pytest.mark.parametrize("name", ["probe_size", "points"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_positive(self, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"`{name}`.*integer from 1 .* got {value}"):
            ActivationPercentiles(**{"probe_size": 5, "points": 5, name: value})


class TestRun:
    def test_names_and_steps(self, tmp_path: Path) -> None:
        recorder = fit(tmp_path, ActivationPercentiles(5, 4), max_steps=20)
        assert recorder.steps == sorted({0} | probe_steps(20, 4))
        assert all(sorted(row) == sorted(NAMES) for _, row in recorder.rows)

    def test_steps_of_a_run_that_is_as_long_as_its_epochs(self, tmp_path: Path) -> None:
        recorder = fit(tmp_path, ActivationPercentiles(5, 4), max_steps=-1, max_epochs=3)
        assert recorder.steps == sorted({0} | probe_steps(12, 4))

    def test_each_step_once_where_gradients_accumulate(self, tmp_path: Path) -> None:
        recorder = fit(tmp_path, ActivationPercentiles(5, 8), accumulate_grad_batches=2)
        assert recorder.steps == sorted({0} | probe_steps(6, 8))

    def test_a_run_without_end(self, tmp_path: Path) -> None:
        """With `max_epochs=-1` a callback stops the run."""

        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.should_stop = trainer.global_step >= 3

        recorder = fit(tmp_path, ActivationPercentiles(5, 8), Stop(), max_steps=-1, max_epochs=-1)
        assert recorder.steps[0] == 0

    def test_values_before_the_first_step_by_hand(self, tmp_path: Path) -> None:
        module = classifier()
        x = tensors(11, 1)[0][:7]
        before = classifier().network.train()
        received = before[:6](x).detach().double().numpy()
        expected = np.percentile(received, (15, 50, 85), axis=0)
        recorder = fit(tmp_path, ActivationPercentiles(7, 4, unit=2), module=module)
        step, row = recorder.rows[0]
        assert step == 0
        for name, values in zip((15, 50, 85), expected, strict=True):
            assert row[f"activation/p{name}"] == pytest.approx(values[2], abs=1e-5)
            assert row[f"activation/p{name}_median"] == pytest.approx(np.median(values), abs=1e-5)

    def test_the_median_over_an_even_number_of_units(self, tmp_path: Path) -> None:
        """For four units, the mean of the middle two."""
        net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
        received = net[0](tensors(11, 1)[0]).detach().double().numpy()
        expected = np.median(np.percentile(received, 50, axis=0))
        recorder = fit(tmp_path, ActivationPercentiles(11, 1), module=classifier(net))
        assert recorder.rows[0][1]["activation/p50_median"] == pytest.approx(expected, abs=1e-5)

    def test_a_named_layer(self, tmp_path: Path) -> None:
        x = tensors(11, 1)[0]
        received = network()[:2](x).detach().double().numpy()
        callback = ActivationPercentiles(11, 2, layer="network.2")
        recorder = fit(tmp_path, callback)
        expected = np.percentile(received[:, 0], 50)
        assert recorder.rows[0][1]["activation/p50"] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "shuffled"])
    def test_the_run_is_bit_identical_without_the_callback(
        self, tmp_path: Path, shuffle: bool
    ) -> None:
        """With dropout, and torch's DataLoader, which uses the global random state."""
        states = []
        for callbacks in ((), (ActivationPercentiles(5, 10),)):
            module = classifier(network(dropout=0.5))
            torch.manual_seed(7)
            validation = VALIDATION(shuffle=shuffle)
            fit(
                tmp_path,
                *callbacks,
                module=module,
                train=loader(16, shuffle=True),
                validation=validation,
            )
            states.append(module.state_dict())
        for name, value in states[0].items():
            assert torch.equal(states[1][name], value), name

    def test_a_module_under_two_names_sees_no_further_batches(self, tmp_path: Path) -> None:
        class TwoNames(Classifier):
            def __init__(self) -> None:
                super().__init__(network(), partial(torch.optim.SGD, lr=0.1), num_classes=2)
                self.alias = self.network

        module = TwoNames()
        recorder = fit(tmp_path, ActivationPercentiles(5, 10), module=module)
        assert len(recorder.rows) > 3
        for i in (1, 5):
            assert module.network[i].num_batches_tracked == 6, "more than the steps of the run"

    def test_a_validation_loader_with_a_generator_of_its_own(self, tmp_path: Path) -> None:
        def order(*callbacks: Callback) -> list[Tensor]:
            generator = torch.Generator().manual_seed(3)
            data = DataLoader(range(9), batch_size=9, shuffle=True, generator=generator)
            validation = DataLoader(
                TensorDataset(*tensors(9)), 9, shuffle=True, generator=generator
            )
            fit(tmp_path, *callbacks, validation=validation)
            return next(iter(data)).tolist()

        assert order() == order(ActivationPercentiles(5, 10))

    def test_a_compiled_network(self, tmp_path: Path) -> None:
        """Compiled graphs do not call hooks that are added later."""
        rows = []
        for is_compiled in (False, True):
            module = classifier()
            if is_compiled:
                module.network.compile(backend="eager")
            rows.append(fit(tmp_path, ActivationPercentiles(5, 10), module=module).rows)
        assert rows[0] == rows[1]

    def test_the_same_probes_and_values_after_resuming(self, tmp_path: Path) -> None:
        class Save(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 7:
                    trainer.save_checkpoint(tmp_path / "a.ckpt")

        def run(*callbacks: Callback, **options: Any) -> Recorder:
            return fit(
                tmp_path,
                ActivationPercentiles(5, 10),
                *callbacks,
                train=TensorBatches(*tensors(16), 4, shuffle=True, drop_last=True),
                max_steps=16,
                **options,
            )

        whole = run(Save())
        resumed = run(ckpt_path=tmp_path / "a.ckpt")
        assert resumed.rows == [(step, row) for step, row in whole.rows if step > 7]
        assert len(resumed.rows) > 3

    def test_no_validation_loader(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="validation loader.*ActivationPercentiles"):
            fit(tmp_path, ActivationPercentiles(5, 10), validation=None)

    def test_any_module_with_a_forward(self, tmp_path: Path) -> None:
        class Own(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.act, self.second = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.act(self.first(x)))

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                pass

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        assert fit(tmp_path, ActivationPercentiles(5, 10), module=Own()).steps[0] == 0
