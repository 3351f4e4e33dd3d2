"""What a stack would compute otherwise than its members alone is refused before it trains."""

import random
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.context import DropoutStreams, Placed
from bn_lightning.stack.equivalence import check_equivalence
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.same_architecture import NotStackableError

FEATURES, CLASSES, SAMPLES = 6, 4, 10


class Network(nn.Module):
    """With an output layer of zeros: the first loss is that of a guess, whatever is below."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)
        self.output = nn.Linear(5, CLASSES)
        nn.init.zeros_(self.output.weight)

    def forward(self, x):
        return self.output(self.first(x).relu())


class GradientHook(Network):
    def forward(self, x):
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.1 * gradient)
        return self.output(hidden.relu()) + hidden[:, :CLASSES]


class Checkpointed(Network):
    def forward(self, x):
        return self.output(checkpoint(lambda x: self.first(x).relu(), x, use_reentrant=False))


class ReassignedBuffer(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


class PrivateCount(Network):
    _calls = 0

    def forward(self, x):
        self._calls = self._calls + 1
        return super().forward(x)


class History(Network):
    def __init__(self):
        super().__init__()
        self.sizes = deque(maxlen=3)

    def forward(self, x):
        self.sizes.append(len(x))
        return super().forward(x)


class TensorState(Network):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(FEATURES)

    def forward(self, x):
        self.mean = self.mean + x.detach().mean(0)
        return super().forward(x)


class ChangedParameter(Network):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x):
        with torch.no_grad():
            self.scale.mul_(0.9)
        return super().forward(x * self.scale)


class PythonRandom(Network):
    def forward(self, x):
        return super().forward(x) * random.choice([1.0, 2.0])


class NumPyRandom(Network):
    def forward(self, x):
        return super().forward(x) * float(np.random.rand())


class ReadsWeight(Network):
    def forward(self, x):
        return super().forward(x) + self.first.weight.mean()


class EvaluatedOtherwise(Network):
    def forward(self, x):
        if self.training:
            return super().forward(x)
        return super().forward(x) + F.linear(x, self.first.weight).mean()


class OfItsBatch(Network):
    def forward(self, x):
        return super().forward(x) + x.mean()


class BranchOfEvaluation(Network):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training or y.sum() > 0 else -y


class Penalized(Classifier):
    def loss(self, logits, target):
        return super().loss(logits, target) + self.network.output.weight.square().sum()


class ByMode(Classifier):
    def loss(self, logits, target):
        return F.cross_entropy(logits, target, label_smoothing=0.1 if self.training else 0.0)


class ByStep(Classifier):
    def loss(self, logits, target):
        return super().loss(logits, target) * (1 + self.global_step)


class ByNumber(Classifier):
    smoothing = 0.0

    def loss(self, logits, target):
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)


class ByWeights(Classifier):
    def loss(self, logits, target):
        return self.criterion(logits, target)


def stack_of(
    network=Network, kind=Classifier, change=lambda member, k: None, size=2, samples=SAMPLES
):
    """The arguments of `check_equivalence`."""
    models = []
    for k in range(size):
        torch.manual_seed(k)
        models.append(kind(network(), partial(torch.optim.SGD, lr=0.1), num_classes=CLASSES))
        change(models[-1], k)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, FEATURES, generator=generator)
    target = torch.randint(0, CLASSES, (samples,), generator=generator)
    state = torch.get_rng_state()
    stacked = StackedNetwork([model.network for model in models])
    stacked.context.streams = DropoutStreams([state] * size)
    return stacked, models, [state] * size, (Placed(x, None), Placed(target, None))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (GradientHook, "gradient of `first.weight`"),
        (Checkpointed, "cannot run"),
        (ReassignedBuffer, "buffer `mean`"),
        (PrivateCount, "attribute `_calls`"),
        (History, "attribute `sizes`"),
        (TensorState, "attribute `mean`"),
        (ChangedParameter, "parameter `scale`"),
        (PythonRandom, "random numbers of Python"),
        (NumPyRandom, "random numbers of Python or NumPy"),
        (ReadsWeight, "reads the `weight` of a Linear"),
        (EvaluatedOtherwise, "reads the `weight` of a Linear"),
        (OfItsBatch, "other samples"),
        (BranchOfEvaluation, "cannot run"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("size", [1, 2])
def test_networks_that_a_stack_would_change_are_refused(network, named, size):
    with pytest.raises(NotStackableError, match=named):
        check_equivalence(*stack_of(network, size=size))


def test_an_evaluation_that_takes_no_single_sample_is_refused():
    def network():
        norm = nn.BatchNorm1d(5, track_running_stats=False)
        return nn.Sequential(nn.Linear(FEATURES, 5), norm, nn.Linear(5, CLASSES))

    with pytest.raises(NotStackableError, match="other samples"):
        check_equivalence(*stack_of(network, samples=3))


def other_number(member, k):
    member.smoothing = 0.1 * k


def other_weights(member, k):
    member.criterion = nn.CrossEntropyLoss(torch.full((CLASSES,), 1.0 + k))


def same_weights(member, k):
    member.criterion = nn.CrossEntropyLoss(torch.full((CLASSES,), 2.0), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (Penalized, None, "`self.network`"),
        (ByMode, None, "`self.training`"),
        (ByStep, None, "`self.global_step`"),
        (ByNumber, other_number, "`smoothing`"),
        (ByWeights, other_weights, "`criterion`"),
    ],
    ids=["network", "mode", "step", "number", "weights"],
)
def test_losses_of_one_member_alone_are_refused(kind, change, named):
    with pytest.raises(NotStackableError, match=named):
        check_equivalence(*stack_of(kind=kind, change=change or (lambda member, k: None)))


@pytest.mark.parametrize(
    ("kind", "change"),
    [(Classifier, None), (ByNumber, None), (ByWeights, same_weights)],
    ids=["torch", "number", "weights"],
)
def test_what_can_be_stacked_is_left_as_it_was(kind, change):
    network = partial(nn.Sequential, nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    arguments = stack_of(
        lambda: network(nn.ReLU(), nn.Linear(5, CLASSES)), kind, change or (lambda member, k: None)
    )
    stacked, models, states, _ = arguments
    modules = [stacked.network, *(model.network for model in models)]
    before = [{n: t.clone() for n, t in module.state_dict().items()} for module in modules]
    random_state = torch.get_rng_state()
    check_equivalence(*arguments)
    for module, state in zip(modules, before, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert all(parameter.grad is None for parameter in module.parameters())
        assert module.training
    assert type(models[0]) is kind
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(stacked.context.streams.generators[0].get_state(), states[0])


def test_a_loss_that_only_the_stack_loses_is_refused():
    arguments = stack_of(size=1)
    with torch.no_grad():
        arguments[0].network.output.bias.fill_(float("nan"))
    with pytest.raises(NotStackableError, match="loss of nan in the stack"):
        check_equivalence(*arguments)


def test_members_that_diverge_at_once_are_no_difference():
    arguments = stack_of(change=lambda member, k: member.network.output.bias.data.fill_(torch.inf))
    check_equivalence(*arguments)
