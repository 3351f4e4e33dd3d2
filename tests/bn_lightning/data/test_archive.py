"""Archives that unpack, and those that would do harm."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from bn_lightning.data.archive import unpack
from bn_lightning.data.errors import DataError


def write(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("prefix", ["", "set/"], ids=["bare", "one_folder"])
def test_whole(tmp_path: Path, mode: str, prefix: str) -> None:
    members = {f"{prefix}train/a": b"1", f"{prefix}val/b": b"2"}
    target = tmp_path / "root" / "set"
    unpack(write(tmp_path / "set.tar", members, mode), target)
    assert (target / "train" / "a").read_bytes() == b"1"
    assert (target / "val" / "b").read_bytes() == b"2"
    assert os.listdir(target.parent) == ["set"]
    assert target.stat().st_mode & 0o777 == (tmp_path / "root").stat().st_mode & 0o777


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    unpack(tmp_path / "absent.tar", tmp_path / "set")
    assert os.listdir(tmp_path / "set") == []


def link(name: str, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, to
    return info


def hard_link(name: str, to: str) -> tarfile.TarInfo:
    info = link(name, to)
    info.type = tarfile.LNKTYPE
    return info


def device(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


@pytest.mark.parametrize(
    "members",
    [
        {"a": b"1", "../../outside": b"2"},
        {"a": b"1", "link": link("link", "../../.."), "link/outside": b"2"},
        {"a": b"1", "link": link("link", "/etc/passwd")},
        {"a": b"1", "null": device("null")},
        {"set/a": b"1", "set/up": link("set/up", "..")},
        {"only": link("only", ".")},
        {"a": b"1", "b": link("b", "a")},
        {"a": b"1", "b": hard_link("b", "a")},
    ],
    ids=[
        *("parent", "through_link", "absolute_link", "device"),
        *("out_once_renamed", "the_root_itself", "within", "hard"),
    ],
)
def test_nothing_is_written_outside(tmp_path: Path, members: dict) -> None:
    root = tmp_path / "root"
    archive = write(tmp_path / "set.tar.gz", members)
    with pytest.raises(DataError, match=r"set\.tar\.gz: expected a whole tar archive"):
        unpack(archive, root / "set")
    assert os.listdir(root) == []
    assert sorted(os.listdir(tmp_path)) == ["root", "set.tar.gz"]


@pytest.mark.parametrize("kind", ["truncated", "text", "absent"])
def test_what_is_no_archive(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "set.tar.gz"
    if kind == "truncated":
        whole = write(archive, {"a": os.urandom(50_000)}).read_bytes()
        archive.write_bytes(whole[:30_000])
    elif kind == "text":
        archive.write_text("not here")
    with pytest.raises(DataError, match=r"set\.tar\.gz: expected a (whole )?tar archive"):
        unpack(archive, tmp_path / "root" / "set")
    assert not (tmp_path / "root" / "set").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DataError, match="`data.root`"):
        unpack(write(tmp_path / "set.tar", {"a": b"1"}), tmp_path / "root" / "set")


@pytest.mark.parametrize("faster", [False, True], ids=["error", "another_process"])
def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    target = tmp_path / "root" / "set"

    def rename(self: Path, to: Path) -> Path:
        if faster:
            to.mkdir()
        raise OSError("refused")

    monkeypatch.setattr(Path, "rename", rename)
    archive = write(tmp_path / "set.tar", {"a": b"1", "b": b"2"})
    if faster:
        unpack(archive, target)
    else:
        with pytest.raises(OSError, match="refused"):
            unpack(archive, target)
    assert os.listdir(target.parent) == (["set"] if faster else [])


def test_a_single_file_is_no_folder(tmp_path: Path) -> None:
    unpack(write(tmp_path / "set.tar", {"a": b"1"}), tmp_path / "root" / "set")
    assert (tmp_path / "root" / "set" / "a").read_bytes() == b"1"
    unpack(write(tmp_path / "two.tar", {"d/a": b"1", "b": b"2"}), tmp_path / "root" / "two")
    assert sorted(os.listdir(tmp_path / "root" / "two")) == ["b", "d"]


def test_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a tar archive with files"):
        unpack(write(tmp_path / "set.tar", {}), tmp_path / "set")


def test_a_folder_two_below_what_there_is(tmp_path: Path) -> None:
    target = tmp_path / "no" / "such" / "set"
    unpack(write(tmp_path / "set.tar", {"a": b"1"}), target)
    assert os.listdir(target) == ["a"]
