"""What the claims of the ledger measure, on tiny networks and made-up points."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bn_lightning.claims.claim_training import compose_trials
from bn_lightning.claims.design import BUDGETS, MeasuredPoint, Setting
from bn_lightning.claims.ledger import input_shift
from bn_lightning.claims.ledger.cost import saved_bytes, seconds_of_step, without_batch_norms
from bn_lightning.claims.ledger.covariate_shift import ShiftingNoise, gradient_changes
from bn_lightning.claims.ledger.dropout import classifier_with_dropout, variance_shifts
from bn_lightning.claims.ledger.initialization import LSUVScheme
from bn_lightning.claims.ledger.input_shift import STRENGTHS, shifted
from bn_lightning.claims.ledger.placement import unscaled_batch_norm
from bn_lightning.claims.ledger.rate_transfer import best_rate
from bn_lightning.claims.ledger.regularizer import PopulationClassifier
from bn_lightning.claims.ledger.smoothness import along_gradient
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import growth, largest_trained, steps_to
from bn_lightning.claims.registry import find_claims
from bn_lightning.models.initialization import initialize
from bn_lightning.models.mlp import MLP

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

DIGITS = {
    "_target_": "bn_lightning.data.DigitsDataModule",
    "batch_size": 256,
    "eval_batch_size": 500,
    "validation_fraction": 0.1,
    "seed": 1,
}

UNTRAINED = (
    "depth_residual",
    "rate_transfer",
    "dropout",
    "covariate_shift",
    "regularizer",
    "smoothness",
    "small_batches",
    "cost",
)


def points(**accuracies):
    """Points at the x of their keys, x1 for 1."""
    return [
        MeasuredPoint(Setting((), float(x[1:])), {"accuracy": accuracy})
        for x, accuracy in accuracies.items()
    ]


def networks(name, tmp_path, *typed):
    """Arm -> the networks of a claim's first setting, not trained."""
    (claim,) = find_claims([name])
    found = compose_trials(claim, "quick", [1], ["data=digits", *typed], tmp_path)
    first = next(iter(claim.settings("quick")))
    return claim, {k.arm: MeasuredNetwork(c) for k, c in found.items() if k.setting == first}


def test_a_layer_has_unit_variance_after_lsuv():
    network = MLP(784, [20, 30], 10, "sigmoid", None, "before")
    scheme = LSUVScheme(1e-3, DIGITS, "sigmoid")
    x = scheme.x
    initialize(network, scheme, seed=1)
    outputs = []
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda m, i, o: outputs.append(o)) for m in layers]
    network(x)
    assert len(handles) == 3
    assert [output.std().item() for output in outputs] == pytest.approx([1.0] * 3, rel=1e-4)
    with pytest.raises(ValueError, match="multilayer perceptron"):
        LSUVScheme(0.1, DIGITS, "relu")(torch.empty(4, 3, 3, 3), torch.Generator())


def test_the_arms_of_initialization_differ_in_lsuv(tmp_path):
    _, found = networks("initialization", tmp_path)
    weights = {arm: next(n.model().network.parameters()) for arm, n in found.items()}
    assert torch.equal(weights["none"], weights["batch"])
    ratio = weights["LSUV, without BatchNorm"] / weights["none"]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))  # drawn alike, then scaled
    assert ratio[0, 0] > 10


def test_a_scale_that_is_left_out_stays_1():
    layer = unscaled_batch_norm(3, eps=1e-5, momentum=0.1, backend="auto")
    (layer(torch.randn(8, 3)) * torch.randn(8, 3)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    assert layer.weight.tolist() == [1.0] * 3


def test_scale_invariance_is_measured(tmp_path):
    claim, found = networks("scale_invariance", tmp_path, "trainer.max_steps=3")
    with_, without = claim.measure(found["batch"]), claim.measure(found["none"])
    assert with_["loss change"] < 1e-9 and with_["gradient change"] < 1e-6
    assert without["loss change"] > 0.01
    assert 0 <= with_["accuracy"] <= 1


def test_the_gradient_grows_with_batch_norm(tmp_path):
    """At width 50 and depth 10; the theory is of infinite width."""
    widths = f"model.network.widths={[50] * 10}".replace(" ", "")
    (claim,) = find_claims(["depth_plain"])
    claim = dataclasses.replace(claim, settings=lambda budget: {"10": Setting((widths,), 10.0)})
    composed = compose_trials(claim, "quick", [1], ["data=digits"], tmp_path)
    found = {key.arm: MeasuredNetwork(config) for key, config in composed.items()}
    with_, without = claim.measure(found["batch"]), claim.measure(found["none"])
    assert 1.1 < with_["growth"] < 1.3
    assert 0.9 < without["growth"] < 1.1


@pytest.mark.parametrize("shift", STRENGTHS)
def test_shifts_grow_with_their_strength(shift):
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    x = nn.functional.avg_pool2d(x, 5, 1, 2)  # smooth, as images are
    moved = [float((shifted(x, shift, s) - x).norm()) for s in STRENGTHS[shift]]
    if shift == "rotation":  # by 30 degrees and more, random images have nothing in common
        moved = moved[:3]
    assert moved == sorted(moved) and moved[0] > 0
    assert torch.equal(
        shifted(x, shift, STRENGTHS[shift][1]), shifted(x, shift, STRENGTHS[shift][1])
    )


def test_shifts_are_what_they_are_called():
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(shifted(x, "inversion", 1.0), 1 - x)
    assert torch.allclose(shifted(x, "contrast", 1.0), torch.full_like(x, 0.5))
    assert torch.allclose(shifted(x, "rotation", 90.0).rot90(1, (2, 3)), x, atol=1e-5) or (
        torch.allclose(shifted(x, "rotation", 90.0).rot90(-1, (2, 3)), x, atol=1e-5)
    )
    assert torch.allclose(shifted(x, "blur", 0.01), x, atol=1e-6)
    one = torch.zeros(1, 1, 15, 15)
    one[..., 7, 7] = 1.0
    assert shifted(one, "blur", 1.0).sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="inversion"):
        shifted(x, "snow", 1.0)


def test_adaptation_is_measured_and_changes_nothing(tmp_path):
    claim, found = networks("input_shift", tmp_path)
    measures = {arm: claim.measure(network) for arm, network in found.items()}
    for ending in ("", ", error"):
        without, with_ = (
            [measures[arm][f"shifted{adapted}{ending}"] for adapted in ("", ", adapted")]
            for arm in ("none", "batch")
        )
        assert without[0] == without[1] and with_[0] != with_[1]
    with_ = measures["batch"]
    assert 0 < with_["clean, error"] < 100
    point = MeasuredPoint(claim.settings("quick")["relu"], with_)
    assert claim.numbers([point])["relu, shifted"] == with_["shifted"]
    shown = {measure for c in claim.curves for line in c.along.values() for measure in line}
    # The test set of the digits has 360 images, 36 of a class.
    assert {name for name in shown - with_.keys() if "512" not in name} == {
        "adapted on 64, one class"
    }


def test_inputs_to_adapt_on_are_balanced_or_of_one_class(monkeypatch):
    """Made-up inputs that are their class; the network has no use for them."""
    chosen = {}

    def adapted(network, x, picked, mix=0.0):
        chosen[len(chosen)] = target[picked].tolist()
        return torch.zeros(len(x), 3)

    monkeypatch.setattr(input_shift, "_adapted", adapted)
    target = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    found = input_shift._by_size(network, torch.rand(60, 1, 2, 2), target, order)
    by_name = dict(zip(found, chosen.values(), strict=False))
    balanced = by_name["adapted on 32, balanced"]
    assert sorted(map(balanced.count, range(3))) == [10, 11, 11]
    assert len(set(by_name["adapted on 8, one class"])) == 1
    assert len(set(by_name["adapted on 32, random"])) == 3
    assert by_name["adapted on 32, random"] == target[order[:32]].tolist()


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_claim_can_be_judged(name, tmp_path):
    """Its arms can be built, and its conditions and curves name what is measured."""
    (claim,) = find_claims([name])
    firsts = {next(iter(claim.settings_of("quick", arm).items())) for arm in claim.arms}
    one = dataclasses.replace(claim, settings=lambda budget: dict(firsts))
    configs = compose_trials(one, "quick", [1], ["data=digits"], tmp_path)
    assert {key.arm for key in configs} == claim.arms.keys()
    tested = {"test/accuracy": 0.5, "val/accuracy": 0.5, "val/loss": 1.0}
    shown = set()
    for key, config in configs.items():
        measures = {"accuracy": 0.5, "test accuracy": 50.0} | dict(
            claim.measure(MeasuredNetwork(config, metrics=tested))
        )
        shown |= measures.keys()
        for budget in BUDGETS:
            settings = claim.settings_of(budget, key.arm).values()
            numbers = claim.numbers([MeasuredPoint(s, measures) for s in settings])
            used = [c for c in claim.conditions if key.arm in (c.arm, c.against)]
            assert {c.number for c in used} <= numbers.keys()
    assert {curves.measure for curves in claim.curves} <= shown


def test_a_residual_network_explodes_without_batch_norm(tmp_path):
    """The theory: √2 a block without, and the last branch 1/2; with, √k in k blocks, and 1/k."""
    (claim,) = find_claims(["depth_residual"])
    depth = {"depth 16": Setting(("model.network.depth=16",), 16, "", False)}
    one = dataclasses.replace(claim, settings=lambda budget: depth)
    found = {
        key.arm: claim.measure(MeasuredNetwork(config))
        for key, config in compose_trials(one, "quick", [1], ["data=digits"], tmp_path).items()
    }
    assert found["none"]["growth"] == pytest.approx(2**0.5, rel=0.05)
    assert found["none"]["branch"] == pytest.approx(0.5, abs=0.15)
    assert 1.0 < found["batch"]["growth"] < 1.25
    assert found["batch"]["branch"] < 0.15
    skip_init = found["SkipInit"]
    assert skip_init["growth"] == pytest.approx(1.0) and skip_init["branch"] == 0.0


def test_the_best_rate_lies_between_those_of_the_grid():
    grid = (0.03, 0.1, 0.3, 1.0)
    losses = {rate: math.exp(math.log(rate / 0.2) ** 2) for rate in grid}
    assert best_rate(losses) == pytest.approx(0.2)
    assert best_rate({rate: rate for rate in grid}) == 0.03  # at an end
    assert best_rate({0.03: 2.0, 0.1: 1.0, 0.3: math.inf}) == 0.1
    assert best_rate({0.03: 2.0, 0.1: 1.0, 0.3: 4.0}) < 0.1  # towards the lower loss


@pytest.mark.parametrize("after_all", [False, True], ids=["each_layer", "after_all"])
def test_dropout_before_a_batch_norm_shifts_its_variance(after_all):
    torch.manual_seed(1)
    norm = partial(unscaled_batch_norm, eps=1e-5, momentum=1.0, backend="auto")
    network = MLP(20, [40] * 3, 10, "relu", norm, "before")
    classifier_with_dropout(network, 0.5, after_all, optimizer=torch.optim.SGD)
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == (1 if after_all else 3)
    x = torch.randn(1000, 20)
    network.train()(x)  # with momentum 1 the statistics are those of this batch
    first, *others = variance_shifts(network, x)
    assert first == pytest.approx(1.0)
    for shift in others:
        assert shift == pytest.approx(1.0, abs=0.01) if after_all else shift > 1.3
    with pytest.raises(ValueError, match="`model.network`"):
        classifier_with_dropout(nn.Linear(2, 2), 0.5, after_all, optimizer=torch.optim.SGD)


def test_a_gradient_changes_with_the_layers_below():
    """Of a loss b a x with x = 1: the gradient for b is a, which steps from 2 to 2 - .1 b."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, value in zip(network, (2.0, 3.0), strict=True):
        nn.init.constant_(layer.weight, value)
    model = SimpleNamespace(network=network, loss=lambda y, target: y.mean())
    (change,) = gradient_changes(model, torch.ones(4, 1), torch.zeros(4), 0.1)
    assert change == pytest.approx(0.3 / 2)
    assert [layer.weight.item() for layer in network] == [2.0, 3.0]


def test_the_noise_shifts_in_each_step():
    noise, x = ShiftingNoise(), torch.zeros(1000, 5)
    means = torch.stack([noise(x).mean(0) for _ in range(50)])
    assert means.std(0).min() > 0.15 and means.abs().max() < 0.55  # of U(-.5, .5): .29
    scales = (noise(x + 1) - noise(x)).mean(0)
    assert scales.min() > 0 and scales.max() < 2.3
    assert noise.eval()(x) is x


def test_a_network_that_has_not_learned_has_no_gap():
    (claim,) = find_claims(["regularizer"])
    learned = {"batch 4": 99.0, "batch 32": 100.0, "batch 256": 99.9}
    settings = claim.settings_of("quick", "batch")
    measured = [
        MeasuredPoint(settings[label], {"training accuracy": training, "gap": 9.0})
        for label, training in learned.items()
    ]
    numbers = claim.numbers(measured)
    assert math.isnan(numbers["gap, batches of 4"])
    assert numbers["gap, batches of 32"] == numbers["gap, batches of 256"] == 9.0
    assert numbers["training accuracy, batches of 4"] == 99.0
    assert numbers["gap, parts of 4"] == numbers["gap, parts of 16"] == 9.0  # of the whole batch
    in_parts = claim.settings_of("quick", claim.conditions[3].against)
    measured = [
        MeasuredPoint(s, {"training accuracy": 100.0, "gap": s.x}) for s in in_parts.values()
    ]
    numbers = claim.numbers(measured)
    assert numbers["gap, parts of 4"] == 4.0 and numbers["gap, parts of 16"] == 16.0


def test_statistics_of_all_examples():
    """The loss is that of the first samples, and its gradient that of the whole formula."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    x, target = torch.randn(12, 5).double(), torch.randint(3, (12,))
    model = PopulationClassifier(network, 4, optimizer=torch.optim.SGD, num_classes=3)
    weight = network[0].weight
    (found,) = torch.autograd.grad(model.training_step((x, target), 0), [weight])
    h = network[0](x)
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    loss = nn.functional.cross_entropy(network[2](h)[:4], target[:4])
    (expected,) = torch.autograd.grad(loss, [weight])
    assert torch.allclose(found, expected, rtol=1e-10)
    # Another sample outside the loss changes the statistics, and so the gradient.
    x[11] += 1
    (other,) = torch.autograd.grad(model.training_step((x, target), 0), [weight])
    assert not torch.allclose(found, other, rtol=1e-3)


def test_the_loss_along_the_gradient():
    """Of a loss 3 w² / 2 at w = 2, whose gradient is 3 w."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    model = SimpleNamespace(network=network, loss=lambda y, target: 1.5 * (y**2).mean())
    x = torch.ones(4, 1)
    loss_range, change = along_gradient(model, x, torch.zeros(4), [network.weight])
    assert loss_range == pytest.approx(6.0 * (1 - (1 - 0.03) ** 2), rel=1e-4)
    assert change == pytest.approx(0.03, rel=1e-4)
    assert network.weight.item() == 2.0


def test_what_small_batches_lose():
    (claim,) = find_claims(["small_batches"])
    measured = []
    for setting in claim.settings_of("quick", "batch").values():
        is_small, is_best = setting.panel == "batches of 2", setting.x == 0.03
        test = 90.0 if is_small else 95.0
        measures = {"validation accuracy": float(is_best), "test accuracy": test + is_best}
        measured.append(MeasuredPoint(setting, measures | {"test accuracy, precise": 94.0}))
    numbers = claim.numbers(measured)
    assert numbers["lost, batches of 2"] == 5.0 and numbers["lost, batches of 8"] == 0.0
    assert numbers["precise, batches of 2"] == 3.0
    # Whole batches of 64, and in parts of 2.
    assert numbers["parts"] == 96.0
    *_, frozen, parts = claim.conditions
    for condition, arm in ((frozen, frozen.arm), (parts, parts.against)):
        points_of_arm = [
            MeasuredPoint(s, {"validation accuracy": -s.x, "test accuracy": s.x})
            for s in claim.settings_of("quick", arm).values()
        ]
        assert claim.numbers(points_of_arm)[condition.number] == 0.01


def test_the_memory_for_a_backward():
    """The input of the linear layer, which two layers keep, and the output of the sigmoid."""
    network, x = Sum(), torch.randn(5, 4)
    assert saved_bytes(network, lambda y, target: y.sum(), x, x) == 4 * (5 * 4 + 5 * 3)
    norm = nn.Sequential(network, nn.BatchNorm1d(3))
    plain = without_batch_norms(norm)
    assert isinstance(norm[1], nn.BatchNorm1d) and isinstance(plain[1], nn.Identity)
    assert saved_bytes(plain, lambda y, target: y.sum(), x, x) == 4 * (5 * 4 + 5 * 3)
    assert min(seconds_of_step([norm, plain], lambda y, target: y.sum(), x, x)) > 0


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.one(x) + self.other(x)).sigmoid()


def test_probes():
    assert growth([8.0, 4.0, 2.0]) == pytest.approx(2.0)
    assert math.isinf(growth([1.0, 0.0]))
    assert largest_trained(points(x1=0.95, x3=0.9, x10=0.2)) == 3.0
    assert largest_trained(points(x1=0.5, x3=0.5)) == 0.5
    history = [(50, 0.3), (100, 0.92), (150, 0.8)]
    assert steps_to(0.9, history, 200) == 100.0
    assert steps_to(0.95, history, 200) == 200.0
