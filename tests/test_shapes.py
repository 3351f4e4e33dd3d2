"""The shapes that annotations promise, checked as the functions run."""

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError, jaxtyped

from bn_lightning.callbacks import activation_percentiles as percentiles
from bn_lightning.data.batches import TensorBatches
from bn_lightning.models.classifier import Classifier
from bn_lightning.models.cnn import CNN
from bn_lightning.models.inception import Inception
from bn_lightning.models.mlp import MLP
from bn_lightning.models.resnet import CIFARResNet
from bn_lightning.modules.batch_norm import BatchNorm1d

checked = jaxtyped(typechecker=beartype)
REFUSED = (TypeCheckError, BeartypeCallHintViolation)


def network() -> MLP:
    return MLP(12, [5, 4], 3, "sigmoid", lambda features, dims=0: BatchNorm1d(features), "before")


def test_network():
    forward = checked(MLP.forward)
    assert forward(network(), torch.randn(6, 3, 4)).shape == (6, 3)
    with pytest.raises(REFUSED):
        forward(network(), torch.zeros(6, 12, dtype=torch.int64))


def test_convolutions():
    forward, cnn = checked(CNN.forward), CNN(1, 8, [2], 3, [5], 4, "relu", None, None, 0.0)
    assert forward(cnn, torch.randn(6, 1, 8, 8)).shape == (6, 4)
    with pytest.raises(REFUSED):
        forward(cnn, torch.zeros(6, 64))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Inception, (3, 4, "relu", None, True, 0.0, False)), (CIFARResNet, (8, 3, 4, None, True))],
    ids=["inception", "resnet"],
)
def test_networks_of_images(kind, arguments):
    forward, images = checked(kind.forward), kind(*arguments)
    assert forward(images, torch.randn(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(REFUSED):
        forward(images, torch.randn(3, 32, 32))


def test_classifier():
    module = Classifier(network(), torch.optim.SGD, num_classes=3)
    assert checked(Classifier.forward)(module, torch.randn(6, 12)).shape == (6, 3)
    assert checked(Classifier.predict_step)(module, [torch.randn(6, 12)], 0).shape == (6, 3)


def test_percentiles():
    inputs = checked(percentiles.activation_inputs)(
        network(), "hidden.1.activation", torch.randn(6, 12)
    )
    assert inputs.shape == (6, 4)
    assert checked(percentiles.unit_percentiles)(inputs).shape == (3, 4)
    with pytest.raises(REFUSED):
        checked(percentiles.unit_percentiles)(inputs[0])


def test_batches():
    inputs, targets = torch.randn(7, 12), torch.arange(7)
    batches = checked(TensorBatches.__iter__)(TensorBatches(inputs, targets, 3))
    assert [len(x) for x, _ in batches] == [3, 2, 2]
