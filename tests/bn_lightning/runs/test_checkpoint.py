"""Checkpoints are read without running what they hold, and never into another network."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.runs.checkpoint import CheckpointError, check_fits, load_checkpoint

CONTENT = {"state_dict": {"weight": torch.ones(2, 3)}, "global_step": 7}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "a.ckpt"
    torch.save(CONTENT, path)
    return path


class Command:
    """What unpickles to the making of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "`ckpt_path`" in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


class TestLoad:
    @pytest.mark.parametrize("kind", [str, Path], ids=["str", "path"])
    def test_plain_tensors(self, good: Path, kind: Any) -> None:
        checkpoint = load_checkpoint(kind(good))
        assert checkpoint["global_step"] == 7
        assert torch.equal(checkpoint["state_dict"]["weight"], torch.ones(2, 3))

    def test_onto_the_cpu(self, tmp_path: Path, device: str) -> None:
        state = {"state_dict": {"weight": torch.ones(2, device=device)}, "global_step": 1}
        torch.save(state, tmp_path / "a.ckpt")
        weight = load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"]
        assert weight.device.type == "cpu"

    def test_no_such_file(self, tmp_path: Path) -> None:
        assert "no such file" in refused(tmp_path / "nowhere.ckpt")
        assert refused(tmp_path).endswith(f"got {tmp_path}: a directory; give that of a run")
        (tmp_path / "run.json").touch()
        assert refused(tmp_path).endswith(f"got {tmp_path}: a run that wrote none")
        (tmp_path / "run.json").unlink()
        best = tmp_path / "best.ckpt"
        best.touch()
        assert refused(tmp_path).endswith(f"a directory; give {best}")

    # Of protocols that torch itself does not write.
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol.*")
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_a_pickle_is_not_run(self, tmp_path: Path, protocol: int) -> None:
        path, made = tmp_path / "a.ckpt", tmp_path / "made"
        path.write_bytes(pickle.dumps({"state_dict": Command(made)}, protocol))
        refused(path)
        torch.save({"state_dict": Command(made)}, path, pickle_protocol=max(protocol, 2))
        refused(path)
        assert not made.exists()

    @pytest.mark.parametrize(
        "content",
        [[1, 2], {"model": {}}, torch.ones(2), None],
        ids=["list", "dict", "tensor", "None"],
    )
    def test_something_else_that_torch_saved(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "a.ckpt")
        assert "no state_dict" in refused(tmp_path / "a.ckpt")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol.*")
    @settings(deadline=None, derandomize=True)
    @given(st.binary(max_size=64))
    @example(b"")
    @example(b"not a checkpoint\n")
    @example(b"PK\x03\x04")
    @example(b"\x89PNG\r\n\x1a\n")
    def test_any_other_bytes(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "bytes.ckpt"
        path.write_bytes(content)
        refused(path)

    @settings(deadline=None, derandomize=True)
    @given(st.floats(0, 0.99))
    def test_a_part_of_a_checkpoint(
        self, tmp_path_factory: pytest.TempPathFactory, good: Path, part: float
    ) -> None:
        whole = good.read_bytes()
        path = tmp_path_factory.getbasetemp() / "part.ckpt"
        path.write_bytes(whole[: int(part * len(whole))])
        refused(path)


class TestFits:
    def network(self, width: int = 3, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(2, width, bias=bias), nn.BatchNorm1d(width))

    def test_itself(self) -> None:
        check_fits({"state_dict": self.network().state_dict()}, self.network(), "a.ckpt")

    @pytest.mark.parametrize(
        ("found", "here", "message"),
        [
            ({"width": 4}, {}, r"0\.weight is \(4, 2\) there and \(3, 2\) here"),
            ({"bias": False}, {}, r"0\.bias is absent there and \(3,\) here"),
            ({}, {"bias": False}, r"0\.bias is \(3,\) there and absent here"),
        ],
        ids=["shape", "absent_there", "absent_here"],
    )
    def test_another_network(
        self, found: dict[str, Any], here: dict[str, Any], message: str
    ) -> None:
        checkpoint = {"state_dict": self.network(**found).state_dict()}
        with pytest.raises(CheckpointError, match=message) as caught:
            check_fits(checkpoint, self.network(**here), "runs/a.ckpt")
        assert "runs/a.ckpt" in str(caught.value)

    def test_a_scalar_is_not_absent(self) -> None:
        """`num_batches_tracked` has the shape ()."""
        state = self.network().state_dict()
        del state["1.num_batches_tracked"]
        with pytest.raises(CheckpointError, match=r"num_batches_tracked is absent there and \(\)"):
            check_fits({"state_dict": state}, self.network(), "a.ckpt")
