"""An archive unpacked into a folder, whole or not at all, and nowhere else."""

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
    """Unpacks a tar archive, compressed or not, to the folder `target`.

    Where the archive holds one folder and nothing else, that folder becomes `target`. It is
    unpacked beside `target` and renamed when all of it is there: `target` is never partial, and
    processes that unpack at once do no harm. Members that would lie outside are refused, as by
    `tarfile.data_filter`, and so is all that is neither file nor folder: a link within an archive
    may still lead out of it (CVE-2025-4517), or come to when its folder is renamed.

    Args:
        archive: the file.
        target: the folder to make; where it exists nothing is done.

    Raises:
        DataError: the archive is absent, none, truncated or unsafe, or the folder of `target`
            cannot be written.
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
            f"{archive} cannot be unpacked into {target.parent} ({error.strerror}); choose another"
            " `data.root`"
        ) from error
    with folder as temporary:
        # One folder deeper, so that what is renamed is as readable as any new folder.
        whole = Path(temporary) / "whole"
        try:
            with tarfile.open(archive, _mode(archive)) as tar:
                tar.extractall(whole, filter=_files_and_folders)
        except (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError) as error:
            raise DataError(
                f"{archive}: expected a whole tar archive that stays in its folder, got: {error};"
                " get it again, or unpack it yourself"
            ) from error
        if not whole.exists():
            raise DataError(f"{archive}: expected a tar archive with files, got an empty one")
        entries = list(whole.iterdir())
        if len(entries) == 1 and entries[0].is_dir():
            whole = entries[0]
        try:
            whole.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same files
                raise


def _files_and_folders(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, path)


def _mode(archive: Path) -> Literal["r:", "r:gz", "r:bz2", "r:xz"]:
    # tarfile would try the format before xz, too, of which any bytes can ask for gigabytes.
    with open(archive, "rb") as file:
        start = file.read(6)
    return next((mode for magic, mode in _COMPRESSIONS.items() if start.startswith(magic)), "r:")
