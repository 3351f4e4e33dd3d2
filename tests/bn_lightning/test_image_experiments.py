"""The experiments on images, from the command line: a few steps of each on pictures of noise."""

from pathlib import Path

import pytest
import torch
from image_folders import write_images

from bn_lightning.evaluate import main as evaluate
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.train import main as train

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

# The default, bn_baseline, also runs in tests/test_experiments.py.
VARIANTS = [
    "inception",
    *(
        pytest.param(name, marks=pytest.mark.soak)
        for name in ("bn_baseline", "bn_x5", "bn_x5_sigmoid", "bn_x30")
    ),
]
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_images(root / "images", CLASSES, train=12, val=4, size=(32, 32))
    return root


def short(root: Path, experiment: str) -> tuple[str, ...]:
    return (
        f"+experiment={experiment}",
        "data=image_folder",
        f"data.root={root}",
        "data.name=images",
        "data.image_size=32",
        "data.batch_size=4",
        "data.num_workers=0",
        "model.num_classes=3",
        "trainer.max_steps=20",
        "trainer.val_check_interval=10",
        "trainer.log_every_n_steps=1",
        "~callbacks.activation_percentiles",
        "extras.figures=false",
        "extras.num_threads=1",
    )


def check_trains_resumes_and_evaluates(command, *overrides: str) -> Path:
    part = command(train, *overrides, "trainer.max_steps=10")
    assert part.code == 0, part.err
    whole = command(train, *overrides, "ckpt_path=last")
    assert whole.code == 0, whole.err
    assert whole.directory == part.directory
    record = read_run(whole.directory)
    assert (record["status"], record["steps"]) == ("completed", 20), record.get("diverged_at")
    assert record["resumed_at"] == [10]
    assert record["data"]["source"] == "images"
    assert [step for step, _ in read_metrics(whole.directory)["train/loss"]] == [*range(1, 21)]
    again = command(evaluate, f"ckpt_path={whole.directory}/checkpoints/last.ckpt")
    assert again.code == 0, again.err
    assert read_run(again.directory)["metrics"] == {
        key: value for key, value in record["metrics"].items() if key.startswith("test/")
    }
    return whole.directory


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_inception(command, image_root, variant):
    options = short(image_root, "imagenet_inception")
    check_trains_resumes_and_evaluates(command, *options, f"variant={variant}")


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_residual_network(command, image_root, norm):
    options = short(image_root, "cifar_resnet")
    small = ("model.network.depth=8", "optimizer.lr=0.01", f"norm={norm}")
    check_trains_resumes_and_evaluates(command, *options, *small)


def test_bf16_channels_last_and_clipping(command, image_root):
    losses = {}
    fast = (
        "trainer.precision=bf16-mixed",
        "model.channels_last=true",
        "trainer.gradient_clip_val=1.0",
    )
    for name, overrides in (("plain", ()), ("fast", fast)):
        options = short(image_root, "cifar_resnet")
        few = ("model.network.depth=8", "trainer.max_steps=3")
        directory = command(train, *options, *few, *overrides).directory
        losses[name] = torch.tensor([loss for _, loss in read_metrics(directory)["train/loss"]])
    # The first step's loss is the same network's, to the precision of bf16; later ones are not.
    torch.testing.assert_close(losses["fast"][0], losses["plain"][0], rtol=0.02, atol=0)
    assert not torch.equal(losses["fast"], losses["plain"])
    assert losses["fast"].isfinite().all()
