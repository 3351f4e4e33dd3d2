"""Downloads from mirrors that fail in every way, over loopback only."""

import gzip
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from bn_lightning.data.download import check_sha256, download_file
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.idx import idx_payload

PAYLOAD = b"what was published " * 1000
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
FILE = "file.gz"
CHECK = partial(idx_payload, digest=SHA256)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Base URL of a server with `right/`, `altered/`, `truncated/` and `raw/`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    compressed = gzip.compress(PAYLOAD)
    contents = {
        "right": compressed,
        "altered": gzip.compress(b"something else"),
        "truncated": compressed[:-20],
        "raw": PAYLOAD,
    }
    for folder, content in contents.items():
        (tmp_path / "server" / folder).mkdir(parents=True)
        (tmp_path / "server" / folder / FILE).write_bytes(content)
    handler = partial(_Quiet, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "root" / "set" / FILE


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


@pytest.mark.parametrize("first", ["absent/", "altered/", "truncated/", "refused"])
def test_the_next_mirror_is_tried(mirror: str, target: Path, first: str) -> None:
    wrong = closed_port() if first == "refused" else mirror + first
    download_file(target, [wrong, mirror + "right/"], CHECK)
    assert gzip.decompress(target.read_bytes()) == PAYLOAD
    assert os.listdir(target.parent) == [FILE], "nothing temporary is left"


def test_a_mirror_that_never_answers_is_given_up(
    mirror: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_lightning.data.download._TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        wrong = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        download_file(target, [wrong, mirror + "right/"], CHECK)
    assert target.exists()


def test_a_server_may_have_it_decompressed(mirror: str, target: Path) -> None:
    download_file(target, [mirror + "raw/"], CHECK)
    assert target.read_bytes() == PAYLOAD


def test_all_mirrors_failing_names_file_mirrors_and_options(mirror: str, target: Path) -> None:
    mirrors = [mirror + "absent/", mirror + "altered/", closed_port()]
    with pytest.raises(DataUnavailableError) as caught:
        download_file(target, mirrors, CHECK)
    causes = ("404", "not the published file", "(ConnectionError)")
    for part in (str(target), *mirrors, *causes, "put the file into"):
        assert part in str(caught.value)
    assert not target.parent.exists(), "nothing partial is left, not even the folder"


def test_a_right_file_is_kept_without_a_mirror(target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(gzip.compress(PAYLOAD))
    download_file(target, [], CHECK)


def test_a_wrong_file_is_an_error_and_stays(mirror: str, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    with pytest.raises(DataError, match=SHA256) as caught:
        download_file(target, [mirror + "right/"], CHECK)
    assert not isinstance(caught.value, DataUnavailableError)
    assert hashlib.sha256(b"mine").hexdigest() in str(caught.value)
    assert target.read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written") as caught:
        download_file(tmp_path / "root" / "set" / FILE, ["http://unused/"], CHECK)
    assert not isinstance(caught.value, DataUnavailableError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder(target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.parent.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        download_file(target, ["http://unused/"], CHECK)


def test_it_is_quiet(
    mirror: str,
    target: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        download_file(target, [mirror + "absent/", mirror + "right/"], CHECK)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_folder_that_is_there(mirror: str, target: Path) -> None:
    target.parent.mkdir(parents=True)
    download_file(target, [mirror + "right/"], CHECK)
    assert os.listdir(target.parent) == [FILE]


@pytest.mark.parametrize("wrong", ["0" * 64, "f" * 64])
def test_the_digest_of_a_file_as_it_is(target: Path, wrong: str) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(PAYLOAD)
    check_sha256(target, SHA256)
    with pytest.raises(DataError, match=rf"{wrong}, got {SHA256}"):
        check_sha256(target, wrong)
