"""Unpacking a tar archive, completely or not at all.

pooch's `Untar` unpacks in place and accepts links, so it is not used here.
"""

import os
import tarfile
import tempfile
import zlib
from lzma import LZMAError
from pathlib import Path
from typing import Literal

from bn_lightning.data.errors import DataError

_COMPRESSIONS: dict[bytes, Literal["r:gz", "r:bz2", "r:xz"]] = {
    b"\x1f\x8b": "r:gz",
    b"BZh": "r:bz2",
    b"\xfd7zXZ\0": "r:xz",
}


def unpack(archive: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Unpack a tar archive, compressed or not, to the folder `target`.

    If the archive contains a single folder and nothing else, that folder becomes `target`. The
    archive is unpacked beside `target` and then renamed, so that `target` is never incomplete and
    several processes may unpack at once. Members outside of `target` are refused, as by
    `tarfile.data_filter`, and also everything but files and folders: a link within an archive may
    still lead out of it (CVE-2025-4517), or do so after the rename.

    Args:
        archive: the file.
        target: the folder to create; if it exists, nothing happens.

    Raises:
        DataError: the archive is absent, truncated, unsafe or no archive, or the folder of
            `target` cannot be written.
    """
    archive, target = Path(archive), Path(target)
    if target.exists():
        return
    if not archive.is_file():
        raise DataError(f"{archive}: expected a tar archive, got no such file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise DataError(
            f"expected to unpack {archive} into {target.parent}, got {error.strerror}; set another"
            " `data.root`"
        ) from error
    with folder as temporary:
        # Not `temporary` itself, which only its owner may read.
        whole = Path(temporary) / "whole"
        try:
            with tarfile.open(archive, _mode(archive)) as tar:
                tar.extractall(whole, filter=_files_and_folders)
        except (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError) as error:
            raise DataError(
                f"{archive}: expected a whole tar archive without links or paths that leave its"
                f" folder, got: {error}; download it again, or unpack it yourself"
            ) from error
        if not whole.exists():
            raise DataError(f"{archive}: expected a tar archive with files, got none")
        entries = list(whole.iterdir())
        if len(entries) == 1 and entries[0].is_dir():
            whole = entries[0]
        try:
            whole.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise


def _files_and_folders(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, path)


def _mode(archive: Path) -> Literal["r:", "r:gz", "r:bz2", "r:xz"]:
    # Without a mode, tarfile also tries LZMA alone, whose header can demand gigabytes of memory.
    with open(archive, "rb") as file:
        start = file.read(6)
    return next((mode for magic, mode in _COMPRESSIONS.items() if start.startswith(magic)), "r:")
