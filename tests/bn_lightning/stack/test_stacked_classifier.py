"""`StackedClassifier` in a Trainer, against its members in Trainers of their own."""

from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR

from bn_lightning.data.batches import TensorBatches
from bn_lightning.models.classifier import Classifier
from bn_lightning.models.mlp import MLP
from bn_lightning.models.normalization import batch_norm
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.stacked_classifier import StackedClassifier, member_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

BATCH = partial(batch_norm, eps=1e-5, momentum=0.1, backend="auto")
RATES = [0.1, 0.01, 0.3]
# Of the largest value of a tensor: rounding of a different order of summation.
TOLERANCE = 1e-12


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (count,), generator=generator)
    return TensorBatches(x, target, 10, shuffle=seed == 0, seed=seed)


def classifier(k, optimizer, scheduler=None, norm=BATCH, dropout=0.0):
    torch.manual_seed(k)
    # A BatchNorm after the activation, so that no parameter's gradient is rounding alone.
    network: nn.Module = MLP(12, [7, 5], 4, "sigmoid", norm, "after")
    if dropout:
        network = nn.Sequential(nn.Linear(12, 7), nn.Dropout(dropout), nn.Linear(7, 4))
    # Lightning loads a checkpoint before it makes the weights double.
    network.double()
    return Classifier(network, partial(optimizer, lr=RATES[k]), scheduler, num_classes=4)


def trainer(epochs, **options):
    usual = {"precision": "64-true", "log_every_n_steps": 2}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(usual | options),
    )


def fitted(model, epochs=2, ckpt_path=None, **options):
    """The Trainer, after training 5 steps an epoch with two validation sets."""
    made = trainer(epochs, **options)
    loaders = batches(50, 0), [batches(30, 1), batches(20, 2)]
    made.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return made


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = TOLERANCE * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit, equal_nan=True)


OPTIMIZERS = {
    "sgd": (partial(classifier, optimizer=torch.optim.SGD), {}),
    "momentum_scheduled": (
        partial(
            classifier,
            optimizer=partial(torch.optim.SGD, momentum=0.9),
            scheduler=partial(StepLR, step_size=3, gamma=0.5),
        ),
        {},
    ),
    "adam_clipped": (
        partial(classifier, optimizer=torch.optim.Adam),
        {"gradient_clip_val": 0.1},
    ),
    "sgd_not_clipped": (partial(classifier, optimizer=torch.optim.SGD), {"gradient_clip_val": -1}),
    "adagrad_accumulated": (
        partial(classifier, optimizer=torch.optim.Adagrad),
        {"accumulate_grad_batches": 2},
    ),
}


@pytest.mark.parametrize(("made", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_members_equal_their_own_runs(made, options):
    stack = StackedClassifier([made(k) for k in range(3)])
    logged = fitted(stack, **options).callback_metrics
    for k in range(3):
        alone = made(k)
        expected = fitted(alone, **options).callback_metrics
        assert_same(stack.member(k).state_dict(), alone.state_dict())
        own = {name: value for name, value in logged.items() if name.startswith(f"member_{k}/")}
        assert len(own) == 8
        for name, value in own.items():
            wanted = expected[name.removeprefix(f"member_{k}/")]
            torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-6, atol=1e-6)


def test_dropout_of_each_seed():
    made = partial(classifier, optimizer=torch.optim.SGD, dropout=0.5)
    stack = StackedClassifier([made(k) for k in range(2)], seeds=[5, 6])
    fitted(stack)
    for k, seed in enumerate((5, 6)):
        alone = made(k)
        torch.manual_seed(seed)
        fitted(alone)
        assert_same(stack.member(k).state_dict(), alone.state_dict())


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A checkpoint of two members after two of four epochs, and what makes a member."""
    made, _ = OPTIMIZERS["momentum_scheduled"]
    path = tmp_path_factory.mktemp("half") / "stack.ckpt"
    fitted(StackedClassifier([made(k) for k in range(2)])).save_checkpoint(path)
    return made, path


def test_a_checkpoint_of_the_stack_goes_on(half_way):
    made, path = half_way
    resumed, whole = (StackedClassifier([made(k) for k in range(2)]) for _ in range(2))
    last = fitted(resumed, epochs=4, ckpt_path=path)
    assert last.global_step == fitted(whole, epochs=4).global_step == 20
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_member_goes_on_alone(half_way, tmp_path):
    made, path = half_way
    checkpoint = torch.load(path, weights_only=True)
    torch.save(member_checkpoint(checkpoint, 1), tmp_path / "member.ckpt")
    resumed, whole = made(1), made(1)
    last = fitted(resumed, epochs=4, ckpt_path=tmp_path / "member.ckpt")
    assert last.global_step == fitted(whole, epochs=4).global_step == 20
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_member_that_diverges_reaches_no_other():
    made = partial(classifier, optimizer=torch.optim.SGD, norm=None)
    wild = made(1)
    with torch.no_grad():
        next(wild.network.parameters()).fill_(float("nan"))
    stack = StackedClassifier([made(0), wild])
    logged = fitted(stack).callback_metrics
    alone = made(0)
    fitted(alone)
    assert_same(stack.member(0).state_dict(), alone.state_dict())
    assert torch.isnan(logged["member_1/val/loss"]) and torch.isfinite(logged["member_0/val/loss"])


def test_mixed_precision_of_the_trainer():
    """Parameters stay in fp32, and the first losses differ as bf16 rounds."""
    data = batches(50, 0)
    loader = TensorBatches(data.inputs.float(), data.targets, 10)
    fitted_losses = []
    for precision in ("bf16-mixed", "32-true"):
        stack = StackedClassifier([classifier(k, torch.optim.SGD) for k in range(2)])
        made = trainer(1, max_steps=1, precision=precision, log_every_n_steps=1)
        made.fit(stack.float(), loader, loader)
        assert {p.dtype for p in stack.parameters()} == {torch.float32}
        fitted_losses.append(
            torch.stack([made.callback_metrics[f"member_{k}/train/loss"] for k in range(2)])
        )
    mixed, full = fitted_losses
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, rtol=2e-2, atol=0)


def test_the_test_of_each_member():
    made = partial(classifier, optimizer=torch.optim.SGD)
    stack = StackedClassifier([made(0).float(), made(1).float()])  # the Trainer makes it double
    (found,) = trainer(1).test(stack, batches(30, 1), verbose=False)
    (expected,) = trainer(1).test(made(1).float(), batches(30, 1), verbose=False)
    assert found["member_1/test/loss"] == pytest.approx(expected["test/loss"], rel=1e-12)
    assert {f"member_{k}/test/accuracy" for k in (0, 1)} <= found.keys()
    # A Trainer evaluates in inference mode, of which nothing stays.
    assert not any(parameter.is_inference() for parameter in stack.member(1).parameters())


class OwnStep(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class OwnTensor(Classifier):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("class_weights", torch.ones(4))


class Noisy(MLP):
    def forward(self, x):
        return super().forward(x) + torch.rand(1, device=x.device)


def test_what_cannot_be_stacked_is_refused():
    network = partial(MLP, 12, [7], 4, "relu", None, "before")
    own = OwnStep(network(), torch.optim.SGD, num_classes=4)
    with pytest.raises(NotStackableError, match="training_step"):
        StackedClassifier([own])
    weighted = OwnTensor(network(), torch.optim.SGD, num_classes=4)
    with pytest.raises(NotStackableError, match="class_weights"):
        StackedClassifier([weighted])
    unlike = Classifier(nn.Linear(12, 4), torch.optim.SGD, num_classes=4)
    with pytest.raises(NotStackableError, match="differ"):
        StackedClassifier([classifier(0, torch.optim.SGD), unlike])
    with pytest.raises(NotStackableError, match="RMSprop"):
        fitted(StackedClassifier([classifier(0, torch.optim.RMSprop)]))
    noisy = Classifier(Noisy(12, [7], 4, "relu", None, "before"), torch.optim.SGD, num_classes=4)
    with pytest.raises(NotStackableError, match="vmap"):
        fitted(StackedClassifier([noisy]))


@pytest.mark.parametrize(
    ("count", "seeds", "named"), [(0, None, "members"), (1, [1, 2], "seeds")], ids=["none", "seeds"]
)
def test_arguments_are_checked(count, seeds, named):
    members = [classifier(k, torch.optim.SGD) for k in range(count)]
    with pytest.raises(ValueError, match=f"expected `{named}`"):
        StackedClassifier(members, seeds)


class ShortBatchLayer(nn.Module):
    """Has a layer that only a short batch passes, and a mean that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.first, self.between = nn.Linear(12, 7), nn.Linear(7, 7)
        self.output = nn.Linear(7, 4)
        self.register_buffer("mean", torch.zeros(12), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        x = self.first(x - self.mean).tanh()
        return self.output(self.between(x) if self.training and len(x) < 10 else x)


def in_place():
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(inplace=True), nn.Linear(7, 4))


def twice():
    layer = nn.Linear(12, 12)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.LayerNorm(12), nn.Linear(12, 4))


def transposed():
    network = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4))
    network[0].weight = nn.Parameter(torch.randn(12, 7).t())
    return network


def with_dropout(k):
    """In one member the first dropout draws nothing."""
    dropout = nn.Dropout([0.0, 0.3, 1.0][k])
    return nn.Sequential(dropout, nn.Linear(12, 7), nn.Dropout(0.5), nn.Linear(7, 4))


@pytest.mark.parametrize("seeds", [None, [1, 1, 2]], ids=["one stream", "streams"])
@pytest.mark.parametrize(
    "make", [in_place, twice, transposed, with_dropout, ShortBatchLayer], ids=lambda f: f.__name__
)
def test_unusual_networks_equal_those_alone(make, seeds):
    if make is with_dropout and seeds is None:
        seeds = [1, 1, 1]

    def member(k):
        torch.manual_seed(k)
        network = (make(k) if make is with_dropout else make()).double()
        optimizer = torch.optim.Adam if make is ShortBatchLayer else torch.optim.SGD
        return Classifier(network, partial(optimizer, lr=0.1), num_classes=4)

    def fit(model):
        torch.manual_seed(1)
        loaders = batches(46, 0), [batches(30, 1)]
        trainer(2).fit(model, *loaders)

    stack = StackedClassifier([member(k) for k in range(3)], seeds)
    fit(stack)
    for k in range(3):
        alone = member(k)
        if seeds is not None:
            torch.manual_seed(seeds[k])
        trainer(2).fit(alone, batches(46, 0), [batches(30, 1)])
        assert_same(
            dict(stack.member(k).network.named_buffers()), dict(alone.network.named_buffers())
        )
        assert_same(stack.member(k).network.state_dict(), alone.network.state_dict())


def test_a_loss_of_the_instance_is_the_members_own():
    def member():
        model = classifier(0, torch.optim.SGD)
        model.loss = partial(nn.functional.cross_entropy, label_smoothing=0.3)
        return model

    stack, alone = StackedClassifier([member()]), member()
    for model in (stack, alone):
        fitted(model)
    assert_same(stack.member(0).network.state_dict(), alone.network.state_dict())


def test_an_optimizer_of_some_parameters_is_refused():
    network = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))
    weights = lambda ps, lr: torch.optim.SGD([p for p in ps if p.dim() > 1], lr)  # noqa: E731
    model = Classifier(network.double(), partial(weights, lr=0.1), num_classes=4)
    with pytest.raises(NotStackableError, match="does not take all parameters"):
        fitted(StackedClassifier([model]))
