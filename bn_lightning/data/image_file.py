"""Decoding one image file."""

import contextlib
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin

from bn_lightning.data.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Lower-case suffixes of image files."""

MAX_PIXELS = 89_478_485
"""Pillow's own limit: 256 MiB of RGB."""

# Pixel formats only: Pillow runs system programs for others, such as EPS. TIFF and WebP need an
# import of their plugins.
_FORMATS = (
    *("JPEG", "PNG", "BMP", "GIF", "PPM"),
    TiffImagePlugin.TiffImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)


class ImageFileError(DataError):
    """A file that is not an image, incomplete, or too large."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB, 8 bits per channel, upright.

    Gray and palette images get three channels, 16 bits are scaled to 8 by 255/65535, and Pillow
    converts CMYK and others without color profiles. Transparent pixels are blended with white. The
    EXIF orientation is applied. Only the first of several frames is read.

    Args:
        path: a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file with any suffix. Its size is checked
            before it is decoded.

    Returns:
        An image of mode RGB with at least one pixel and at most `MAX_PIXELS`.

    Raises:
        ImageFileError: the file is not an image, truncated or corrupt, has too many pixels, or has
            neither 8 nor 16 bits per value.
        OSError: the file is absent or cannot be read.
    """
    with open(path, "rb") as file:
        payload = file.read()  # so that the errors below are about the content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata
            with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                image.load()
                # The pixels are complete even if the metadata are not.
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except Image.UnidentifiedImageError as error:
        beginning = f"the first bytes {payload[:8].hex(' ')}" if payload else "an empty file"
        raise ImageFileError(
            f"{path}: expected an image (JPEG, PNG, ...), got {beginning}; remove or"
            " replace the file"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageFileError(
            f"{path}: expected at most {MAX_PIXELS:,} pixels, got more: {error}; scale or"
            " remove the image"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types for corrupt files
        raise ImageFileError(
            f"{path}: expected a whole image, got one that cannot be decoded: {error}; remove or"
            " replace the file"
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
