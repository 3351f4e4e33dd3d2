"""RunCheckpoints: `best.ckpt`, `last.ckpt` and signals; a stopped run can resume."""

import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from run_process import finish
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from bn_lightning import Classifier
from bn_lightning.callbacks import RunCheckpoints
from bn_lightning.callbacks.training_loop import validation_follows
from bn_lightning.data.batches import TensorBatches
from bn_lightning.runs.interruption import SIGNALS, Interrupted

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data, and its warning when a resumed run reuses a folder.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

signums = pytest.mark.parametrize("signum", SIGNALS, ids=[signum.name for signum in SIGNALS])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Return the signal handlers before the test, and restore them after it."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


class At(Callback):
    """Calls a function once in a hook, at a given step."""

    def __init__(self, hook: str, step: int, action: Any) -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, hook, self._hook)

    def _hook(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.action()


def send(signum: int, hook: str, step: int, times: int = 1) -> At:
    return At(hook, step, lambda: [signal.raise_signal(signum) for _ in range(times)])


class Validations(Callback):
    """Records the steps at which the Trainer validates."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


class Scores(LightningModule):
    """Has given scores, one per validation."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.scores = iter(scores)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("score", next(self.scores, 0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def classifier() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Dropout(0.0), nn.Linear(6, 3)
    )
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    return Classifier(network, optimizer, scheduler, num_classes=3)


def batches(shuffle: bool) -> TensorBatches:
    """Five batches of four."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator)
    y = torch.randint(3, (20,), generator=generator)
    return TensorBatches(x, y, 4, shuffle=shuffle, drop_last=shuffle, seed=1)


def fit(
    folder: Path,
    *callbacks: Callback,
    module: LightningModule | None = None,
    checkpoints: RunCheckpoints | None = None,
    validate: bool = True,
    train: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> LightningModule:
    """Return a Trainer for ten steps, two epochs, with validation after steps 4 and 8."""
    module = module or classifier()
    monitor = "score" if isinstance(module, Scores) else "val/accuracy"
    defaults = {"max_steps": 10, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks, checkpoints or RunCheckpoints(folder / "kept", monitor, "max")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{**defaults, **options},
    )
    trainer.fit(
        module,
        batches(shuffle=True) if train is None else train,
        batches(shuffle=False) if validate else None,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return module


def load(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "kept" / f"{name}.ckpt", weights_only=True)


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["global_step"] == second["global_step"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    assert first["lr_schedulers"] == second["lr_schedulers"]
    for one, other in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for key, value in one["state"].items():
            assert torch.equal(value["momentum_buffer"], other["state"][key]["momentum_buffer"]), (
                key
            )


EPOCHS = {"max_steps": -1, "max_epochs": 2}
ENDS: dict[str, dict[str, Any]] = {
    "within_an_epoch": {"max_steps": 7},
    "end_of_an_epoch": {"max_steps": 10},
    "where_it_is_validated": {"max_steps": 8},
    "before_any_validation": {"max_steps": 3},
    "accumulating": {"max_steps": 5, "accumulate_grad_batches": 2},
    "no_validation": {"max_steps": 10, "validate": False},
    "validation_limited_to_none": {"max_steps": 10, "limit_val_batches": 0},
    "by_epochs": EPOCHS,
    "by_epochs_without_validation": {**EPOCHS, "validate": False},
    "validated_every_second_of_three_epochs": {
        "max_steps": -1,
        "max_epochs": 3,
        "check_val_every_n_epoch": 2,
        "val_check_interval": 1.0,
    },
}


class TestFiles:
    @pytest.mark.parametrize(
        ("mode", "scores", "best"),
        [
            ("max", (0.1, 0.9, 0.5), 4),
            ("max", (0.1, 0.5, 0.9), 6),
            ("min", (0.1, 0.9, 0.5), 2),
        ],
        ids=["max_in_the_middle", "max_at_the_end", "min"],
    )
    def test_best_and_last(
        self, tmp_path: Path, mode: str, scores: tuple[float, ...], best: int
    ) -> None:
        fit(
            tmp_path,
            module=Scores(*scores),
            checkpoints=RunCheckpoints(tmp_path / "kept", "score", mode),
            val_check_interval=2,
            max_steps=6,
        )
        assert {path.name for path in (tmp_path / "kept").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert load(tmp_path, "best")["global_step"] == best
        assert load(tmp_path)["global_step"] == 6

    def test_last_after_every_validation(self, tmp_path: Path) -> None:
        steps: list[int] = []

        class Look(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                if (tmp_path / "kept/last.ckpt").exists():
                    steps.append(load(tmp_path)["global_step"])

        fit(tmp_path, Look())
        assert steps == [4, 4, 4, 4, 8, 8]

    @pytest.mark.parametrize("options", ENDS.values(), ids=ENDS.keys())
    def test_last_at_the_last_step(self, tmp_path: Path, options: dict[str, Any]) -> None:
        module = fit(tmp_path, **options)
        last = load(tmp_path)
        assert last["global_step"] == module.trainer.global_step
        assert torch.equal(last["state_dict"]["network.0.weight"], module.network[0].weight)

    def test_where_the_run_stops_by_itself(self, tmp_path: Path) -> None:
        """For example after a divergence, at any step, with or without validation."""

        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.should_stop = trainer.global_step >= 3

        for validate in (True, False):
            fit(tmp_path / str(validate), Stop(), validate=validate)
            assert load(tmp_path / str(validate))["global_step"] == 3

    def test_the_folder_is_made_with_the_first_checkpoint(self, tmp_path: Path) -> None:
        def fail() -> None:
            assert not (tmp_path / "kept").exists()
            raise RuntimeError("no further")

        with pytest.raises(RuntimeError, match="no further"):
            fit(tmp_path, At("on_train_batch_start", 2, fail))
        assert not (tmp_path / "kept").exists()

    @pytest.mark.filterwarnings("ignore:.*Running in `fast_dev_run`.*")
    def test_fast_dev_run_writes_nothing(self, tmp_path: Path) -> None:
        fit(tmp_path, fast_dev_run=2)
        assert not (tmp_path / "kept").exists()

    def test_a_metric_that_is_not_logged(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="typo"):
            fit(tmp_path, checkpoints=RunCheckpoints(tmp_path / "kept", "typo", "max"))

    @pytest.mark.parametrize("with_dirpath", [True, False])
    def test_files_named_by_another_runs_checkpoint_are_not_deleted(
        self, tmp_path: Path, with_dirpath: bool
    ) -> None:
        """Lightning deletes the file or folder that a better checkpoint replaces."""
        fit(tmp_path, module=Scores(0.1, 0.2), max_steps=8)
        victim = tmp_path / "victim"
        victim.mkdir()
        path = tmp_path / "kept" / "last.ckpt"
        content = load(tmp_path)
        state = content["callbacks"]["RunCheckpoints"]
        named = f"local://{victim}"
        state |= {"best_k_models": {named: torch.tensor(-1.0)}, "kth_best_model_path": named}
        state |= {"kth_value": torch.tensor(-1.0), "best_model_path": named}
        if not with_dirpath:
            del state["dirpath"]
        torch.save(content, path)
        fit(tmp_path, module=Scores(0.5, 0.6), max_steps=16, ckpt_path=path)
        assert victim.is_dir()
        assert load(tmp_path, "best")["global_step"] > 8


class TestSignal:
    @signums
    def test_the_step_is_ended_and_kept(self, tmp_path: Path, signum: int) -> None:
        validations = Validations()
        with pytest.raises(Interrupted) as caught:
            fit(tmp_path, validations, send(signum, "on_before_optimizer_step", 5))
        assert caught.value.signum == signum
        assert load(tmp_path)["global_step"] == 6
        assert validations.steps == [4]

    @signums
    @pytest.mark.parametrize(
        ("hook", "step"),
        [("on_before_optimizer_step", 3), ("on_validation_batch_start", 4)],
        ids=["in_the_step_before", "in_the_validation"],
    )
    def test_the_validation_is_ended_first(
        self, tmp_path: Path, signum: int, hook: str, step: int
    ) -> None:
        validations = Validations()
        with pytest.raises(Interrupted):
            fit(tmp_path, validations, send(signum, hook, step))
        assert validations.steps == [4]
        assert load(tmp_path)["global_step"] == load(tmp_path, "best")["global_step"] == 4

    @signums
    def test_before_the_first_step_it_waits_for_that_step(
        self, tmp_path: Path, signum: int
    ) -> None:
        with pytest.raises(Interrupted):
            fit(tmp_path, send(signum, "on_train_epoch_start", 0))
        assert load(tmp_path)["global_step"] == 1

    @signums
    def test_a_second_one_does_not_wait(self, tmp_path: Path, signum: int) -> None:
        ended = []

        class End(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                ended.append(trainer.global_step)

        with pytest.raises(Interrupted) as caught:
            fit(tmp_path, End(), send(signum, "on_before_optimizer_step", 5, times=2))
        assert caught.value.signum == signum
        assert ended[-1] == 5
        assert load(tmp_path)["global_step"] == 4

    @pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
    def test_after_the_last_step_it_is_not_lost(self, tmp_path: Path, hook: str) -> None:
        with pytest.raises(Interrupted):
            fit(tmp_path, send(signal.SIGTERM, hook, 10))
        assert load(tmp_path)["global_step"] == 10

    def test_the_next_fit_of_the_same_callback_starts_anew(self, tmp_path: Path) -> None:
        checkpoints = RunCheckpoints(tmp_path / "kept", "val/accuracy", "max")
        with pytest.raises(Interrupted):
            fit(
                tmp_path,
                send(signal.SIGINT, "on_before_optimizer_step", 5),
                checkpoints=checkpoints,
            )
        fit(tmp_path, checkpoints=checkpoints, ckpt_path=tmp_path / "kept/last.ckpt")
        assert load(tmp_path)["global_step"] == 10


class TestHandlers:
    def assert_restored(self, handlers: dict[int, Any]) -> None:
        assert {signum: signal.getsignal(signum) for signum in SIGNALS} == handlers

    def test_after_a_fit(self, tmp_path: Path, handlers: dict[int, Any]) -> None:
        fit(tmp_path)
        self.assert_restored(handlers)

    def test_after_an_interruption(self, tmp_path: Path, handlers: dict[int, Any]) -> None:
        with pytest.raises(Interrupted):
            fit(tmp_path, send(signal.SIGINT, "on_before_optimizer_step", 5))
        self.assert_restored(handlers)

    def test_after_an_error(self, tmp_path: Path, handlers: dict[int, Any]) -> None:
        def fail() -> None:
            raise RuntimeError("in a step")

        with pytest.raises(RuntimeError, match="in a step"):
            fit(tmp_path, At("on_train_batch_start", 2, fail))
        self.assert_restored(handlers)

    def test_a_program_with_its_own_handlers(self, tmp_path: Path) -> None:
        asked = []
        checkpoints = RunCheckpoints(tmp_path / "kept", "val/accuracy", "max")
        checkpoints.handles_signals = False
        signal.signal(signal.SIGINT, lambda *_: asked.append("again"))
        stop = send(signal.SIGINT, "on_before_optimizer_step", 5)
        fit(tmp_path, stop, checkpoints=checkpoints)
        assert asked == ["again"]
        assert load(tmp_path)["global_step"] == 10

    def test_another_thread_may_not_set_any(self, tmp_path: Path) -> None:
        thread = threading.Thread(target=fit, args=(tmp_path,))
        thread.start()
        thread.join()
        assert load(tmp_path)["global_step"] == 10


class TestGoingOn:
    @pytest.mark.parametrize("step", range(1, 10))
    def test_bit_for_bit_from_any_step(self, tmp_path: Path, step: int) -> None:
        """Within an epoch, at its end (5), and where a validation follows (4, 8)."""
        whole, part = Validations(), Validations()
        fit(tmp_path / "whole", whole)
        with pytest.raises(Interrupted):
            fit(tmp_path, part, send(signal.SIGTERM, "on_before_optimizer_step", step - 1))
        assert load(tmp_path)["global_step"] == step
        fit(tmp_path, part, ckpt_path=tmp_path / "kept/last.ckpt")
        assert_same_state(load(tmp_path), load(tmp_path / "whole"))
        assert_same_state(load(tmp_path, "best"), load(tmp_path / "whole", "best"))
        assert part.steps == whole.steps

    @pytest.mark.parametrize("batch", range(2))
    def test_bit_for_bit_where_gradients_accumulate(self, tmp_path: Path, batch: int) -> None:
        """A signal in either batch of a step of two waits for the end of the step."""
        options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 6}
        options["val_check_interval"] = 1000
        taken = []

        def second_of_two() -> None:
            taken.append(None)
            if len(taken) == 1 + batch:
                signal.raise_signal(signal.SIGTERM)

        class Send(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 1:
                    second_of_two()

        fit(tmp_path / "whole", **options)
        with pytest.raises(Interrupted):
            fit(tmp_path, Send(), **options)
        assert load(tmp_path)["global_step"] == 2
        fit(tmp_path, ckpt_path=tmp_path / "kept/last.ckpt", **options)
        assert_same_state(load(tmp_path), load(tmp_path / "whole"))

    def test_the_best_so_far_is_remembered(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            fit(
                tmp_path,
                send(signal.SIGINT, "on_before_optimizer_step", 5),
                module=Scores(0.9),
            )
        fit(tmp_path, module=Scores(0.5), ckpt_path=tmp_path / "kept/last.ckpt")
        assert load(tmp_path, "best")["global_step"] == 4
        assert load(tmp_path)["global_step"] == 10

    @pytest.mark.slow
    def test_a_script_in_its_own_process(self, tmp_path: Path) -> None:
        """The script makes its exit code from the exception."""
        script = f"""
import os, signal, sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
warnings.simplefilter("ignore")
from pathlib import Path
from test_run_checkpoints import At, fit
from bn_lightning.runs.interruption import Interrupted
stop = At("on_train_batch_start", 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    fit(Path({str(tmp_path)!r}), stop)
except Interrupted as interrupted:
    sys.exit(interrupted.exit_code)
"""
        (tmp_path / "stopped.py").write_text(script)
        finish(Forked("stopped", (), tmp_path), code=143)
        assert load(tmp_path)["global_step"] == 7


class Endless(IterableDataset):
    """A data set of seven batches without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(7):
            yield torch.randn(4, 4, generator=generator), torch.tensor([0, 1, 2, 0])


BY_EPOCH = {"check_val_every_n_epoch": 1}
BY_TWO = {"check_val_every_n_epoch": 2, "max_steps": 21}
VALIDATED: dict[str, dict[str, Any]] = {
    "every_4_batches": {"val_check_interval": 4},
    "every_3_batches_of_an_epoch": {**BY_EPOCH, "val_check_interval": 3},
    "every_part_of_an_epoch": {**BY_EPOCH, "val_check_interval": 0.4},
    "every_second_epoch": {**BY_TWO, "val_check_interval": 1.0},
    "within_every_second_epoch": {**BY_TWO, "val_check_interval": 2},
    "accumulating": {"val_check_interval": 4, "accumulate_grad_batches": 2},
    "limited_epochs": {**BY_EPOCH, "val_check_interval": 3, "limit_train_batches": 4},
    "limited_to_none": {"limit_val_batches": 0},
    "never": {"validate": False},
    "unknown_length_every_3": {"train": "endless", "val_check_interval": 3},
    "unknown_length": {**BY_EPOCH, "train": "endless", "val_check_interval": 1.0},
    "unknown_length_limited": {
        **BY_EPOCH,
        "train": "endless",
        "val_check_interval": 1.0,
        "limit_train_batches": 3,
    },
}


class TestValidationFollows:
    @pytest.mark.parametrize("options", VALIDATED.values(), ids=VALIDATED.keys())
    def test_it_predicts_what_the_trainer_does(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        predicted: list[bool] = []
        happened: list[bool] = []

        class Listen(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                predicted.append(validation_follows(trainer))
                happened.append(False)

            def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
                happened[-1] = True

        if options.get("train") == "endless":
            options = {**options, "train": DataLoader(Endless(), batch_size=None)}
        fit(tmp_path, Listen(), **options)
        assert predicted == happened
        assert len(predicted) >= 10

    @pytest.mark.parametrize("min_steps", [None, 6])
    def test_when_the_run_is_to_stop(self, tmp_path: Path, min_steps: int | None) -> None:
        predicted: list[bool] = []
        happened: list[bool] = []

        class Listen(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.should_stop = trainer.global_step >= 3
                predicted.append(validation_follows(trainer))
                happened.append(False)

            def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
                happened[-1] = True

        fit(tmp_path, Listen(), min_steps=min_steps)
        assert predicted == happened
        assert len(predicted) == (min_steps or 3)
