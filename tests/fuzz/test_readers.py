"""Files that are cut, changed or random: every reader says what is wrong, in its own words.

Memory is what Python and NumPy allocate at once; Pillow and torch allocate beside them, and what
they read is bounded by its own header.
"""

import gzip
import io
import os
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bn_lightning.data.archive import unpack
from bn_lightning.data.cifar10 import read_records
from bn_lightning.data.csv_table import parse_csv
from bn_lightning.data.errors import DataError
from bn_lightning.data.idx import LARGEST, idx_payload, parse_idx
from bn_lightning.data.image_file import ImageFileError, read_image
from bn_lightning.runs.checkpoint import CheckpointError, load_checkpoint, trusted_config
from bn_lightning.runs.trust import UntrustedError
from bn_lightning.sweeps.report.write_report import ReportOptions, write_report

COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    with open(os.environ.get("FUZZ_COUNTS", os.devnull), "a") as file:
        file.write(f"readers: {sum(COUNTS.values()):,}, {dict(sorted(COUNTS.items()))}\n")


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that was cut off, or of which some bytes were changed, taken out or put in."""
    content = bytearray(whole)
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(content)


def tar(mode: str, members: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def image(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def checkpoint() -> bytes:
    buffer = io.BytesIO()
    config = {"data": {"_target_": "bn_lightning.data.DigitsDataModule"}, "model": {}}
    content = {"state_dict": {"a": torch.ones(2, 3)}, "global_step": 7}
    torch.save(content | {"hyper_parameters": {"config": config}}, buffer)
    return buffer.getvalue()


def read_table(path: Path) -> object:
    return parse_csv(path.read_bytes(), ["a", "b"], "c", path)


def read_config(path: Path) -> object:
    return trusted_config(load_checkpoint(path), [], str(path))


def extract(path: Path) -> None:
    """Into a folder of its own, beside which nothing may appear."""
    root = path.parent / "root"
    try:
        unpack(path, root / "set")
    finally:
        assert set(os.listdir(path.parent)) <= {path.name, "root"}
        assert not root.exists() or set(os.listdir(root)) <= {"set"}
        for folder, names, files in os.walk(root, topdown=False):
            for name in names + files:
                here = os.path.join(folder, name)
                assert os.path.realpath(here).startswith(os.path.realpath(root))
                if os.path.islink(here) or not os.path.isdir(here):
                    os.unlink(here)
                else:
                    os.rmdir(here)
        if root.exists():
            root.rmdir()


IDX = b"\0\0\x08\x02" + bytes([0, 0, 0, 6, 0, 0, 0, 5]) + bytes(range(30))
CSV = b"a,b,c\n" + b"".join(b"%d,%d.5,%s\n" % (i, i, b"yn"[i % 2 :][:1]) for i in range(20))
LINKS = {
    "a": b"1",
    "link": (tarfile.SYMTYPE, "a"),
    "hard": (tarfile.LNKTYPE, "a"),
    "out": (tarfile.SYMTYPE, "../a"),
    "/absolute": b"2",
}
Reader = tuple[Callable[[Path], object], list[bytes], tuple[type[Exception], ...]]
READERS: dict[str, Reader] = {
    "idx": (
        lambda path: parse_idx(idx_payload(path), path),
        [IDX, gzip.compress(IDX)],
        (DataError,),
    ),
    "cifar10": (read_records, [bytes(3073)], (DataError,)),
    "csv": (read_table, [CSV], (DataError,)),
    "image": (
        read_image,
        [image("PNG"), image("JPEG"), image("BMP"), image("GIF"), image("PPM"), image("TIFF")]
        + [image("WEBP"), image("PNG", "P"), image("PNG", "RGBA"), image("TIFF", "CMYK")],
        (ImageFileError,),
    ),
    "tar": (
        extract,
        [tar(mode, {"set/a": b"1" * 600, "set/b": b"2"}) for mode in ("w", "w:gz", "w:xz", "w:bz2")]
        + [tar("w", LINKS), bytes([0, 0, 0, 0, 0x7F]) + bytes(10235)],  # as lzma, 2 GiB
        (DataError,),
    ),
    "checkpoint": (
        read_config,
        [checkpoint(), b"X\0\0\0\x7f"],  # the latter a pickle that asks for 2 GiB
        (CheckpointError, UntrustedError),
    ),
}


# Of torch, about pickles that it does not write itself; of optuna, about journals.
@pytest.mark.filterwarnings("ignore")
class TestReaders:
    @pytest.mark.parametrize("kind", READERS)
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.data())
    def test_damaged(self, tmp_path_factory: Any, kind: str, data: st.DataObject) -> None:
        check(tmp_path_factory, kind, data)

    @pytest.mark.soak
    @pytest.mark.parametrize("kind", READERS)
    @settings(max_examples=5000, deadline=None)
    @given(st.data())
    def test_damaged_often(self, tmp_path_factory: Any, kind: str, data: st.DataObject) -> None:
        check(tmp_path_factory, kind, data)


ALLOWANCE = 2 << 20  # bytes, of what a reader needs for any file
DICTIONARY = 8 << 20  # bytes, that an xz archive asks for, written with the usual settings


def check(tmp_path_factory: Any, kind: str, data: st.DataObject) -> None:
    read, whole, errors = READERS[kind]
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    folder.mkdir(exist_ok=True)
    path = folder / "file"
    content = data.draw(st.sampled_from(whole).flatmap(damaged) | st.binary(max_size=200))
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read(path)
        COUNTS[f"{kind}: read"] += 1
    except errors as error:
        assert str(error)
        COUNTS[f"{kind}: refused"] += 1
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 4 * len(content) + ALLOWANCE + DICTIONARY * (content[1:5] == b"7zXZ")
    assert path.read_bytes() == content


def peak_of(read: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


class TestBombs:
    @pytest.mark.parametrize("members", [1, 3])
    def test_gzip(self, tmp_path: Path, members: int) -> None:
        """Of zeros, in one member or in several."""
        path = tmp_path / "images.gz"
        path.write_bytes(gzip.compress(bytes(LARGEST // members + 1), 1) * members)

        def read() -> None:
            with pytest.raises(DataError, match=f"at most {LARGEST:,} bytes"):
                idx_payload(path)

        assert peak_of(read) <= 4 * path.stat().st_size + LARGEST + ALLOWANCE


@pytest.fixture
def sweep(tmp_path: Path, make_study: Callable[..., Path]) -> dict[str, bytes]:
    """The files of a report of few trials, and of its journal."""
    space = {"optimizer.lr": [0.1, 1.0], "norm": ["none", "batch"]}
    folder = make_study(tmp_path / "made", space=space)
    write_report([str(folder)])
    names = ("journal.log", "trials.csv", "summary.json")
    return {name: (folder / name).read_bytes() for name in names}


REPORTED = {
    "journal": ("journal.log",),
    "table": ("trials.csv", "summary.json"),
    "summary": ("summary.json", "trials.csv"),
    "run": ("run.json", "metrics.csv"),
    "metrics": ("metrics.csv", "run.json"),
}


def check_report(folder: Path, files: dict[str, bytes], kind: str, data: st.DataObject) -> None:
    """The first of the files is damaged."""
    folder.mkdir(exist_ok=True)
    first, *others = REPORTED[kind]
    for name in others:
        (folder / name).write_bytes(files[name])
    (folder / first).write_bytes(data.draw(damaged(files[first])))
    try:
        write_report([str(folder)], ReportOptions(folder / "out"))
        COUNTS[f"report of {kind}: read"] += 1
    except ValueError as error:
        assert str(error)
        COUNTS[f"report of {kind}: refused"] += 1


QUICK = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REPORTED)
class TestReport:
    @pytest.fixture
    def files(
        self, tmp_path: Path, sweep: Any, make_run: Any, monkeypatch: Any
    ) -> dict[str, bytes]:
        # Pictures cost seconds, and are drawn of what was read.
        monkeypatch.setattr(f"{write_report.__module__}.save", lambda *_: None)
        run = make_run(tmp_path / "run", {"_target_": "x"})
        return sweep | {name: (run / name).read_bytes() for name in REPORTED["run"]}

    @pytest.mark.slow
    @settings(max_examples=8, derandomize=True, **QUICK)
    @given(data=st.data())
    def test_damaged(self, tmp_path: Path, files: Any, kind: str, data: st.DataObject) -> None:
        check_report(tmp_path / "damaged", files, kind, data)

    @pytest.mark.soak
    @settings(max_examples=400, **QUICK)
    @given(data=st.data())
    def test_often(self, tmp_path: Path, files: Any, kind: str, data: st.DataObject) -> None:
        check_report(tmp_path / "damaged", files, kind, data)
