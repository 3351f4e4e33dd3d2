"""IDX files, the format of MNIST, raw or gzip.

A file has a four-byte magic (0, 0, dtype code, number of dimensions D), D big-endian 32-bit sizes,
then the values, big-endian, in row-major order.

Source: http://yann.lecun.com/exdb/mnist/, "The IDX file format".
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from bn_lightning.data.errors import DataError
from bn_lightning.data.published import mismatch

LARGEST = 1 << 28
"""Largest size of a decompressed payload, bytes: five times MNIST's."""

_CHUNK = 1 << 20  # bytes
_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_REMEDY = "remove it and run again to download it"


def idx_payload(path: str | os.PathLike[str], digest: str | None = None) -> bytes:
    """Read a whole file, and decompress it if its first bytes, not its name, say gzip.

    Args:
        path: the file.
        digest: of the decompressed payload, as in `published.py`; None skips the check.

    Returns:
        The decompressed payload.

    Raises:
        DataError: the gzip stream is truncated, corrupt or larger than `LARGEST`, or the digest
            differs.
        OSError: the file is absent or cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    try:
        payload = _decompressed(path) if compressed else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file, got: {error}; {_REMEDY}") from error
    if digest is not None and (wrong := mismatch(payload, digest)):
        raise DataError(f"{path}: {wrong}; {_REMEDY}")
    return payload


def _decompressed(path: Path) -> bytes:
    chunks, size = [], 0
    with gzip.open(path) as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > LARGEST:
                raise DataError(
                    f"{path}: expected at most {LARGEST:,} bytes in gzip, got more; {_REMEDY}"
                )
            chunks.append(chunk)
    return b"".join(chunks)


def parse_idx(payload: bytes, path: str | os.PathLike[str]) -> np.ndarray:
    """View the payload of an IDX file as an array.

    Args:
        payload: the decompressed file.
        path: of the file, for error messages.

    Returns:
        The array, in the file's dtype and shape. One-byte types are a read-only view of `payload`;
        others are copied into the native byte order.

    Raises:
        DataError: the magic, the dtype code or the sizes do not match the payload.
    """
    magic = payload[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        codes = ", ".join(f"{code:#04x}" for code in _DTYPES)
        raise DataError(
            f"{path}: expected an IDX file, which starts with two zero bytes and a dtype code"
            f" ({codes}), got the bytes {magic.hex(' ') or 'of an empty file'}; {_REMEDY}"
        )
    dtype, dimensions = np.dtype(_DTYPES[magic[2]]), magic[3]
    header = 4 + 4 * dimensions
    if len(payload) < header:
        raise DataError(
            f"{path}: expected an IDX header of {header} bytes for {dimensions} dimensions,"
            f" got a file of {len(payload)} bytes; {_REMEDY}"
        )
    shape = struct.unpack(f">{dimensions}I", payload[4:header])
    # Python's integers do not overflow, so wrong sizes cannot wrap around.
    expected = header + math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise DataError(
            f"{path}: expected {expected} bytes for shape {shape} of {dtype.name},"
            f" got {len(payload)}; {_REMEDY}"
        )
    array = np.frombuffer(payload, dtype, offset=header).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)
