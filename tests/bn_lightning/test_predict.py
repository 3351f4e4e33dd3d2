"""`python -m bn_lightning.predict`: the labels that an evaluation would count."""

import csv
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image

from bn_lightning import evaluate, predict, train
from bn_lightning.data import CIFAR10DataModule, MNISTDataModule
from bn_lightning.data.digits import load_digits
from bn_lightning.data.errors import CorruptImageWarning
from bn_lightning.data.mnist import MNIST
from bn_lightning.predict import predictions_csv
from bn_lightning.runs.record import read_run

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

SHORT = ("trainer.max_steps=40", "trainer.val_check_interval=20", "extras.figures=false")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ended(result) -> Path:
    assert result.code == 0, result.err
    return result.directory


def refused(result, words: str) -> None:
    assert result.code == 1
    assert result.err.count("\n") == 1 and words in result.err, result.err


def share(rows: list[dict[str, str]], right: Callable[[dict[str, str]], bool]) -> float:
    return sum(map(right, rows)) / len(rows)


def class_in_path(row: dict[str, str]) -> bool:
    """Whether the label is the name of the folder that the image lies in."""
    return Path(row["path"]).parent.name == row["label"]


def check_probabilities(rows: list[dict[str, str]]) -> None:
    for row in rows:
        of_class = {k: float(v) for k, v in row.items() if k.startswith("probability_")}
        assert sum(of_class.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(of_class.values())
        assert float(row["probability"]) == of_class[f"probability_{row['label']}"]


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


@pytest.fixture
def grey(tmp_path, monkeypatch) -> Path:
    """The digits with 8 bits a pixel as MNIST's four files, and the test images as PNG."""
    digits, payloads = load_digits(), []
    for images, targets in (
        (digits.train_inputs, digits.train_targets),
        (digits.test_inputs, digits.test_targets),
    ):
        pixels = np.rint(255 * images[:, 0]).astype(np.uint8)
        payloads += [idx(pixels), idx(targets)]
    digests = {}
    (tmp_path / "mnist").mkdir()
    for name, payload in zip(MNIST, payloads, strict=True):
        (tmp_path / "mnist" / name).write_bytes(payload)
        digests[name] = hashlib.sha256(payload).hexdigest()
    monkeypatch.setattr(MNISTDataModule, "digests", digests)
    for number, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        path = tmp_path / "png" / str(target) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "png"


def test_grey_images_are_labelled_as_an_evaluation_counts_them(command, tmp_path, grey):
    data = (f"data.root={tmp_path}", "data.binarize=0.4")
    run = ended(command(train.main, "+experiment=mnist_bn", *data, *SHORT))
    path = ended(command(predict.main, f"ckpt_path={run}/checkpoints/last.ckpt", f"input={grey}"))
    rows = table(path)
    accuracy = read_run(run)["metrics"]["test/accuracy"]
    assert len(rows) == 360 and 0.2 < accuracy < 1
    assert share(rows, class_in_path) == pytest.approx(accuracy, abs=1e-6)
    check_probabilities(rows)
    assert all(row["path"].startswith(f"{grey}/") for row in rows)

    # One image, whatever its name ends in; colours that are all grey.
    first = Path(rows[0]["path"])
    Image.open(first).convert("RGB").save("one.image", "PNG")
    arguments = (f"ckpt_path={run}/checkpoints/last.ckpt", "input=one.image", "output=a/b.csv")
    assert ended(command(predict.main, *arguments)) == Path("a/b.csv")
    (row,) = table(Path("a/b.csv"))
    assert row["path"] == "one.image" and row["label"] == rows[0]["label"]
    assert float(row["probability"]) == pytest.approx(float(rows[0]["probability"]), rel=1e-5)

    Image.new("L", (30, 28)).save("wide.png")
    for folder in ("empty", "texts"):
        Path(folder).mkdir()
    for name in "abcd":
        (Path("texts") / f"{name}.txt").touch()
    for given, words in (
        (
            ["input=wide.png"],
            "28x28 pixels, the size of the training images, got 30x28; scale the image; or set",
        ),
        ([], "input"),
        (["input=nowhere"], "nowhere: no such file"),
        (["input=empty"], "got no file in the folder empty"),
        (["input=texts"], "got a.txt, b.txt, c.txt and 1 more"),
        (["input=x", "corrupt=maybe"], "`corrupt` to be error or skip, got 'maybe'"),
        (["input=x", "output=texts"], "got the folder texts"),
        (["input=x", "ckpt_path=nowhere"], "`ckpt_path` to be a checkpoint file"),
    ):
        refused(command(predict.main, *arguments[:1], *given), words)


def test_images_of_the_real_test_set_are_its_inputs(mnist_root, tmp_path):
    module = MNISTDataModule(mnist_root, 1, 300, 1 / 12, 1, None)
    module.setup("test")
    inputs, _ = next(iter(module.test_dataloader()))
    for number, image in enumerate(inputs):
        pixels = np.rint(255 * image[0].numpy()).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    ((found, index),) = module.prediction_inputs(tmp_path, pytest.fail).batches
    assert torch.equal(found, inputs)
    assert index.tolist() == list(range(len(inputs)))


def test_coloured_images_of_any_size(command, tmp_path, recwarn):
    """A folder's names are the labels, and its evaluation's accuracy is theirs."""
    folder = write_images(tmp_path / "noise", train=12, val=9)
    options = ("data.name=noise", "data.image_size=8", "data.num_workers=0", "data.batch_size=6")
    run = ended(
        command(
            train.main,
            "data=image_folder",
            f"data.root={tmp_path}",
            "data.eval_batch_size=4",
            *options,
            "model.network.in_features=192",
            "model.num_classes=3",
            *SHORT,
        )
    )
    checkpoint = f"ckpt_path={run}/checkpoints/last.ckpt"
    evaluation = read_run(ended(command(evaluate.main, checkpoint)))
    rows = table(ended(command(predict.main, checkpoint, f"input={folder}/val")))
    assert share(rows, class_in_path) == evaluation["metrics"]["test/accuracy"]
    check_probabilities(rows)
    # The network has an output more than there are classes.
    assert [name for name in rows[0] if "_" in name] == [
        *("probability_cat", "probability_dog"),
        "probability_2",
    ]

    # Without the data, hidden files and other files; with a name that is no UTF-8.
    folder.rename(tmp_path / "moved")
    images = tmp_path / "moved" / "val" / "cat"
    (images / ".hidden.png").write_text("x")
    (images / "notes.txt").write_text("x")
    os.rename(images / "000.png", os.fsencode(images) + b"/\xff.png")
    for number in range(4, 9):  # a whole batch of four among them
        (images / f"{number:03}.png").write_text("no image")
    refused(
        command(predict.main, checkpoint, f"input={images}"),
        "004.png: expected an image",
    )
    recwarn.clear()
    result = command(predict.main, checkpoint, f"input={images}", "corrupt=skip")
    rows = table(ended(result))
    assert [Path(row["path"]).name for row in rows] == [
        "001.png",
        "002.png",
        "003.png",
        r"\xff.png",
    ]
    assert "4 images, 5 skipped" in result.out
    for row in rows:
        label, probability = row["label"], float(row["probability"])
        assert f"{row['path']}: {label}, {probability:.3f}\n" in result.out
    assert len([w for w in recwarn if w.category is CorruptImageWarning]) == 5
    for number in (1, 2, 3):
        (images / f"{number:03}.png").write_text("no image")
    os.remove(os.fsencode(images) + b"/\xff.png")
    refused(
        command(predict.main, checkpoint, f"input={images}", "corrupt=skip"),
        "expected `input` to have usable images, got 8 unusable",
    )


def test_rows_of_a_table(command, tmp_path):
    random = np.random.default_rng(0)
    lines = ["name,iq,place,cgpa"]
    for i in range(200):
        cgpa, iq = random.normal(7, 1.5), random.normal(100, 15)
        lines.append(f"n{i},{iq:.3f},{'yes' if (cgpa - 7) * 10 + iq > 100 else 'no'},{cgpa:.3f}")
    path = tmp_path / "students.csv"
    path.write_text("\n".join(lines))
    options = (f"data.path={path}", "data.target=place", "data.standardize=true")
    run = ended(
        command(train.main, "+experiment=placement", *options, "data.test_fraction=0.5", *SHORT)
    )
    checkpoint = f"ckpt_path={run}/checkpoints/last.ckpt"
    evaluation = read_run(ended(command(evaluate.main, checkpoint)))
    path.rename(tmp_path / "elsewhere.csv")
    rows = table(ended(command(predict.main, checkpoint, "input=elsewhere.csv")))
    assert [int(row["row"]) for row in rows] == list(range(1, 201))
    check_probabilities(rows)
    test = np.sort(np.random.default_rng(0).permutation(200)[:100])  # as the data module cuts it
    right = [row["label"] == line.split(",")[2] for row, line in zip(rows, lines[1:], strict=True)]
    assert np.mean(np.array(right)[test]) == pytest.approx(
        evaluation["metrics"]["test/accuracy"], abs=1e-6
    )

    # No target, other order; then no feature, no file, no number.
    Path("new.csv").write_text("cgpa,iq\n" + ",".join(np.array(lines[5].split(","))[[3, 1]]))
    (row,) = table(ended(command(predict.main, checkpoint, "input=new.csv")))
    assert (row["row"], row["label"]) == ("1", rows[4]["label"])
    assert float(row["probability"]) == pytest.approx(float(rows[4]["probability"]), rel=1e-5)
    Path("new.csv").write_text("cgpa,IQ\n7,100\n")
    refused(command(predict.main, checkpoint, "input=new.csv"), "got cgpa, IQ: iq is absent")
    refused(command(predict.main, checkpoint, "input=nowhere.csv"), "nowhere.csv: no such file")
    refused(command(predict.main, checkpoint, "input=."), "a folder; correct the path")
    Path("new.csv").write_text("cgpa,iq\n7,many\n")
    refused(command(predict.main, checkpoint, "input=new.csv"), "'many' in line 2")


def test_cifar_images_are_normalised(tmp_path):
    """As its evaluation does it, by the statistics of each channel."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    module = CIFAR10DataModule(tmp_path, 1, 4, 0.1, 1, True, mean, std)
    pixels = np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    batches = list(module.prediction_inputs(tmp_path, pytest.fail).batches)
    assert [index.tolist() for _, index in batches] == [[0, 1, 2, 3], [4]]
    expected = (pixels / 255 - mean) / std
    found = torch.cat([inputs for inputs, _ in batches]).numpy()
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_names_are_quoted():
    text = predictions_csv("path", ['a,"b".png'], ["x,y", "z"], [[0.25, 0.75]])
    assert text == (
        'path,label,probability,"probability_x,y",probability_z\n"a,""b"".png",z,0.75,0.25,0.75\n'
    )
