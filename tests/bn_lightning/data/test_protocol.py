"""The contract of data modules: the package's own fulfil it, and others are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import train
from bn_lightning.data import DigitsDataModule, ImageFolderDataModule, TabularDataModule
from bn_lightning.data.protocol import (
    INFO_KEYS,
    DataModuleError,
    DescribedData,
    InfoCheck,
    PredictionData,
    SampledData,
    ShapedData,
    check_data_module,
    data_info,
)

pytestmark = pytest.mark.usefixtures("empty_pictures")

WHOLE = dict.fromkeys(INFO_KEYS, 0)


class Plain(LightningDataModule):
    """A data module with what Lightning needs and nothing else."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4, 32)))

    val_dataloader = train_dataloader


class Described(Plain):
    """A data module with an `info`, which each test sets."""

    info: Any = WHOLE


def test_the_packages_own_data_modules() -> None:
    digits = DigitsDataModule(4, 6, 1 / 12, 0)
    digits.setup("fit")
    for protocol in (DescribedData, ShapedData, PredictionData):
        assert isinstance(digits, protocol)
    assert data_info(digits) == digits.info
    assert issubclass(ImageFolderDataModule, PredictionData)
    assert issubclass(TabularDataModule, PredictionData)
    assert hasattr(TabularDataModule, "sample_inputs") and not isinstance(digits, SampledData)


def test_a_plain_data_module_has_no_info() -> None:
    check_data_module(Plain())
    assert data_info(Plain()) is None


@pytest.mark.parametrize("other", [None, TensorDataset(torch.ones(2))], ids=["none", "data_set"])
def test_no_data_module(other: object) -> None:
    with pytest.raises(DataModuleError, match=f"LightningDataModule, got `{type(other).__name__}`"):
        check_data_module(other)


def test_missing_members_are_named() -> None:
    with pytest.raises(DataModuleError, match="`prediction_inputs`, got `Plain`"):
        check_data_module(Plain(), "prediction_inputs")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("MNIST", "`info`, got 'MNIST' from `Described`"),
        ({}, "`Described` without source, sha256, train, validation, test, classes"),
        ({key: 0 for key in INFO_KEYS if key != "sha256"}, "`Described` without sha256;"),
    ],
    ids=["text", "empty", "one_missing"],
)
def test_info_that_is_incomplete(tmp_path: Path, info: Any, message: str) -> None:
    data = Described()
    data.info = info
    with pytest.raises(DataModuleError, match=message):
        data_info(data)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[InfoCheck()],
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = BoringModel()
    before = model.layer.weight.clone()
    with pytest.raises(DataModuleError, match=message):
        trainer.fit(model, data)
    assert torch.equal(model.layer.weight, before), "nothing was trained"


def test_info_may_have_more_keys() -> None:
    data = Described()
    data.info = {**WHOLE, "mine": 1}
    assert data_info(data)["mine"] == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Mine(DigitsDataModule):\n    info = {'source': 'mine'}", "`Mine` without sha256, "),
        ("class Mine:\n    def __init__(self, **options): pass", "got `Mine`"),
    ],
    ids=["incomplete_info", "no_data_module"],
)
def test_train_refuses_it_in_one_line(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    module = tmp_path / f"data_of_{len(body)}.py"
    module.write_text(f"from bn_lightning.data import DigitsDataModule\n\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    target = f"data._target_={module.stem}.Mine"
    result = command(train.main, "+experiment=mnist_bn", "data=digits", target)
    assert result.code == 1
    assert message in result.err and result.err.count("\n") == 1
    assert not list(Path.cwd().rglob("*.ckpt")), "nothing was trained"
