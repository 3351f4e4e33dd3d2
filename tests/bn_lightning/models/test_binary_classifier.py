"""One logit for two classes: loss, metrics and predictions beside numpy and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.models.binary_classifier import BinaryClassifier

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning recommends worker processes, which data of this size do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def classifier(network: nn.Module) -> BinaryClassifier:
    return BinaryClassifier(network, partial(torch.optim.SGD, lr=0.1))


def quiet(tmp_path) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize(
    ("scale", "shift"), [(2.0, 0.0), (0.1, 0.5)], ids=["any", "all logits in 0..1"]
)
def test_metrics_of_a_whole_set(tmp_path, scale: float, shift: float) -> None:
    """With batches of different sizes, and with logits that all lie in [0, 1]."""
    random = np.random.default_rng(0)
    target = random.integers(2, size=50)
    logits = np.float32(np.clip(random.normal(target, 1), -4, 4) * scale + shift)
    data = TensorDataset(torch.from_numpy(logits)[:, None], torch.from_numpy(target))
    module = classifier(nn.Identity())
    (found,) = quiet(tmp_path).test(module, DataLoader(data, 16), verbose=False)
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert found["test/loss"] == pytest.approx(log_loss(target, probability), rel=1e-5)
    assert found["test/accuracy"] == pytest.approx(((logits > 0) == target).mean())
    assert found["test/auroc"] == pytest.approx(roc_auc_score(target, logits))


def test_predictions() -> None:
    module = classifier(nn.Identity())
    logits = torch.tensor([[-2.0], [0.0], [3.0]])
    found = module.predict_step([logits], 0)
    p = logits[:, 0].sigmoid()
    torch.testing.assert_close(found, torch.stack([1 - p, p], 1))
    assert module.predicted_classes(logits).tolist() == [0, 0, 1]


def test_chance_metrics_have_the_names_of_all_metrics() -> None:
    module = classifier(nn.Identity())
    chance = module.chance_metrics()
    names = {name for metrics in module.evaluations.values() for name in metrics}
    assert chance.keys() == names
    assert chance["test/loss"] == pytest.approx(0.6931472)
    assert (chance["test/accuracy"], chance["val/auroc"]) == (0.5, 0.5)


def test_a_network_of_two_outputs() -> None:
    with pytest.raises(ValueError, match=r"`network`.*got \(3, 2\)"):
        classifier(nn.Identity()).loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
