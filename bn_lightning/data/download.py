"""Checked downloads from one of several mirrors, with pooch."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pooch
import requests

from bn_lightning.data.errors import DataError, DataUnavailableError

_TIMEOUT = 10.0  # seconds to connect, and between two chunks


def download_file(target: Path, mirrors: Sequence[str], check: Callable[[Path], object]) -> None:
    """Download a file from the first mirror that has the right one, unless it exists.

    An existing file is checked, too, and never changed. pooch downloads into a temporary file in
    the same folder and renames it after the check, so that `target` is never incomplete and
    several processes may download at once.

    Args:
        target: the file; it has the same name on the mirrors.
        mirrors: base URLs ending in a slash, in order of preference.
        check: called with a file; raises `DataError` if it is not the right one.

    Raises:
        DataError: `target` exists but is not the right file, or its folder cannot be written.
        DataUnavailableError: no mirror has the right file.
    """
    if target.exists():
        check(target)
        return

    def fetch(url: str, path: str, _: object) -> None:
        # pooch's temporary file is readable by its owner alone; a new one obeys the umask.
        Path(path).unlink()
        pooch.HTTPDownloader(timeout=_TIMEOUT, chunk_size=1 << 16)(url, path, None)
        check(Path(path))

    pooch.get_logger().setLevel("WARNING")
    new_folders = [folder for folder in target.parents if not folder.exists()]
    failures = []
    for mirror in mirrors:
        url = mirror + target.name
        try:
            pooch.retrieve(url, None, target.name, target.parent, downloader=fetch)
            return
        except requests.RequestException as error:
            # The text of the error repeats the URL in nested exceptions.
            status = getattr(error.response, "status_code", None)
            failures.append(f"{url} ({f'HTTP {status}' if status else type(error).__name__})")
        except DataError:
            failures.append(f"{url} (not the published file)")
        except OSError as error:
            raise DataError(
                f"expected {target}, got no such file, and its folder cannot be written"
                f" ({error.strerror or error}); set another `data.root`, or put the file there"
            ) from error
    for folder in new_folders:
        with contextlib.suppress(OSError):  # not empty: another process has written into it
            folder.rmdir()
    raise DataUnavailableError(
        f"expected {target}, got no such file, and no mirror has it: {'; '.join(failures)};"
        f" connect to the network and run again, or put the file into {target.parent}"
    )


def check_sha256(path: Path, sha256: str) -> None:
    """Raise an error if a file does not have this hexadecimal SHA-256.

    Raises:
        DataError: the file has another digest.
        OSError: the file is absent or cannot be read.
    """
    digest = pooch.file_hash(path)
    if digest != sha256:
        raise DataError(
            f"{path}: expected sha256 {sha256}, got {digest} ({path.stat().st_size:,} bytes);"
            " remove it and run again to download it"
        )
