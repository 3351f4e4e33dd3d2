"""StepProgress: loss, accuracy and speed in a terminal; nothing without one."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from bn_lightning import Classifier
from bn_lightning.callbacks import StepProgress
from bn_lightning.data.batches import TensorBatches

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Rich treat stderr as a terminal 80 columns wide."""
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def fit(folder: Path, progress: StepProgress, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    optimizer = partial(torch.optim.SGD, lr=0.1)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[progress, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_steps": 12, "log_every_n_steps": 1, "val_check_interval": 5, **options},
    )
    trainer.fit(
        Classifier(nn.Linear(4, 3), optimizer, num_classes=3),
        TensorBatches(x, y, 4),
        TensorBatches(x, y, 10),
    )
    return trainer


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the text drawn on stderr, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)


def frames(text: str) -> list[str]:
    return [frame for frame in re.split(r"[\r\n]+", text) if re.search(r"\d+/", frame)]


def number(label: str, frame: str) -> float:
    found = re.search(rf"\b{label}\w* (\d\.\d+)", frame)
    assert found is not None, frame
    return float(found[1])


def test_nothing_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, StepProgress(1))
    out, err = capsys.readouterr()
    assert out == ""
    assert not frames(err)


def test_one_bar_from_the_first_step_to_the_last(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Across epochs (of 5 steps) and validations."""
    trainer = fit(tmp_path, StepProgress(1))
    last = frames(shown(capsys))[-1]
    assert "12/12" in last
    for label, name in (
        ("loss", "train/loss"),
        ("accuracy", "train/accuracy"),
        ("val", "val/accuracy"),
    ):
        # At least three decimals.
        assert number(label, last) == pytest.approx(
            trainer.callback_metrics[name].item(), abs=5.1e-4
        )
    assert re.search(r"\d+ steps/s", last)


def test_the_bar_is_complete_at_the_end(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, StepProgress(5))
    assert "12/12" in frames(shown(capsys))[-1]


@pytest.mark.filterwarnings("ignore:The number of training batches.*")
def test_a_run_that_logs_nothing_shows_its_speed(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, StepProgress(1), log_every_n_steps=100, limit_val_batches=0)
    last = frames(shown(capsys))[-1]
    assert "loss" not in last
    assert "steps/s" in last


def test_a_run_without_end(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 7

    fit(tmp_path, StepProgress(1), Stop(), max_steps=-1, max_epochs=-1)
    assert "7/" in frames(shown(capsys))[-1]


def test_nothing_when_disabled(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning disables the bar on every rank but the first."""
    progress = StepProgress(1)
    progress.disable()
    fit(tmp_path, progress)
    assert not frames(shown(capsys))
    progress.enable()
    fit(tmp_path, progress)
    assert frames(shown(capsys))


def test_an_error_restores_the_terminal(
    tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich hides the cursor while it draws, in its own thread."""

    class Fail(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("in a step")

    with pytest.raises(RuntimeError, match="in a step"):
        fit(tmp_path, StepProgress(1), Fail())
    text = capsys.readouterr().err
    assert "\x1b[?25l" in text, "the cursor was hidden"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "and is shown again"


@pytest.mark.parametrize("value", [0, -1])
def test_steps_between_updates_are_positive(value: int) -> None:
    with pytest.raises(ValueError, match="`refresh_every_n_steps`"):
        StepProgress(value)
