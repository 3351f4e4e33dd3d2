"""One file from the first of several mirrors that has it right, put in place in one step."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pooch

from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.idx import idx_payload

_TIMEOUT = 10.0  # seconds to connect, and between two chunks: an offline machine learns it soon
_CHUNK = 1 << 16  # bytes


def download(target: Path, mirrors: Sequence[str], digest: str, timeout: float = _TIMEOUT) -> None:
    """Downloads `target` unless it is there, and checks it in either case.

    The file is written into a temporary folder beside `target`, checked, flushed to disk and only
    then renamed: `target` is never partial, and processes that download at once do no harm.

    Args:
        target: where the file belongs; its name is also its name on the mirrors.
        mirrors: base URLs ending in a slash, tried in this order.
        digest: of the file's decompressed payload, as in `published.py`.
        timeout: seconds to wait for a connection and for each chunk of data.

    Raises:
        DataError: `target` is there with another digest (it is left as it is), or its folder
            cannot be written.
        DataUnavailableError: no mirror gave the right file.
    """
    if target.exists():
        idx_payload(target, digest)
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
    fetch = pooch.HTTPDownloader(timeout=timeout, chunk_size=_CHUNK)
    failures = []
    with folder as temporary:
        part = Path(temporary) / target.name
        for mirror in mirrors:
            url = mirror + target.name
            try:
                fetch(url, str(part), None)
                idx_payload(part, digest)
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


def _cause(error: OSError | DataError) -> str:
    """A word or two: the full text of a network error repeats the URL within nested exceptions."""
    if isinstance(error, DataError):
        return "the file it gave is not the published one"
    if (response := getattr(error, "response", None)) is not None:
        return f"HTTP status {response.status_code}"
    return error.strerror or type(error).__name__
