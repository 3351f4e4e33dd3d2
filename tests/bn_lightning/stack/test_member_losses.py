"""The losses and accuracies of a stack against those of each member."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.context import Placed
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.network import StackedNetwork

SAMPLES, FEATURES, CLASSES, SIZE = 9, 6, 4, 3


class Smoothed(Classifier):
    """A loss and a prediction of its own."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=0.2)

    def predicted_classes(self, logits: Tensor) -> Tensor:
        return logits.argmin(1)


class Negated(nn.Module):
    """No layer that a stack knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return -self.linear(x)


NETWORKS = {
    "members_second": lambda: nn.Linear(FEATURES, CLASSES),  # (N, K, C)
    "members_first": lambda: nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    ),
    "vmap": Negated,
}


def drawn(own: bool, seed: int = 0) -> tuple[Placed, Placed]:
    generator = torch.Generator().manual_seed(seed)
    lead, dim = ((SIZE,), 0) if own else ((), None)
    x = torch.randn(*lead, SAMPLES, FEATURES, dtype=torch.float64, generator=generator)
    target = torch.randint(0, CLASSES, (*lead, SAMPLES), generator=generator)
    return Placed(x, dim), Placed(target, dim)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("kind", [Classifier, Smoothed])
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("ignored", [0, 2])
def test_they_are_those_of_each_member(name, kind, own, ignored):
    torch.manual_seed(1)
    networks = [NETWORKS[name]().double() for _ in range(SIZE)]
    models = [kind(network, torch.optim.SGD, num_classes=CLASSES) for network in networks]
    x, target = drawn(own)
    target.value[..., :ignored] = -100  # F.cross_entropy leaves these out of its mean
    stack = StackedNetwork(copy.deepcopy(networks))
    losses, accuracies = member_losses(stack, models[0], x, target, measures=True)
    losses.backward(torch.ones_like(losses))
    for k, model in enumerate(models):
        own_x, own_target = (
            part.value if part.dim is None else part.value[k] for part in (x, target)
        )
        logits = model.network(own_x)
        loss = model.loss(logits, own_target)
        loss.backward()
        torch.testing.assert_close(losses[k], loss, rtol=0, atol=1e-14)
        right = (model.predicted_classes(logits) == own_target).float().mean()
        assert accuracies[k] == right
        for parameter, stacked in zip(
            model.network.parameters(), stack.network.parameters(), strict=True
        ):
            torch.testing.assert_close(stacked.grad[k], parameter.grad, rtol=0, atol=1e-14)


def test_logits_of_another_number_of_classes_are_refused():
    network = nn.Linear(FEATURES, CLASSES).double()
    model = Classifier(network, torch.optim.SGD, num_classes=CLASSES + 1)
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        member_losses(StackedNetwork([network, network]), model, *drawn(False), measures=False)


def test_a_member_whose_targets_are_all_ignored_has_no_loss():
    network = nn.Linear(FEATURES, CLASSES).double()
    model = Classifier(network, torch.optim.SGD, num_classes=CLASSES)
    x, target = drawn(own=True)
    target.value[1] = -100
    losses, _ = member_losses(StackedNetwork([network] * SIZE), model, x, target, measures=False)
    assert losses.isnan().tolist() == [False, True, False]
    assert model.loss(network(x.value[1]), target.value[1]).isnan()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_targets_may_be_probabilities(own):
    networks = [nn.Linear(FEATURES, CLASSES).double() for _ in range(SIZE)]
    model = Classifier(networks[0], torch.optim.SGD, num_classes=CLASSES)
    x, classes = drawn(own)
    target = Placed(F.one_hot(classes.value, CLASSES).double() * 0.7 + 0.075, classes.dim)
    losses, _ = member_losses(StackedNetwork(networks), model, x, target, measures=False)
    for k, network in enumerate(networks):
        own_x, own_target = (p.value if p.dim is None else p.value[k] for p in (x, target))
        expected = model.loss(network(own_x), own_target)
        torch.testing.assert_close(losses[k], expected, rtol=0, atol=1e-14)
