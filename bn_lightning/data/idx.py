"""IDX files, the format of MNIST: read whole, gzip or raw, and believed only when all agrees.

A file is a four-byte magic (0, 0, dtype code, number of dimensions D), D big-endian 32-bit sizes,
then the values, big-endian, last dimension fastest.

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
"""Bytes of the largest payload that is decompressed, five times MNIST's: a bomb ends there."""

_CHUNK = 1 << 20  # bytes
_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_REMEDY = "remove it and run again to download it anew"


def idx_payload(path: str | os.PathLike[str], digest: str | None = None) -> bytes:
    """Reads a file whole, decompressed if its first bytes say gzip, whatever its name says.

    Args:
        path: the file.
        digest: what the decompressed payload must have, as in `published.py`; `None` checks
            nothing.

    Returns:
        The decompressed payload.

    Raises:
        DataError: the gzip stream is truncated, corrupt or of more than `LARGEST` bytes, or the
            digest is another one.
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
                raise DataError(f"{path}: expected at most {LARGEST:,} bytes in gzip; {_REMEDY}")
            chunks.append(chunk)
    return b"".join(chunks)


def parse_idx(payload: bytes, path: str | os.PathLike[str]) -> np.ndarray:
    """Views the payload of an IDX file as an array.

    Args:
        payload: the decompressed file.
        path: where it came from, for the error messages.

    Returns:
        The array, in the file's dtype and shape. One-byte types are a read-only view of `payload`;
        wider ones are copied into the machine's byte order.

    Raises:
        DataError: the magic, the dtype code or the sizes do not agree with the payload.
    """
    magic = payload[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        codes = ", ".join(f"{code:#04x}" for code in _DTYPES)
        raise DataError(
            f"{path}: expected an IDX file, which begins with two zero bytes and a dtype code"
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
    # Python's integers do not overflow, so a header that lies cannot pass by wrapping around.
    expected = header + math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        kind = "truncated" if len(payload) < expected else "followed by foreign bytes"
        raise DataError(
            f"{path}: expected {expected} bytes for shape {shape} of {dtype.name},"
            f" got {len(payload)}: it is {kind}; {_REMEDY}"
        )
    array = np.frombuffer(payload, dtype, offset=header).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_idx(path: str | os.PathLike[str], digest: str | None = None) -> np.ndarray:
    """Reads an IDX file, gzip or raw.

    Args:
        path: the file.
        digest: as for `idx_payload`.

    Returns:
        The array, in the file's dtype and shape; read-only for one-byte types.

    Raises:
        DataError: the file is truncated, corrupt, not IDX, too long, or has another digest.
        OSError: the file is absent or cannot be read.
    """
    return parse_idx(idx_payload(path, digest), path)
