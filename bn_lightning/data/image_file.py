"""One image file, read whole and believed only when all of it decodes."""

import contextlib
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin

from bn_lightning.data.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What the names of image files end in, in lower case."""

MAX_PIXELS = 89_478_485
"""Pillow's own bound: 256 MiB of RGB."""

# Only formats that are pixels: Pillow would hand others, such as EPS, to programs of the system.
# It has to have imported the less usual ones.
_FORMATS = (
    *("JPEG", "PNG", "BMP", "GIF", "PPM"),
    TiffImagePlugin.TiffImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)


class ImageFileError(DataError):
    """A file that is no image, or not a whole one, or one too large to be decoded."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes an image file to RGB, 8 bits a channel, upright.

    Grey and palette images are spread over the three channels, 16 bits scaled to 8 by 255/65535,
    CMYK and others converted by Pillow without colour profiles. Transparent pixels lie on white.
    EXIF's orientation is applied. Of several frames the first is taken.

    Args:
        path: a file of one of the formats BMP, GIF, JPEG, PNG, PPM, TIFF and WebP; what its name
            ends in does not matter. Its size is looked at before it is decoded.

    Returns:
        An image of mode RGB with at least one pixel and at most `MAX_PIXELS`.

    Raises:
        ImageFileError: naming the file: it is no image, truncated or corrupt, has too many pixels,
            or values that are neither of 8 nor of 16 bits.
        OSError: the file is absent or cannot be read.
    """
    with open(path, "rb") as file:
        payload = file.read()  # here, so that what is raised below is about the content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that nobody asked for
            with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                image.load()
                # The pixels are whole: metadata that is not does not make them worse.
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except Image.UnidentifiedImageError as error:
        raise ImageFileError(
            f"{path}: expected an image (JPEG, PNG, ...), got {_beginning(payload)}; remove the"
            " file or replace it by an image"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageFileError(
            f"{path}: expected at most {MAX_PIXELS:,} pixels, got more: {error}; make the image"
            " smaller or remove it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a file that lies makes them stumble over
        raise ImageFileError(
            f"{path}: expected a whole image, got one that cannot be decoded: {error}; remove the"
            " file or replace it"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values of 32 bits, {values.min()} to {values.max()}")
        image = Image.fromarray(np.rint(values * (255 / 65535)).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("values in floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _beginning(payload: bytes) -> str:
    return (
        f"a file that begins with the bytes {payload[:8].hex(' ')}" if payload else "an empty file"
    )
