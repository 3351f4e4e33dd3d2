"""Files whole or not at all, and JSON of any number."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from bn_lightning.runs.atomic_write import write_atomically, write_json


class TestJson:
    def test_numbers_that_json_lacks_become_null(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_json(path, {"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)], "c": {"d": math.nan}})

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        content = json.loads(path.read_text(), parse_constant=refuse)
        assert content == {"a": None, "b": [None, 1.5, [None]], "c": {"d": None}}

    def test_what_json_does_not_know_becomes_its_text(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"path": Path("runs/1")})
        assert json.loads((tmp_path / "a.json").read_text()) == {"path": "runs/1"}

    def test_letters_of_any_alphabet(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", "größer ≥ 1")
        assert json.loads((tmp_path / "a.json").read_bytes()) == "größer ≥ 1"


class TestAtomically:
    @pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
    def test_a_write_that_fails_leaves_the_old_file_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "run.json"
        write_atomically(path, "old")

        def fail(*_: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(step, fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert [child.name for child in tmp_path.iterdir()] == ["run.json"]

    def test_text_that_cannot_be_encoded(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a", "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(tmp_path / "a", "new \ud800")
        assert (tmp_path / "a").read_text() == "old"
        assert [child.name for child in tmp_path.iterdir()] == ["a"]

    def test_a_reader_never_sees_half(self, tmp_path: Path) -> None:
        """Whoever has the old file open goes on reading the old one."""
        path = tmp_path / "a"
        write_atomically(path, "old " * 1000)
        with open(path) as reader:
            start = reader.read(10)
            write_atomically(path, "new")
            assert start + reader.read() == "old " * 1000
        assert path.read_text() == "new"

    @pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
    def test_it_is_as_readable_as_any_new_file(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "ours", "text")
            (tmp_path / "pythons").write_text("text")
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "pythons")]
        assert modes[0] == modes[1]

    def test_line_ends_are_kept(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a", "one\ntwo\r\n")
        assert (tmp_path / "a").read_bytes() == b"one\ntwo\r\n"
