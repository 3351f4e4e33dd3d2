"""The loss along the gradient: beside a quadratic computed by hand, and of a run's checkpoint."""

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm1d, landscape, train
from bn_lightning.landscape import describe, landscape_csv, losses_along_gradient, step_sizes

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")


def test_step_sizes() -> None:
    assert step_sizes(0.01, 100, 5) == pytest.approx([0, 0.01, 0.1, 1, 10, 100])


@pytest.mark.parametrize(
    ("smallest", "largest", "points", "words"),
    [
        (0, 1, 3, "0 < smallest"),
        (2, 1, 3, "0 < smallest"),
        (1, 2, 1, "`points`"),
        (1, 2, 10**4 + 1, "to 10,000"),
    ],
    ids=["zero", "descending", "one point", "too many"],
)
def test_step_sizes_that_are_none(smallest, largest, points, words) -> None:
    with pytest.raises(ValueError, match=words):
        step_sizes(smallest, largest, points)


def test_losses_are_those_after_a_step_of_sgd() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3))
    network.eval()
    x, target = torch.randn(20, 4), torch.randint(3, (20,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = losses_along_gradient(network, x, target, [0, 0.5, 4])
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    for step, loss in zip([0, 0.5, 4], found, strict=True):
        network.load_state_dict(before)
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=step)
        optimizer.zero_grad()
        F.cross_entropy(network(x), target).backward()
        optimizer.step()
        assert F.cross_entropy(network(x), target).item() == pytest.approx(loss, rel=1e-5)
    assert found[1] < found[0]


class TwoNames(nn.Module):
    """One hidden layer under two names, dropout, an output whose bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(4, 8), BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.alias = self.hidden
        self.output = nn.Linear(8, 3)
        self.output.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.alias(x))


def everything(network: nn.Module) -> dict[str, object]:
    tensors = network.state_dict(keep_vars=True).items()
    modes = {name: module.training for name, module in network.named_modules()}
    return {name: (id(value), value.tolist()) for name, value in tensors} | modes


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_a_network_that_shares_modules_does_not_change(fails) -> None:
    torch.manual_seed(0)
    network = TwoNames()
    network.output.eval()
    x, target = torch.randn(20, 4), torch.randint(3, (20,))
    before, stream = everything(network), torch.get_rng_state()
    calls = []

    def criterion(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        if fails and len(calls) == 3:
            raise RuntimeError("in the middle")
        return F.cross_entropy(logits, target)

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            losses_along_gradient(network, x, target, [0, 1, 0], criterion)
    else:
        first, moved, again = losses_along_gradient(network, x, target, [0, 1, 0], criterion)
        assert first == again != moved  # also draws the same dropout
    assert everything(network) == before
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_network_that_overflows_is_kept() -> None:
    network = nn.Linear(2, 2)
    (loss,) = losses_along_gradient(
        network, torch.full((3, 2), 1e30), torch.tensor([0, 1, 0]), [1e30]
    )
    assert not loss < 1e20
    assert landscape_csv([0.0, 1.0], [[2.0, float("inf")]]).splitlines()[-1] == "0,1,inf,inf"


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_checkpoint_of_either_arm(command, norm) -> None:
    run = command(
        train.main,
        "+experiment=mnist_bn",
        "data=digits",
        f"norm={norm}",
        "trainer.max_steps=20",
        "trainer.val_check_interval=20",
        "extras.figures=false",
    )
    assert run.code == 0, run.err
    checkpoint = run.directory / "checkpoints/last.ckpt"
    before = checkpoint.read_bytes()
    result = command(landscape.main, f"ckpt_path={checkpoint}", "batches=2", "points=5")
    assert result.code == 0, result.err
    assert checkpoint.read_bytes() == before
    assert "relative loss, median of batches: least " in result.out
    with open(result.directory / "landscape.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6
    assert [row["batch"] for row in rows] == ["0"] * 6 + ["1"] * 6
    assert [float(row["relative_loss"]) for row in rows if row["step_size"] == "0"] == [1, 1]
    # A small step along the gradient helps.
    assert all(float(row["relative_loss"]) < 1 for row in rows if row["step_size"] == "0.001")
    names = {path.name for path in (result.directory / "figures").iterdir()}
    assert names == {"landscape.png", "landscape.svg"}


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([[0.9, 0.5, 0.8, 1.2]], "least 0.5 at 0.1, above 1 from 10 on"),
        ([[1.1, 0.5, 2.0, 0.9]], "least 0.5 at 0.1, above 1 from 1 on"),
        ([[0.9, 0.8, 0.7, 0.6]], "least 0.6 at 10"),
        ([[0.9, 0.5, math.nan, 1], [0.9, 0.5, math.inf, 1]], "least 0.5 at 0.1, above 1 from 1 on"),
        ([[0.9, 0.4, 0.5, 0.9], [0.9, 0.6, 0.6, 9]], "least 0.5 at 0.1, above 1 from 10 on"),
    ],
)
def test_what_the_picture_shows_in_words(batches, words) -> None:
    found = describe([0.01, 0.1, 1.0, 10.0], batches)
    assert found == f"relative loss, median of batches: {words}"


def test_errors(command) -> None:
    Path("text").write_text("no checkpoint")
    for arguments, words in (
        (["ckpt_path=nowhere"], "no such file"),
        (["ckpt_path=text"], "is none or is damaged"),
        (["ckpt_path=text", "batches=0"], "`batches`"),
        (["ckpt_path=text", "smallest=-1"], "0 < smallest"),
    ):
        result = command(landscape.main, *arguments)
        assert result.code == 1 and words in result.err, (arguments, result.err)
