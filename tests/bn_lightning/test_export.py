"""`python -m bn_lightning.export`: programs whose logits are the network's."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm1d, export, train
from bn_lightning.cli.install_hint import install_command
from bn_lightning.export import ExportError, largest_difference, read_program
from bn_lightning.runs.checkpoint import TrainedCheckpoint

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

SHORT = ("trainer.max_steps=20", "trainer.val_check_interval=20", "extras.figures=false")


def trained(command, *arguments: str) -> Path:
    run = command(train.main, *arguments, *SHORT)
    assert run.code == 0, run.err
    return run.directory / "checkpoints" / "last.ckpt"


def network_of(checkpoint: Path) -> nn.Module:
    return TrainedCheckpoint.read(str(checkpoint), []).build_model().network.eval()


def test_a_folded_program_has_the_logits_of_the_network(command):
    checkpoint = trained(command, "+experiment=mnist_bn", "data=digits")
    before = checkpoint.read_bytes()
    network = network_of(checkpoint)
    # Inputs like those of training, and another size of batch than was traced or checked.
    x = torch.rand(37, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for form, tolerance in (("torch", 1e-5), ("onnx", 1e-4)):
        result = command(export.main, f"ckpt_path={checkpoint}", f"format={form}")
        assert result.code == 0, result.err
        assert "3 BatchNorms folded" in result.out
        path = result.directory
        files = {file.name for file in path.parent.iterdir() if file.name[0] != "."}
        assert files == {path.name, "export.log"}
        with torch.no_grad():
            found, expected = read_program(path)(x), network(x)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        if form == "torch":
            targets = {str(node.target) for node in torch.export.load(path).graph.nodes}
            assert not [name for name in targets if "norm" in name or "bn_lightning" in name]
    assert checkpoint.read_bytes() == before

    for typed in ("5", "[0,3]", "[3,x]"):
        result = command(export.main, f"ckpt_path={checkpoint}", f"input_shape={typed}")
        assert result.code == 1 and "`input_shape` to be a list of sizes" in result.err
    # A network that takes other inputs than it is said to.
    result = command(export.main, f"ckpt_path={checkpoint}", "input_shape=[3]")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "for inputs (2, 3), got" in result.err and "`input_shape`" in result.err
    result = command(export.main, f"ckpt_path={checkpoint}", "input_shape=[3]", "fold=false")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "expected a network that torch.export takes, for inputs (2, 3), got" in result.err


def test_a_table_and_what_cannot_be_exported(command, monkeypatch):
    """The rows that are compared lie where the table's do, far from zero."""
    checkpoint = trained(command, "+experiment=placement", "data.samples=400")
    arguments = (f"ckpt_path={checkpoint}", "output=here/placed.pt2")
    result = command(export.main, *arguments, "fold=false")
    assert result.code == 0, result.err
    path = Path("here/placed.pt2")
    assert result.directory == path and "folded" not in result.out
    graph = torch.export.load(path).graph
    assert "aten.batch_norm.default" in {str(node.target) for node in graph.nodes}
    x = torch.tensor([[7.0, 100.0], [5.0, 80.0], [9.0, 120.0]])
    with torch.no_grad():
        torch.testing.assert_close(read_program(path)(x), network_of(checkpoint)(x))

    exported = path.read_bytes()
    for given, words in (
        (["tolerance.torch=1e-12"], "expected logits within `tolerance.torch`=1e-12"),
        (["tolerance.torch=0"], "`tolerance.torch` to be a positive number, got 0"),
        (["format=jit"], "`format` to be torch or onnx, got 'jit'"),
        (["output=here"], "got the folder here"),
        (["ckpt_path=nowhere"], "`ckpt_path` to be a checkpoint file"),
    ):
        result = command(export.main, *arguments, *given)
        assert result.code == 1
        assert result.err.count("\n") == 1 and words in result.err, result.err
        # What was there is as it was, and nothing is beside it.
        assert list(Path("here").iterdir()) == [path] and path.read_bytes() == exported

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = command(export.main, *arguments, "format=onnx")
    assert result.code == 1
    assert f"got no onnxruntime; {install_command('export')}" in result.err


class TestLargestDifference:
    def test_it_is_relative_to_the_largest_output(self) -> None:
        inputs = [torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 3.0]])]
        assert largest_difference(lambda x: x + 0.5, lambda x: x, inputs) == 0.5 / 4
        assert largest_difference(lambda x: x, lambda x: x, inputs) == 0

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_outputs_that_say_nothing(self, value: float) -> None:
        with pytest.raises(ExportError, match="export the checkpoint of a run that did not diverg"):
            largest_difference(lambda x: x, lambda x: x * 0 + value, [torch.ones(1, 2)])

    def test_a_program_that_is_not_the_network_is_seen(self) -> None:
        """A fold that forgot the running mean would be."""
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4)).eval()
        x = torch.randn(5, 3)
        with torch.no_grad():
            network[1].running_mean.fill_(0.01)
            assert largest_difference(network[0], network, [x]) > 1e-3
