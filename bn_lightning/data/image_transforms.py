"""Crops, flips and color changes of images, with Pillow."""

import math
from collections.abc import Sequence
from random import Random
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

# Inception's crops: Szegedy et al. 2014, section 6.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10

# Krizhevsky et al. 2012, section 4.1: 224 pixels of a shorter side scaled to 256.
_CENTER_SHARE = 224 / 256

# He et al. 2015, section 4.2: 4 pixels for an image of 32.
_PAD = 4 / 32

_DISTORTIONS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

Pixels = UInt8[np.ndarray, "S S 3"]


class ImageTransform(Protocol):
    """Turns any image into the pixels of a square one.

    Attributes:
        size: side of the square, pixels.
    """

    size: int

    def __call__(self, image: Image.Image, random: Random) -> Pixels: ...


class CenterCrop:
    """The central square of an image, scaled to `size`, without randomness.

    Args:
        size: side of the result, pixels.
        share: side of the square relative to the shorter side, in (0, 1]. The default 224/256 is
            equivalent to scaling the shorter side to 256/224 `size` and cropping `size`.
    """

    def __init__(self, size: int, share: float = _CENTER_SHARE) -> None:
        self.size, self.share = size, share

    def __call__(self, image: Image.Image, random: Random) -> Pixels:
        side = self.share * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return np.asarray(_scaled(image, self.size, (left, top, left + side, top + side)))


class ResizedCrop:
    """A random part of an image, scaled to `size`, flipped with probability 1/2, and distorted.

    The part has 8% to 100% of the area and an aspect ratio from 3/4 to 4/3 with uniform logarithm.
    Then brightness, contrast and color change in random order, each by a factor uniform in
    [1 - photometric, 1 + photometric].

    Args:
        size: side of the result, pixels.
        photometric: strength of the distortion, in [0, 1]; 0.5 is Howard's, without his lighting
            noise.

    Source: C. Szegedy et al., "Going deeper with convolutions", 2014, arXiv 1409.4842, section 6;
    A. G. Howard, "Some improvements on deep convolutional neural network based image
    classification", 2013, arXiv 1312.5402, section 2.
    """

    def __init__(self, size: int, photometric: float) -> None:
        self.size, self.photometric = size, photometric

    def __call__(self, image: Image.Image, random: Random) -> Pixels:
        part = _scaled(image, self.size, random_part(image.size, random))
        if random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(distorted(part, self.photometric, random))


class PadCrop:
    """The central square of an image, shifted by up to `size` / 8, flipped and distorted.

    For `size` 32, it is scaled to 32x32, padded to 40x40 with black, and cropped to 32x32. The
    probability of a flip is 1/2.

    Args:
        size: side of the result, pixels.
        photometric: strength of the distortion, in [0, 1]; see `ResizedCrop`.

    Source: K. He et al., "Deep residual learning for image recognition", 2015, arXiv 1512.03385,
    section 4.2.
    """

    def __init__(self, size: int, photometric: float) -> None:
        self.size, self.photometric = size, photometric
        self._whole = CenterCrop(size, share=1.0)

    def __call__(self, image: Image.Image, random: Random) -> Pixels:
        pad = round(self.size * _PAD)
        padded = np.pad(self._whole(image, random), ((pad, pad), (pad, pad), (0, 0)))
        top, left = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
        pixels = padded[top : top + self.size, left : left + self.size]
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        if self.photometric == 0:
            return pixels
        return np.asarray(distorted(Image.fromarray(pixels.copy()), self.photometric, random))


def distorted(image: Image.Image, strength: float, random: Random) -> Image.Image:
    """Change brightness, contrast and color in random order, each by a random factor.

    Args:
        image: of mode RGB.
        strength: the factors are uniform in [1 - strength, 1 + strength]; 0 changes nothing.
        random: generator of the order and the factors.
    """
    if strength == 0:
        return image
    for kind in random.sample(_DISTORTIONS, len(_DISTORTIONS)):
        image = kind(image).enhance(random.uniform(1 - strength, 1 + strength))
    return image


def random_part(size: tuple[int, int], random: Random) -> tuple[float, float, float, float]:
    """Return a random box (left, top, right, bottom), pixels, for `ResizedCrop`.

    Args:
        size: width and height of the image, pixels.
        random: generator of the box.
    """
    width, height = size
    for _ in range(_TRIES):
        area = random.uniform(*_AREA) * width * height
        aspect = math.exp(random.uniform(*_LOG_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return (left, top, left + w, top + h)
    # Too long an image for any such part: its center, with the nearest possible aspect ratio.
    w = min(width, round(height * _ASPECT[1]))
    h = min(height, round(width / _ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h)


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise a ValueError unless `mean` is three finite numbers and `std` three positive ones."""
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != 3 or len(std) != 3 or not finite or min(std) <= 0:
        raise ValueError(
            "expected `mean` to be three numbers and `std` three positive ones, got"
            f" {list(mean)} and {list(std)}"
        )


def _scaled(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Image.Image:
    # Pillow's bilinear filter widens with the scale, which prevents aliasing.
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
