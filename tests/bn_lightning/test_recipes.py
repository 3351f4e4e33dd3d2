"""The recipes of docs/recipes.md run as they are printed, and do what they say."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning import seed_everything
from recipes import PAGE, RECIPES, batch, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import Classifier
from bn_lightning.conversion.convert import is_converted

pytestmark = [
    # Lightning 2.6 uses a class that torch 2.13 has deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Lightning's advice for larger data, longer runs and a user at a terminal.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
    pytest.mark.filterwarnings("ignore:GPU available but not used.*"),
]


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def classifier() -> Classifier:
    """The same weights in every call; images (N, 3, 6, 6) to 10 classes."""
    seed_everything(7, verbose=False)
    network = nn.Sequential(block(3), block(4), nn.Sequential(nn.Flatten(), nn.Linear(144, 10)))
    return Classifier(network, lambda p: torch.optim.SGD(p, lr=0.05))


def fitted(title: str, folder: Path, monkeypatch: Any) -> dict[str, Any]:
    """Runs a recipe that fits `model` in an empty folder, and returns its variables."""
    monkeypatch.chdir(folder)
    loader = DataLoader(TensorDataset(*batch(40, 3, 6, 6)), 8)
    variables = run(title, model=classifier(), loader=loader)
    assert not is_converted(variables["model"])
    return variables


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


def test_every_recipe_is_run():
    tests = [Path(__file__), Path(__file__).parents[1] / "zoo" / "test_package_recipes.py"]
    source = "".join(test.read_text(encoding="utf-8") for test in tests)
    assert RECIPES and all(f'"{title}"' in source for title in RECIPES)
    assert len(RECIPES) == PAGE.count("\n## ") == PAGE.count("```python")


def test_averaged_weights_have_the_statistics_of_these_weights(tmp_path, monkeypatch):
    variables = fitted("Average the weights (EMA, SWA)", tmp_path, monkeypatch)
    saved = torch.load("averaged.pt", weights_only=True)
    expected = copy.deepcopy(variables["model"].network).train()
    for module in expected.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x, _ in variables["loader"]:
            expected(x)
    variables["trainer"].save_checkpoint("other.ckpt")
    other = torch.load("other.ckpt", weights_only=True)["state_dict"]
    for name, value in statistics(expected).items():
        torch.testing.assert_close(saved[f"network.{name}"], value)
        assert not torch.allclose(other[f"network.{name}"], value, rtol=1e-3)


def test_frozen_statistics_and_weights_stay(tmp_path, monkeypatch):
    model = fitted("Fine-tune with frozen BatchNorm", tmp_path, monkeypatch)["model"]
    before, after = classifier().state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"network.{i}.{name}" for i in ("0.0", "1.0", "2.1") for name in ("weight", "bias")
    }


def synchronized_gradients(rank_count: int) -> tuple[int, dict[str, Tensor]]:
    """Runs on each rank: the number of graphs, and the gradients of the mean over the ranks."""
    rank = torch.distributed.get_rank()
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = classifier()
    x, y = (values.chunk(rank_count)[rank] for values in batch(8, 3, 6, 6))
    compiled = torch.compile

    def with_backend(network: nn.Module, **options: Any) -> Any:
        return compiled(network, backend=counted, **options)

    with mock.patch("torch.compile", with_backend):
        run("Synchronize under torch.compile", model=model, x=x, y=y)
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    for gradient in gradients.values():
        torch.distributed.all_reduce(gradient)
    return len(graphs), {name: value / rank_count for name, value in gradients.items()}


def whole_batch(model: Classifier) -> dict[str, Tensor]:
    """The gradients of the whole batch of `synchronized_gradients`, in torch alone."""
    x, y = batch(8, 3, 6, 6)
    F.cross_entropy(model.network(x), y).backward()
    return {name: p.grad for name, p in model.network.named_parameters()}


@pytest.mark.slow
def test_synchronized_in_one_graph(ranks):
    expected = whole_batch(classifier())
    for graphs, gradients in ranks(synchronized_gradients, 2):
        assert graphs == 1
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_exported_without_batch_norm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, (x, _) = classifier(), batch(4, 3, 6, 6)
    model.network(x)
    run("Export with folding", model=model, x=x)
    program = torch.export.load("network.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model.network.eval()(x))


def test_gradients_per_sample_are_those_of_each_sample():
    model, (x, y) = classifier(), batch(5, 3, 6, 6)
    model.network(x)
    plain = copy.deepcopy(model.network).eval()
    gradients = run("Gradients per sample", model=model, x=x, y=y)["gradients"]
    for i in range(5):
        plain.zero_grad()
        F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]).backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad)


def sharded_training(steps: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Runs on each rank: the weights after some steps, and the shape of each rank's part."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, y = (values.chunk(count)[rank] for values in batch(8, 3, 6, 6))
    model = classifier()
    run("Shard with FSDP2", model=model)
    optimizer = torch.optim.SGD(model.network.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.network(x), y).backward()
        optimizer.step()
    weights, shapes = {}, {}
    for name, value in model.network.state_dict().items():
        is_sharded = hasattr(value, "full_tensor")
        weights[name] = value.full_tensor() if is_sharded else value
        shapes[name] = tuple((value.to_local() if is_sharded else value).shape)
    return weights, shapes


@pytest.mark.slow
def test_sharded_except_for_batch_norm(ranks):
    expected, (x, y) = classifier().network, batch(8, 3, 6, 6)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    for weights, shapes in ranks(sharded_training, 3):
        torch.testing.assert_close(weights, dict(expected.state_dict()), rtol=1e-5, atol=1e-6)
        assert shapes["0.0.weight"] == (2, 3, 3, 3) and shapes["0.1.weight"] == (4,)
