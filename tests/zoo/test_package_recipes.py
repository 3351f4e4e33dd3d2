"""The recipes of docs/recipes.md for networks of public packages run as they are printed."""

import pytest
import torch
from networks import load
from recipes import batch, run
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.conversion.convert import is_converted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the packages


def test_timm(tmp_path, monkeypatch):
    load("timm")
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(*batch(4, 3, 32, 32)), 2)
    network = run("timm", loader=loader)["network"]
    assert network.bn1.num_batches_tracked == 2 and not is_converted(network)


def test_transformers(capsys):
    load("transformers")
    network = run("transformers", loader=[batch(2, 3, 32, 32)])["network"]
    assert "52 BatchNorms converted" in capsys.readouterr().out and is_converted(network)


def test_monai(capsys):
    load("monai")
    masks = torch.randint(2, (2, 1, 16, 16), generator=torch.Generator().manual_seed(9))
    network = run("MONAI", loader=[(batch(2, 1, 16, 16)[0], masks)])["network"]
    assert "4 BatchNorms converted" in capsys.readouterr().out and is_converted(network)
