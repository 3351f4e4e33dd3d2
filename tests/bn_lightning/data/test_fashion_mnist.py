"""Fashion-MNIST: its loader on files written here, and on the real ones where they are."""

import gzip
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bn_lightning.data import FashionMNISTDataModule, MNISTDataModule
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.published import FASHION_MNIST, MNIST, PUBLISHED

NAMES = list(FASHION_MNIST)


def files(seed: int) -> dict[str, bytes]:
    """Payloads of 24 training and 6 test images of noise."""
    noise = np.random.default_rng(seed)
    payloads = {}
    for part, count in (("train", 24), ("t10k", 6)):
        sizes = [number.to_bytes(4, "big") for number in (count, 28, 28)]
        images, labels = noise.integers(0, 256, (count, 784)), noise.integers(0, 10, count)
        payloads[f"{part}-images-idx3-ubyte"] = (
            b"\0\0\x08\x03" + b"".join(sizes) + images.astype(np.uint8).tobytes()
        )
        payloads[f"{part}-labels-idx1-ubyte"] = (
            b"\0\0\x08\x01" + sizes[0] + labels.astype(np.uint8).tobytes()
        )
    return payloads


CLOTHES, DIGITS = files(0), files(1)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both data sets as they belong, raw and in gzip, with digests like the published ones."""
    md5 = {name: f"md5:{hashlib.md5(payload).hexdigest()}" for name, payload in CLOTHES.items()}
    sha256 = {name: hashlib.sha256(payload).hexdigest() for name, payload in DIGITS.items()}
    for module, digests in ((FashionMNISTDataModule, md5), (MNISTDataModule, sha256)):
        monkeypatch.setattr(module, "digests", digests)
        monkeypatch.setitem(PUBLISHED, module.source, digests)
    for source, payloads in (("fashion_mnist", CLOTHES), ("mnist", DIGITS)):
        (tmp_path / source).mkdir()
        for name, payload in payloads.items():
            gz = gzip.compress(payload)
            path = tmp_path / source / (f"{name}.gz" if "images" in name else name)
            path.write_bytes(gz if "images" in name else payload)
    return tmp_path


def ready(kind: type[MNISTDataModule], root: Path) -> MNISTDataModule:
    module = kind(root, 4, 6, 1 / 12, 0, None, download=False)
    module.prepare_data()
    module.setup("fit")
    return module


def test_it_is_read_as_mnist_is(root: Path) -> None:
    module = ready(FashionMNISTDataModule, root)
    inputs = module.test_dataloader().inputs
    pixels = np.frombuffer(CLOTHES[NAMES[2]][16:], np.uint8).reshape(6, 1, 28, 28)
    assert torch.equal(inputs, torch.from_numpy(pixels / np.float32(255)))
    assert module.info == {
        "source": "fashion_mnist",
        "root": str(root),
        # Of the payloads, whatever the digest that they are known by.
        "sha256": {name: hashlib.sha256(CLOTHES[name]).hexdigest() for name in NAMES},
        "classes": 10,
        "train": 22,
        "validation": 2,
        "test": 6,
    }


@pytest.mark.parametrize(
    ("kind", "source", "other"),
    [
        (FashionMNISTDataModule, "fashion_mnist", "mnist"),
        (MNISTDataModule, "mnist", "fashion_mnist"),
    ],
    ids=["digits_for_clothes", "clothes_for_digits"],
)
@pytest.mark.parametrize("name", [NAMES[0], NAMES[1]], ids=["images", "labels"])
def test_the_other_data_set_is_called_by_its_name(
    root: Path, kind: type[MNISTDataModule], source: str, other: str, name: str
) -> None:
    (found,) = (root / source).glob(f"{name}*")
    (wrong,) = (root / other).glob(f"{name}*")
    shutil.copy(wrong, found)
    message = f"{re.escape(str(found))}: expected .*, the file {other}/{name};"
    with pytest.raises(DataError, match=message):
        ready(kind, root)
    assert found.read_bytes() == wrong.read_bytes()


def test_two_files_of_one_data_set_exchanged(root: Path) -> None:
    (root / "fashion_mnist" / NAMES[1]).write_bytes(CLOTHES[NAMES[3]])
    with pytest.raises(DataError, match=f"fashion_mnist/{NAMES[3]}"):
        ready(FashionMNISTDataModule, root)


def test_another_payload_is_told_by_its_md5(root: Path) -> None:
    (root / "fashion_mnist" / NAMES[1]).write_bytes(CLOTHES[NAMES[1]][:-1])
    with pytest.raises(DataError, match="expected md5 .*31 bytes.; "):
        ready(FashionMNISTDataModule, root)


def test_absent_files_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match=str(tmp_path / "fashion_mnist")):
        ready(FashionMNISTDataModule, tmp_path)


def test_the_published_digests_are_of_each_file() -> None:
    assert MNIST.keys() == FASHION_MNIST.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in MNIST.values())
    assert all(re.fullmatch("md5:[0-9a-f]{32}", digest) for digest in FASHION_MNIST.values())


DATA = Path(os.environ.get("BN_LIGHTNING_DATA", "data"))


@pytest.mark.skipif(
    not (DATA / "fashion_mnist").is_dir(),
    reason=f"Fashion-MNIST is not in {DATA / 'fashion_mnist'} (BN_LIGHTNING_DATA)",
)
def test_the_real_files() -> None:
    info = ready(FashionMNISTDataModule, DATA).info
    assert (info["train"], info["validation"], info["test"]) == (55_000, 5_000, 10_000)


@pytest.mark.skipif(
    not (DATA / "mnist").is_dir(), reason=f"MNIST is not in {DATA / 'mnist'} (BN_LIGHTNING_DATA)"
)
def test_the_real_mnist_in_the_place_of_fashion_mnist(tmp_path: Path) -> None:
    (tmp_path / "fashion_mnist").symlink_to((DATA / "mnist").absolute())
    with pytest.raises(DataError, match=f"the file mnist/{NAMES[0]}"):
        ready(FashionMNISTDataModule, tmp_path)
