"""`python -m bn_lightning.inspect_checkpoint`: the BatchNorms of any checkpoint."""

import re
from pathlib import Path

import boring
import pytest
import torch
from torch import nn

from bn_lightning import inspect_checkpoint, train
from bn_lightning.cli.batch_norm_table import print_batch_norms

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

PLACEMENT = (
    "+experiment=placement",
    "data.samples=400",
    "trainer.max_steps=20",
    "trainer.val_check_interval=20",
    "extras.figures=false",
)


KEYS = ("weight", "bias", "running_mean", "running_var")


def numbers(out: str) -> list[list[float]]:
    """The rows of channels: what stands in the table of each."""
    found = re.findall(r"^│ (?:\d+|smallest|25%|median|75%|largest) +│(.*)│$", out, re.MULTILINE)
    return [[float(cell) for cell in row.split("│")] for row in found]


def test_the_checkpoint_of_a_run(command) -> None:
    run = command(train.main, *PLACEMENT)
    assert run.code == 0, run.err
    path = run.directory / "checkpoints/last.ckpt"
    before = {path for path in Path(".").rglob("*")}
    result = command(inspect_checkpoint.main, f"ckpt_path={path}")
    assert result.code == 0, result.err
    assert {path for path in Path(".").rglob("*")} == before  # it leaves nothing
    # The summary of the run ends with the same tables and its own.
    assert result.out in run.out
    state = torch.load(path, weights_only=True)["state_dict"]
    expected = [
        [state[f"network.hidden.{i}.norm.{key}"][channel].item() for key in KEYS]
        for i, channels in enumerate((3, 2))
        for channel in range(channels)
    ]
    for found, values in zip(numbers(result.out), expected, strict=True):
        assert found == pytest.approx(values, rel=1e-3)
    assert (
        "network.hidden.0.norm: 3 channels, 12 numbers, 6 of them trained, 20 batches seen, "
        "eps 1e-05, momentum 0.1\n"
    ) in result.out
    words = [re.sub(r"\s+", " ", line) for line in result.out.splitlines()]
    assert "│ trained │ yes │ yes │ no │ no │" in words
    assert "│ begins at │ 1 │ 0 │ 0 │ 1 │" in words


def test_before_the_first_step_they_are_where_they_begin(capsys) -> None:
    """Scale begins at 1 and shift at 0, not the other way round."""
    print_batch_norms(nn.Sequential(nn.BatchNorm1d(2)).state_dict())
    assert numbers(capsys.readouterr().out) == [[1, 0, 0, 1]] * 2


def test_the_checkpoint_of_a_stranger(command, tmp_path) -> None:
    """Of a LightningModule that knows nothing of this project."""
    trainer = boring.trainer(tmp_path, max_steps=3, num_sanity_val_steps=0)
    trainer.fit(boring.boring(), boring.loader(), boring.loader())
    trainer.save_checkpoint("other.ckpt")
    result = command(inspect_checkpoint.main, "ckpt_path=other.ckpt")
    assert result.code == 0, result.err
    names = [line.partition(":")[0] for line in result.out.splitlines() if " channels, " in line]
    assert names == ["features.1", "block.bn1", "block.bn2"]
    assert len(numbers(result.out)) == 15
    assert "3 batches seen, eps not in the checkpoint, momentum not in" in result.out


def test_names_are_printed_as_they_are(capsys) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    print_batch_norms({f"[/red]{'x' * 90}.{key}": value for key, value in state.items()})
    assert f"[/red]{'x' * 90}: 2 channels" in capsys.readouterr().out


def test_many_channels_without_scale_and_shift(capsys) -> None:
    layer = nn.BatchNorm2d(101, affine=False)
    layer.running_mean.copy_(torch.arange(101.0).flip(0))
    print_batch_norms({f"net.bn.{key}": value for key, value in layer.state_dict().items()})
    out = capsys.readouterr().out
    assert "net.bn: 101 channels, 202 numbers, 0 of them trained, 0 batches seen" in out
    rows = [line.split("│")[1:6] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["trained", "none", "none", "no", "no"],
        ["begins at", "none", "none", "0", "1"],
        ["smallest", "", "", "0", "1"],
        ["25%", "", "", "25", "1"],
        ["median", "", "", "50", "1"],
        ["75%", "", "", "75", "1"],
        ["largest", "", "", "100", "1"],
    ]


def test_a_checkpoint_without_batch_norm(command) -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).state_dict()
    torch.save({"state_dict": state, "global_step": 5, "hyper_parameters": {"config": 3}}, "bare")
    result = command(inspect_checkpoint.main, "ckpt_path=bare")
    assert result.code == 0, result.err
    assert "no BatchNorm" in result.out


def test_errors(command, tmp_path) -> None:
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    Path("text").write_text("no checkpoint")
    torch.save({"state_dict": {}, "global_step": 1, "trap": Hostile()}, "trap")
    for arguments, words in (
        (["ckpt_path=nowhere"], "no such file"),
        (["ckpt_path=text"], "is none or is damaged"),
        (["ckpt_path=trap"], "a checkpoint of plain tensors"),
        ([], "ckpt_path"),
    ):
        result = command(inspect_checkpoint.main, *arguments)
        assert result.code == 1, arguments
        assert words in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert not (tmp_path / "executed").exists()
