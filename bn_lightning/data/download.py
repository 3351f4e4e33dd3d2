"""One file from the first of several mirrors that has it right, put in place in one step."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pooch

from bn_lightning.data.errors import DataError, DataUnavailableError

_TIMEOUT = 10.0  # seconds to connect, and between two chunks: an offline machine learns it soon
_CHUNK = 1 << 16  # bytes


def download(
    target: Path,
    mirrors: Sequence[str],
    digest: str,
    check: Callable[[Path, str], object],
) -> None:
    """Downloads `target` unless it is there, and checks it in either case.

    The file is written into a temporary folder beside `target`, checked, flushed to disk and only
    then renamed: `target` is never partial, and processes that download at once do no harm.

    Args:
        target: where the file belongs; its name is also its name on the mirrors.
        mirrors: base URLs ending in a slash, tried in this order.
        digest: of the file, as `check` takes it.
        check: called with a file and `digest`; raises `DataError` where they do not agree, as
            `check_sha256` does, and `idx_payload` for the decompressed payload.

    Raises:
        DataError: `target` is there with another digest (it is left as it is), or its folder
            cannot be written.
        DataUnavailableError: no mirror gave the right file.
    """
    if target.exists():
        check(target, digest)
        return
    new_folders = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent)
    except OSError as error:
        raise DataError(
            f"{target} is absent and its folder cannot be written ({error.strerror});"
            " choose another `data.root`, or place the file there yourself"
        ) from error
    fetch = pooch.HTTPDownloader(timeout=_TIMEOUT, chunk_size=_CHUNK)
    failures = []
    with folder as temporary:
        part = Path(temporary) / target.name
        for mirror in mirrors:
            url = mirror + target.name
            try:
                fetch(url, str(part), None)
                check(part, digest)
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                part.replace(target)
                return
            # requests' errors are OSErrors; a wrong payload is a DataError. Both: the next mirror.
            except (OSError, DataError) as error:
                failures.append(f"{url} ({_cause(error)})")
    for path in new_folders:
        with contextlib.suppress(OSError):  # not empty: another process has put something there
            path.rmdir()
    raise DataUnavailableError(
        f"{target} is absent and no mirror gave it: {'; '.join(failures)}."
        f" Connect to the network and run again, or place the file into {target.parent} yourself"
    )


def check_sha256(path: Path, sha256: str) -> None:
    """Refuses a file of other contents than were published, as they are, compressed or not.

    Args:
        path: the file.
        sha256: hexadecimal SHA-256 of the whole file.

    Raises:
        DataError: the file has another digest.
        OSError: the file is absent or cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise DataError(
            f"{path}: expected SHA-256 {sha256}, got {digest} ({path.stat().st_size:,} bytes);"
            " remove it and run again to download it anew"
        )


def _cause(error: OSError | DataError) -> str:
    """A word or two: the full text of a network error repeats the URL within nested exceptions."""
    if isinstance(error, DataError):
        return "the file it gave is not the published one"
    if (response := getattr(error, "response", None)) is not None:
        return f"HTTP status {response.status_code}"
    return error.strerror or type(error).__name__
