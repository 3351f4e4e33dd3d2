"""MNIST: the real files where they are, and tiny ones of its format for all that goes wrong."""

import gzip
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bn_lightning.data import DigitsDataModule, MNISTDataModule
from bn_lightning.data.errors import DataError, DataFallbackWarning, DataUnavailableError

NAMES = list(MNISTDataModule.digests)
REFUSED = "http://127.0.0.1:9/"  # the discard port, where nothing listens


def tiny_files() -> dict[str, bytes]:
    """Payloads of 24 training and 6 test images, all pixels of an image the number of it."""
    files = {}
    for part, count in (("train", 24), ("t10k", 6)):
        size = count.to_bytes(4, "big")
        images = np.arange(count, dtype=np.uint8)[:, None].repeat(28 * 28, axis=1)
        side = (28).to_bytes(4, "big")
        files[f"{part}-images-idx3-ubyte"] = b"\0\0\x08\x03" + size + side + side + images.tobytes()
        labels = np.arange(count, dtype=np.uint8) % 10
        files[f"{part}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + size + labels.tobytes()
    return files


FILES = tiny_files()


class TinyMNIST(MNISTDataModule):
    """All that a data set of the same format has to say."""

    source = "tiny"
    mirrors = (REFUSED,)
    digests = {name: hashlib.sha256(FILES[name]).hexdigest() for name in NAMES}


def tiny(root: Path, **options: Any) -> TinyMNIST:
    module = TinyMNIST(root, 4, 6, 1 / 12, 0, **{"fallback": None, "download": False, **options})
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The four files, two raw and two in gzip."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, payload in FILES.items():
        if "labels" in name:
            (folder / name).write_bytes(payload)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(payload))
    return folder


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Base URL of a server that has all four files."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = tmp_path / "served"
    served.mkdir()
    for name, payload in FILES.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(payload))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class TestFiles:
    def test_raw_and_gzip(self, folder: Path) -> None:
        module = tiny(folder.parent)
        batches = module.test_dataloader()
        assert batches.inputs.shape == (6, *module.input_shape) == (6, 1, 28, 28)
        assert torch.equal(batches.inputs[:, 0, 3, 5], torch.arange(6) / 255)
        assert batches.targets.tolist() == list(range(6))
        assert module.info == {
            "source": "tiny",
            "root": str(folder.parent),
            "sha256": TinyMNIST.digests,
            "classes": 10,
            "train": 22,
            "validation": 2,
            "test": 6,
        }

    def test_published_by_another_digest(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The record has SHA-256 all the same."""
        published = {
            name: f"md5:{hashlib.md5(payload).hexdigest()}" for name, payload in FILES.items()
        }
        expected = TinyMNIST.digests
        monkeypatch.setattr(TinyMNIST, "digests", published)
        assert tiny(folder.parent).info["sha256"] == expected

    @pytest.mark.parametrize("fallback", [None, "digits"])
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (f"{NAMES[0]}.gz", gzip.compress(FILES[NAMES[0]])[:-9], "whole gzip file"),
            (f"{NAMES[0]}.gz", gzip.compress(FILES[NAMES[2]]), "sha256"),
            (NAMES[1], FILES[NAMES[1]][:-1], "sha256"),
            (NAMES[3], b"", "sha256"),
        ],
        ids=["truncated_gzip", "other_payload", "truncated_raw", "empty"],
    )
    def test_wrong_files_are_errors_with_and_without_fallback(
        self, folder: Path, name: str, content: bytes, message: str, fallback: str | None
    ) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            tiny(folder.parent, fallback=fallback, download=True)
        assert str(folder / name) in str(caught.value)
        assert (folder / name).read_bytes() == content

    @pytest.mark.parametrize("fallback", [None, "digits"])
    @pytest.mark.parametrize("download", [False, True], ids=["looking", "downloading"])
    def test_one_file_missing_is_an_error(
        self, folder: Path, fallback: str | None, download: bool
    ) -> None:
        (folder / NAMES[1]).unlink()
        with pytest.raises(DataUnavailableError, match=NAMES[1]) as caught:
            tiny(folder.parent, fallback=fallback, download=download)
        assert "data.fallback=digits" not in str(caught.value)  # which would not help

    @pytest.mark.parametrize("shape", [(6, 14, 56), (6, 56, 14)], ids=str)
    def test_images_of_another_size(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
    ) -> None:
        wide = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in shape)
        payload = wide + FILES[NAMES[2]][16:]
        (folder / f"{NAMES[2]}.gz").write_bytes(gzip.compress(payload))
        digests = {**TinyMNIST.digests, NAMES[2]: hashlib.sha256(payload).hexdigest()}
        monkeypatch.setattr(TinyMNIST, "digests", digests)
        with pytest.raises(DataError, match=re.escape(str(shape))):
            tiny(folder.parent)


class TestBinary:
    def test_pixels_above_the_threshold_are_one(self, folder: Path) -> None:
        """Image k has the value k / 255 everywhere: those above 3 / 255 become 1."""
        module = tiny(folder.parent, binarize=3.5 / 255)
        inputs = module.test_dataloader().inputs
        assert inputs.dtype == torch.float32 and inputs.shape == (6, 1, 28, 28)
        assert inputs[:, 0, 3, 5].tolist() == [0, 0, 0, 0, 1, 1]
        assert module.info == tiny(folder.parent).info

    def test_the_fallback_is_binary_too(self, tmp_path: Path) -> None:
        with pytest.warns(DataFallbackWarning):
            fallback = tiny(tmp_path, fallback="digits", binarize=0.5).test_dataloader().inputs
        digits = DigitsDataModule(4, 6, 1 / 12, 0, binarize=0.5)
        digits.setup("fit")
        assert torch.equal(fallback, digits.test_dataloader().inputs)
        grey = DigitsDataModule(4, 6, 1 / 12, 0)
        grey.setup("fit")
        assert torch.equal(fallback, (grey.test_dataloader().inputs > 0.5).float())

    @pytest.mark.parametrize("threshold", [0, 1, -0.5, "half", True])
    def test_no_threshold(self, tmp_path: Path, threshold: Any) -> None:
        for make in (tiny, lambda _, **options: DigitsDataModule(4, 6, 1 / 12, 0, **options)):
            with pytest.raises(ValueError, match=f"`binarize`.*{threshold!r}"):
                make(tmp_path, binarize=threshold)


class TestDownload:
    def test_what_is_absent_comes_from_a_mirror(
        self, tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TinyMNIST, "mirrors", (REFUSED, mirror))
        assert tiny(tmp_path, download=True).info["source"] == "tiny"
        assert sorted(os.listdir(tmp_path / "tiny")) == sorted(f"{name}.gz" for name in NAMES)
        # And not again: nothing more is served, nothing more is needed.
        monkeypatch.setattr(TinyMNIST, "mirrors", ())
        assert tiny(tmp_path, download=True).info["train"] == 22

    def test_only_the_missing_file_is_downloaded(
        self, folder: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TinyMNIST, "mirrors", (mirror,))
        (folder / NAMES[1]).unlink()
        tiny(folder.parent, download=True)
        assert (folder / f"{NAMES[1]}.gz").exists()
        assert not (folder / f"{NAMES[3]}.gz").exists()


class TestFallback:
    @pytest.mark.parametrize("download", [False, True], ids=["looking", "downloading"])
    def test_digits_with_one_warning(self, tmp_path: Path, download: bool) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = tiny(tmp_path, fallback="digits", download=download)
            module.setup("test")
        warned = [w for w in caught if issubclass(w.category, DataFallbackWarning)]
        assert len(warned) == len(caught) == 1
        for part in ("data.fallback", "digits", str(tmp_path / "tiny"), "28x28"):
            assert part in str(warned[0].message)
        assert module.info["source"] == "digits"
        digits = DigitsDataModule(4, 6, 1 / 12, 0)
        digits.setup("fit")
        assert module.info == digits.info
        assert module.train_dataloader().inputs.shape[1:] == (1, 28, 28)

    def test_a_root_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be a typing error, unless it is the usual one."""
        monkeypatch.chdir(tmp_path)
        for absent in (tmp_path / "dta", tmp_path / "dbta", tmp_path / "x" / "data"):
            with pytest.raises(DataUnavailableError, match="`data.root`"):
                tiny(absent, fallback="digits")
        with pytest.warns(DataFallbackWarning):
            assert tiny(tmp_path / "data", fallback="digits").info["source"] == "digits"

    def test_none_is_an_error_that_names_the_ways_out(self, tmp_path: Path) -> None:
        with pytest.raises(DataUnavailableError) as caught:
            tiny(tmp_path, download=True)
        for part in (
            str(tmp_path / "tiny" / NAMES[0]),
            REFUSED,
            "put the file",
            "data.fallback=digits",
        ):
            assert part in str(caught.value)

    def test_another_word_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`fallback`.*'cifar'"):
            MNISTDataModule(tmp_path, 4, 6, 1 / 12, 0, fallback="cifar")


class TestConfig:
    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "digits"])
    def test_it_instantiates(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BN_LIGHTNING_DATA", "/some/where")
        path = Path(__file__).parents[3] / "conf" / "data" / f"{name}.yaml"
        config = OmegaConf.create({"seed": 3, "data": OmegaConf.load(path)})
        module = instantiate(config.data)
        assert (module.batch_size, module.seed, module.test_curve) == (60, 3, True)
        if name != "digits":
            assert module.folder == Path("/some/where") / name
            assert module.fallback == ("digits" if name == "mnist" else None)


DATA = Path(os.environ.get("BN_LIGHTNING_DATA", "data"))


@pytest.fixture(scope="module")
def mnist() -> MNISTDataModule:
    module = MNISTDataModule(DATA, 60, 2500, 1 / 12, 0, None, download=False, test_curve=True)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.mark.skipif(
    not any((DATA / "mnist" / f"{NAMES[0]}{ending}").exists() for ending in ("", ".gz")),
    reason=f"MNIST is not in {DATA} (BN_LIGHTNING_DATA)",
)
class TestRealFiles:
    def test_counts_and_source(self, mnist: MNISTDataModule) -> None:
        info = mnist.info
        assert (info["train"], info["validation"], info["test"]) == (55_000, 5_000, 10_000)
        assert info["source"] == "mnist"
        assert info["sha256"] == MNISTDataModule.digests

    def test_pixels(self, mnist: MNISTDataModule) -> None:
        train = mnist.train_dataloader()
        validation, test = mnist.val_dataloader()
        # The published mean and deviation of the 60,000 training images on [0, 1].
        both = torch.cat([train.inputs, validation.inputs]).double()
        assert round(both.mean().item(), 4) == 0.1307
        assert round(both.std().item(), 4) == 0.3081
        assert (both.min(), both.max()) == (0, 1)
        assert test.targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
        assert torch.bincount(validation.targets).min() > 400

    def test_batches(self, mnist: MNISTDataModule) -> None:
        train = mnist.train_dataloader()
        assert len(train) == 916
        inputs, targets = next(iter(train))
        assert inputs.shape == (60, 1, 28, 28)
        assert targets.shape == (60,)
        assert [len(batches) for batches in mnist.val_dataloader()] == [2, 4]
