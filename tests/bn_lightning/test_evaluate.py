"""`python -m bn_lightning.evaluate`: the metrics of a checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from image_folders import write_images

from bn_lightning import evaluate, train
from bn_lightning.data.errors import CorruptImageWarning
from bn_lightning.runs.record import read_run

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")


@pytest.fixture
def trained(command) -> Path:
    """The directory of a short run on the digits."""
    return command(
        train.main,
        "+experiment=mnist_bn",
        "data=digits",
        "trainer.max_steps=40",
        "trainer.val_check_interval=20",
        "extras.figures=false",
    ).directory


def test_it_gives_what_the_run_gave_and_leaves_the_run_alone(command, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = command(evaluate.main, f"ckpt_path={trained}/checkpoints/last.ckpt")
    assert result.code == 0, result.err
    assert result.directory.parent == Path("logs/evaluate/runs").absolute()
    record, trained_record = read_run(result.directory), read_run(trained)
    for name in ("test/accuracy", "test/accuracy_top5", "test/loss"):
        assert record["metrics"][name] == trained_record["metrics"][name]
    assert record["data"]["source"] == "digits"
    assert "test/accuracy" in result.out
    assert "val_check_interval" not in result.out  # 1000, which concerns training only
    assert {path: path.read_bytes() for path in before} == before
    best = trained / "checkpoints/best.ckpt"
    for name in ("best", str(trained)):
        result = command(evaluate.main, f"ckpt_path={name}")
        path = best.relative_to(Path.cwd()) if name == "best" else best
        assert f"checkpoint: {path}" in result.out
        assert read_run(result.directory)["steps"] in (20, 40)


def test_another_data_set(command, trained, mnist_root):
    result = command(
        evaluate.main,
        f"ckpt_path={trained}/checkpoints/last.ckpt",
        "data=mnist",
        f"data.root={mnist_root}",
    )
    assert result.code == 0, result.err
    assert read_run(result.directory)["data"]["test"] == 10_000


def test_errors(command, trained):
    Path("text").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, "tensors")
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["config"]["model"]["_target_"] = "os.system"
    torch.save(checkpoint, "hostile")
    torch.save({k: v for k, v in checkpoint.items() if k != "hyper_parameters"}, "bare")
    for arguments, words in (
        (["ckpt_path=nowhere"], "no such file"),
        (["ckpt_path=text"], "is none or is damaged"),
        (["ckpt_path=tensors"], "no state_dict"),
        (["ckpt_path=hostile"], "got os.system; if you trust it"),
        (["ckpt_path=bare"], "holds no configuration"),
        ([], "ckpt_path"),
    ):
        result = command(evaluate.main, *arguments)
        assert result.code == 1, arguments
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, result.err
        assert words in lines[0]
    assert not Path("logs/evaluate").exists()


def test_checkpoints_of_version_0_1_0(command, trained):
    """They are read, unless they name what has moved or arguments that are gone."""
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    config = checkpoint["hyper_parameters"]["config"]
    config |= {"trusted": [], "logger": {"csv": {"_target_": "bn_lightning.metrics_logger.Gone"}}}
    torch.save(checkpoint, "old")
    result = command(evaluate.main, "ckpt_path=old")
    assert result.code == 0, result.err

    layers = [{"_target_": "bn_lightning.batch_norm.BatchNorm1d", "num_features": 3}]
    own = {**config["model"], "network": {"_target_": "torch.nn.Sequential", "_args_": layers}}
    for changed, words in (
        (
            {"model": own},
            "0.1.0 wrote that name, which is bn_lightning.modules.batch_norm.BatchNorm1d",
        ),
        ({"data": {**config["data"], "gone": 1}}, "this version of bn_lightning knows"),
    ):
        checkpoint["hyper_parameters"]["config"] = config | changed
        torch.save(checkpoint, "old")
        result = command(evaluate.main, "ckpt_path=old")
        assert result.code == 1 and result.err.count("\n") == 1
        assert words in result.err


def test_no_pickle_is_loaded(command, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": {}, "trap": Hostile()}, "trap")
    assert command(evaluate.main, "ckpt_path=trap").code == 1
    assert not (tmp_path / "executed").exists()


def test_classes_of_images(command, tmp_path):
    """A run on an image folder, its checkpoint, and folders of other classes."""
    folder = write_images(tmp_path / "noise")
    (folder / "train" / "cat" / "001.png").write_bytes(b"not an image")
    data = (
        f"data.root={tmp_path}",
        "data.name=noise",
        "data.image_size=8",
        "data.batch_size=6",
        "data.num_workers=0",
        "data.corrupt=skip",
    )
    arguments = (
        "data=image_folder",
        *data,
        "model.network.in_features=192",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "extras.figures=false",
    )
    with pytest.warns(CorruptImageWarning, match=r"cat/001\.png"):
        result = command(train.main, *arguments, "model.num_classes=2")
    assert result.code == 0, result.err
    record = read_run(result.directory)
    assert record["data"]["corrupt"] == 1
    assert record["metrics"]["test/accuracy"] == record["metrics"]["val/accuracy"]

    checkpoint = f"ckpt_path={result.directory}/checkpoints/last.ckpt"
    result = command(evaluate.main, checkpoint)
    assert result.code == 0, result.err
    metrics = read_run(result.directory)["metrics"]
    assert metrics["test/accuracy"] == record["metrics"]["test/accuracy"]

    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / "wolf")
    result = command(evaluate.main, checkpoint)
    assert result.code == 1
    assert (
        "expected the classes of the checkpoint, got classes without dog and with wolf"
        in result.err
    )

    for split in ("train", "val"):
        shutil.copytree(folder / split / "wolf", folder / split / "dog")
    result = command(train.main, *arguments, "model.num_classes=2")
    assert result.code == 1
    assert "set model.num_classes=3" in result.err
    assert result.err.count("\n") == 1
