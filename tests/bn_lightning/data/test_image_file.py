"""One image file, in every mode that Pillow reads, and what is none."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bn_lightning.data.errors import DataError
from bn_lightning.data.image_file import MAX_PIXELS, ImageFileError, read_image

RED = (200, 30, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def solid(mode: str, colour: object, size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette() -> Image.Image:
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def grey16(kind: str, value: int = 0x8000) -> bytes:
    return encoded(Image.fromarray(np.full((4, 5), value, np.uint16)), kind)


@pytest.fixture
def read(tmp_path: Path):
    def read(payload: bytes) -> np.ndarray:
        path = tmp_path / "image.jpg"  # what a name says is not asked
        path.write_bytes(payload)
        image = read_image(path)
        assert image.mode == "RGB"
        return np.asarray(image)

    return read


@pytest.mark.parametrize(
    ("payload", "colour"),
    [
        (encoded(solid("RGB", RED)), RED),
        (encoded(solid("L", 77)), (77, 77, 77)),
        (encoded(solid("1", 1)), (255, 255, 255)),
        (encoded(palette()), RED),
        (encoded(palette(), transparency=1), (255, 255, 255)),
        (encoded(solid("RGB", RED), transparency=RED), (255, 255, 255)),
        (encoded(solid("RGBA", (*RED, 255))), RED),
        (encoded(solid("RGBA", (*RED, 0))), (255, 255, 255)),
        (encoded(solid("LA", (77, 255))), (77, 77, 77)),
        (encoded(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (grey16("PNG"), (128, 128, 128)),
        (grey16("TIFF"), (128, 128, 128)),
        (grey16("PNG", 65535), (255, 255, 255)),
        (grey16("PNG", 128), (0, 0, 0)),  # half of an 8-bit step: rounded, not cut
        (grey16("PNG", 32767), (127, 127, 127)),  # 127.498
        (grey16("PNG", 33025), (129, 129, 129)),  # 128.502
        (encoded(Image.fromarray(np.full((4, 5), 65535, np.int32)), "TIFF"), (255, 255, 255)),
        (encoded(Image.fromarray(np.zeros((4, 5), np.int32)), "TIFF"), (0, 0, 0)),
        (encoded(solid("RGB", RED), "WEBP", lossless=True), RED),
        (encoded(solid("RGB", RED), "BMP"), RED),
        (encoded(solid("RGB", RED), "TIFF"), RED),
        (encoded(palette(), "GIF"), RED),
    ],
    ids=[
        "rgb",
        "grey",
        "bilevel",
        "palette",
        "transparent_palette",
        "transparent_colour",
        "rgba",
        "transparent",
        "grey_alpha",
        "cmyk",
        "grey16_png",
        "grey16_tiff",
        "white16",
        "dark16",
        "below_half16",
        "above_half16",
        "white32",
        "black32",
        "webp",
        "bmp",
        "tiff",
        "gif",
    ],
)
def test_modes_become_rgb(read, payload: bytes, colour: tuple[int, int, int]) -> None:
    pixels = read(payload)
    assert pixels.shape == (4, 5, 3)
    assert (pixels == colour).all(), pixels[0, 0]


def test_cmyk_jpeg(read) -> None:
    pixels = read(encoded(solid("CMYK", (0, 255, 255, 0), (16, 16)), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(read, orientation: int) -> None:
    """One bright corner, top left when upright, wherever the camera put it."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255
    T = Image.Transpose
    stored = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }
    image = Image.fromarray(upright)
    if orientation in stored:
        image = image.transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read(encoded(image, "JPEG", quality=95, exif=exif))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() < 30


def test_broken_exif_is_no_broken_image(read) -> None:
    payload = encoded(solid("RGB", RED, (16, 16)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read(payload).shape == (16, 16, 3)


def test_one_pixel(read) -> None:
    assert (read(encoded(solid("RGB", RED, (1, 1)))) == RED).all()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than anybody should decode."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    chunks = b""
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        chunks += struct.pack(">I", len(content)) + kind + content + check
    return b"\x89PNG\r\n\x1a\n" + chunks


WHOLE = encoded(
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype="u1"))
)
JPEG = encoded(Image.open(io.BytesIO(WHOLE)), "JPEG")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "expected an image .*got an empty file"),
        (b"<html>not here</html>", "bytes 3c 68 74 6d 6c 3e 6e 6f;"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected an image"),
        (WHOLE[: len(WHOLE) // 2], "cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded: image file is truncated"),
        (WHOLE[:500] + b"\0" * 200 + WHOLE[700:], "cannot be decoded"),
        (bomb(30_000, 30_000), f"at most {MAX_PIXELS:,} pixels, got more: .*900000000"),
        (bomb(10_000, 9_000), f"at most {MAX_PIXELS:,} pixels, got more: 10000x9000"),
        (encoded(Image.fromarray(np.ones((4, 5), np.float32)), "TIFF"), "floating point"),
        (encoded(Image.fromarray(np.full((4, 5), 65_536, np.int32)), "TIFF"), "values of 32 bits"),
        (encoded(Image.fromarray(np.full((4, 5), -1, np.int32)), "TIFF"), "values of 32 bits"),
    ],
    ids=[
        "empty",
        "html",
        "postscript",
        "png",
        "jpeg",
        "altered",
        "bomb",
        "little_bomb",
        "float",
        "int32",
        "negative",
    ],
)
def test_what_is_no_whole_image_is_refused(tmp_path: Path, payload: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(payload)
    with pytest.raises(ImageFileError, match=message) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)


def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    path = tmp_path / "picture.png"
    path.write_bytes(bomb(10_000, 9_000))
    with pytest.raises(ImageFileError, match="pixels"):
        read_image(path)


def test_a_file_that_is_absent_is_no_corrupt_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


def test_as_many_pixels_as_pillow_allows(read, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr("bn_lightning.data.image_file.MAX_PIXELS", 20)
    assert read(encoded(solid("RGB", RED, (5, 4)))).shape == (4, 5, 3)
    with pytest.raises(ImageFileError, match="at most 20 pixels, got more: 7x3"):
        read(encoded(solid("RGB", RED, (7, 3))))
