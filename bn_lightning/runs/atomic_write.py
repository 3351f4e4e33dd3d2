"""Replace files in one step: a reader sees the old file or the new one, never a part."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

UNFINISHED = ".part"
"""The end of the name of a file that is being written; the name begins with a dot."""


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by a JSON file; NaN and infinities, which JSON lacks, become null."""
    write_atomically(path, json.dumps(json_values(content), indent=2, default=str) + "\n")


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace `path` by a file with this content, in one step and flushed to the disk.

    Raises:
        OSError: the file cannot be written; the error names `path`, and the old file is whole.
    """
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.urandom(4).hex()}{UNFINISHED}")
    is_made = False
    try:
        with open(unfinished, "xb") as file:
            is_made = True
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        if is_made:
            with contextlib.suppress(OSError):  # the folder may be gone
                os.unlink(unfinished)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove the files that killed processes left half-written in a folder.

    No process may be writing there.
    """
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink()


def json_values(content: Any) -> Any:
    """Return plain data with None instead of NaN and infinities, which JSON lacks."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: json_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [json_values(value) for value in content]
    return content
