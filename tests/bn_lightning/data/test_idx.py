"""IDX files: what is read, and all that is refused."""

import gzip
import hashlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bn_lightning.data.errors import DataError
from bn_lightning.data.idx import idx_payload, parse_idx


def read_idx(path: Path, digest: str | None = None) -> np.ndarray:
    return parse_idx(idx_payload(path, digest), path)


VALUES = np.arange(24).reshape(2, 3, 4)


def idx_bytes(array: np.ndarray, code: int = 0x08, dtype: str = ">u1") -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(dtype).tobytes()


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")],
)
def test_every_dtype_of_the_format(tmp_path: Path, code: int, dtype: str) -> None:
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(VALUES, code, dtype))
    array = read_idx(path)
    np.testing.assert_array_equal(array, VALUES)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    assert array.dtype.isnative


@pytest.mark.parametrize("name", ["values", "values.gz"])
@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gzip"])
def test_the_content_says_whether_it_is_gzip(tmp_path: Path, name: str, compress: bool) -> None:
    payload = idx_bytes(VALUES)
    path = tmp_path / name
    path.write_bytes(gzip.compress(payload) if compress else payload)
    np.testing.assert_array_equal(read_idx(path, hashlib.sha256(payload).hexdigest()), VALUES)


def test_no_dimensions_and_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(np.array(7)))
    assert read_idx(path).shape == ()
    path.write_bytes(idx_bytes(np.empty((0, 28, 28))))
    assert read_idx(path).shape == (0, 28, 28)


WHOLE = idx_bytes(VALUES)
WRONG = {
    "empty": (b"", "bytes of an empty file"),
    "three_bytes": (WHOLE[:3], "00 00 08"),
    "truncated_header": (WHOLE[:10], "header of 16 bytes.*file of 10 bytes"),
    "truncated_raw": (WHOLE[:-1], r"expected 40 bytes for shape \(2, 3, 4\).*got 39"),
    "trailing_byte": (WHOLE + b"\0", "expected 40 bytes.*got 41"),
    "not_idx": (b"<html>404</html>", "3c 68 74 6d"),
    "first_byte": (b"\x01" + WHOLE[1:], "01 00 08 03"),
    "second_byte": (b"\0\x01" + WHOLE[2:], "00 01 08 03;"),
    "unknown_dtype": (b"\0\0\x0a" + WHOLE[3:], "00 00 0a 03"),
    "truncated_gzip": (gzip.compress(WHOLE)[:-9], "whole gzip file"),
    "gzip_header_alone": (gzip.compress(WHOLE)[:5], "whole gzip file"),
    "corrupt_gzip": (gzip.compress(WHOLE)[:-8] + b"\0" * 8, "CRC"),
    "foreign_bytes_after_gzip": (gzip.compress(WHOLE) + b"more", "whole gzip file"),
    "gzip_of_truncated": (gzip.compress(WHOLE[:-1]), "expected 40 bytes.*got 39"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files_are_named_and_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lie"
    # 2^32 - 1 in each of 8 dimensions: 2^256 elements, which also overflow any machine integer.
    path.write_bytes(bytes([0, 0, 0x0E, 8]) + b"\xff" * 32 + b"few")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected"):
            read_idx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # bytes


def test_a_wrong_digest_names_both(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(WHOLE)
    with pytest.raises(DataError, match="0" * 64) as caught:
        idx_payload(path, "0" * 64)
    assert hashlib.sha256(WHOLE).hexdigest() in str(caught.value)


def test_an_absent_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_idx(tmp_path / "absent")
