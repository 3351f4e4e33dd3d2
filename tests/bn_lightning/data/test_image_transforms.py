"""Crops, flips and distortions, against what they are said to do."""

import math
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bn_lightning.data.image_transforms import (
    CenterCrop,
    PadCrop,
    ResizedCrop,
    check_statistics,
    distorted,
    random_part,
)


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(256, size=(height, width, 3), dtype=np.uint8))


TRANSFORMS = [CenterCrop(8), CenterCrop(8, 1.0), ResizedCrop(8, 0.5), PadCrop(8, 0.5)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["centre", "whole", "resized", "pad"])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 300), (300, 1), (7, 9), (40, 30)], ids=str
)
def test_any_image_becomes_a_square(transform, width: int, height: int) -> None:
    for seed in range(5):
        pixels = transform(noise(width, height), Random(seed))
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["centre", "whole", "resized", "pad"])
def test_the_stream_alone_decides(transform) -> None:
    image = noise(40, 30)
    first = transform(image, Random("1 2 3"))
    assert np.array_equal(first, transform(image, Random("1 2 3")))
    others = [transform(image, Random(f"1 2 {index}")) for index in range(4, 9)]
    is_random = not isinstance(transform, CenterCrop)
    assert any(not np.array_equal(first, other) for other in others) == is_random


class TestParts:
    def test_area_and_aspect(self) -> None:
        random = Random(0)
        boxes = np.array([random_part((600, 600), random) for _ in range(2000)])
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (600, 600)).all()
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        area, aspect = width * height / 600**2, width / height
        assert 0.075 < area.min() < 0.1 < 0.9 < area.max() <= 1
        assert 0.74 < aspect.min() < 0.76
        assert 1.32 < aspect.max() < 1.35
        # Uniform in its logarithm: as many lie as stand.
        assert np.mean(aspect > 1) == pytest.approx(0.5, abs=0.05)

    def test_what_is_drawn(self) -> None:
        class Scripted(Random):
            """Notes what is asked for, and answers with the numbers it was given."""

            def __init__(self, *answers: float) -> None:
                self.answers, self.asked = list(answers), []

            def _next(self, *bounds: float) -> Any:
                self.asked.append(bounds)
                return self.answers.pop(0)

            uniform = randint = _next

        # Half of 200 x 100 with an aspect of 1: 100 x 100, at (7, 0).
        random = Scripted(0.5, 0.0, 7, 0)
        assert random_part((200, 100), random) == (7, 0, 107, 100)
        logarithms = (-math.log(4 / 3), math.log(4 / 3))
        np.testing.assert_allclose(random.asked[:2], [(0.08, 1.0), logarithms])
        assert random.asked[2:] == [(0, 100), (0, 0)]
        # An area of 2500 with an aspect of 4: 100 x 25; the whole; then one that is too high, one
        # that is too wide, one without a pixel, and one that fits.
        assert random_part((200, 100), Scripted(0.125, math.log(4), 3, 4)) == (3, 4, 103, 29)
        assert random_part((100, 100), Scripted(1.0, 0.0, 0, 0)) == (0, 0, 100, 100)
        refused = 1.0, 0.0, 0.5, math.log(16), 1e-6, 0.0
        assert random_part((200, 100), Scripted(*refused, 0.5, 0.0, 7, 0)) == (7, 0, 107, 100)
        for flat in (-3.0, 3.0):  # two pixels of area, as 0 x 6 and 6 x 0
            assert random_part((200, 100), Scripted(1e-4, flat, 0.5, 0.0, 7, 0))[0] == 7
        # The tenth try is the last one.
        assert random_part((200, 100), Scripted(*[1e-6, 0.0] * 9, 0.5, 0.0, 7, 0))[0] == 7
        assert random_part((200, 100), Scripted(*[1e-6, 0.0] * 10)) == (33, 0, 166, 100)

    def test_no_part_fits(self) -> None:
        assert random_part((1000, 2), Random(0)) == (498, 0, 501, 2)
        assert random_part((2, 1000), Random(0)) == (0, 498, 2, 501)
        assert random_part((30, 1), Random(0)) == (14, 0, 15, 1)
        assert random_part((1, 300), Random(0)) == (0, 149, 1, 150)


class TestCentre:
    def test_it_is_what_scaling_and_cutting_give(self) -> None:
        size = 64
        ramp = np.linspace(0, 255, 320)[None, :, None] * np.ones((240, 1, 3))
        image = Image.fromarray(ramp.astype(np.uint8))
        shorter = size * 256 // 224
        scaled = image.resize((round(320 / 240 * shorter), shorter), Image.Resampling.BILINEAR)
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        expected = np.asarray(scaled)[top : top + size, left : left + size]
        got = CenterCrop(size)(image, Random(0))
        assert np.abs(got.astype(int) - expected).max() <= 3

    def test_an_image_of_the_size_stays_as_it_is(self) -> None:
        image = noise(32, 32)
        assert np.array_equal(CenterCrop(32, share=1.0)(image, Random(0)), np.asarray(image))

    def test_the_middle_of_each_axis(self) -> None:
        image = noise(8, 4)
        expected = np.asarray(image)[1:3, 3:5]
        assert np.array_equal(CenterCrop(2, share=0.5)(image, Random(0)), expected)
        assert CenterCrop(2).share == 0.875


class TestResizedCrop:
    @pytest.mark.parametrize("photometric", [0, 0.5])
    def test_part_then_flip_then_distortion(self, photometric: float) -> None:
        image = noise(40, 30)
        flips = 0
        for seed in range(20):
            random = Random(seed)
            box = random_part(image.size, random)
            part = image.resize((8, 8), Image.Resampling.BILINEAR, box=box)
            if random.random() < 0.5:
                flips += 1
                part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            expected = np.asarray(distorted(part, photometric, random))
            assert np.array_equal(ResizedCrop(8, photometric)(image, Random(seed)), expected)
        assert 5 <= flips <= 15


class TestPadCrop:
    def test_distortion_comes_last(self) -> None:
        image = noise(32, 32)
        for seed in range(20):
            random = Random(seed)
            window = PadCrop(32, 0)(image, random)
            photometric = 0.5 + 0.5 * (seed % 2)
            expected = distorted(Image.fromarray(window.copy()), photometric, random)
            got = PadCrop(32, photometric)(image, Random(seed))
            assert np.array_equal(got, np.asarray(expected))

    def test_moves_over_black_and_flips(self) -> None:
        image = noise(32, 32)
        pixels = np.asarray(image)
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
        windows = {}
        for top in range(9):
            for left in range(9):
                cut = padded[top : top + 32, left : left + 32]
                windows[cut.tobytes()] = (top, left, False)
                windows[cut[:, ::-1].tobytes()] = (top, left, True)
        seen = set()
        for seed in range(400):
            random = Random(seed)
            drawn = random.randint(0, 8), random.randint(0, 8), random.random() < 0.5
            assert windows[PadCrop(32, 0)(image, Random(seed)).tobytes()] == drawn
            seen.add(drawn)
        assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
        assert 0.4 < np.mean([flipped for _, _, flipped in seen]) < 0.6


class TestDistortion:
    def test_none(self) -> None:
        image = noise(9, 7)
        assert distorted(image, 0, Random(0)) is image

    def test_factors_and_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        for name in ("Brightness", "Contrast", "Color"):
            kind = getattr(ImageEnhance, name)

            def enhance(self, factor: float, name: str = name, whole=ImageEnhance._Enhance.enhance):
                seen.append((name, factor))
                return whole(self, factor)

            monkeypatch.setattr(kind, "enhance", enhance)
        for seed in range(60):
            distorted(noise(5, 5), 0.3, Random(seed))
        factors = [factor for _, factor in seen]
        assert 0.7 <= min(factors) < 0.72
        assert 1.28 < max(factors) <= 1.3
        assert len({tuple(name for name, _ in seen[i : i + 3]) for i in range(0, 180, 3)}) == 6


class TestStatistics:
    def test_right_ones(self) -> None:
        check_statistics([-1, 0, 1.5], (1e-9, 1, 2))

    @pytest.mark.parametrize(
        ("mean", "std"),
        [
            ([0, 0], [1, 1, 1]),
            ([0, 0, 0, 0], [1, 1, 1]),
            ([0, 0, 0], [1, 1]),
            ([0, 0, 0], [1, 1, 1, 1]),
            ([0, 0, 0], [1, 0, 1]),
            ([0, 0, 0], [1, 1, -1]),
            ([0, math.nan, 0], [1, 1, 1]),
            ([0, 0, 0], [1, math.inf, 1]),
        ],
        ids=str,
    )
    def test_wrong_ones(self, mean: list[float], std: list[float]) -> None:
        with pytest.raises(ValueError, match="`mean`.*`std`"):
            check_statistics(mean, std)
