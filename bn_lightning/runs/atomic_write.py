"""Files that are whole or not there: a reader sees the old one or the new one."""

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

UNFINISHED = ".part"
"""How the name of a file ends that is not whole yet; it begins with a dot."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step; numbers that JSON lacks, NaN and infinities, become null."""
    write_atomically(path, json.dumps(finite(content), indent=2, default=str) + "\n")


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace `path` by a file with this content: a reader sees the old one or the new one, whole.

    Raises:
        OSError: it names `path`, whatever the system refused.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the user's eyes only; a run's are as readable as its directory's.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # gone with its folder
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` was writing in a folder when its process was killed.

    Nobody may be writing there.
    """
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink()


def finite(content: Any) -> Any:
    """Plain data with None in place of the numbers that JSON lacks, NaN and infinities."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
