"""Random changes: in their limits, and from the generator given."""

from __future__ import annotations

import random

import numpy as np
import pytest

from library.data.augment import COLOUR_PROBABILITY, face_crop, face_of, random_corner, shift_colours


def test_random_corner_reaches_every_place():
    rng = random.Random(0)
    corners = {random_corner((10, 8), (8, 8), rng) for _ in range(100)}
    assert corners == {(0, 0), (1, 0), (2, 0)}


def test_trap_4_10_colours_change_mildly():
    grey = np.full((2, 2, 3), 128, dtype=np.uint8)
    white = np.full((2, 2, 3), 255, dtype=np.uint8)
    rng = random.Random(0)
    greys = [shift_colours(grey, rng).astype(int) for _ in range(1000)]
    assert all(abs(value.mean() / 128 - 1) < 0.04 for value in greys) and any((value != 128).any() for value in greys)
    assert all((shift_colours(white, rng) == 255).all() for _ in range(100))


def test_colours_change_in_a_third_of_the_cases_by_at_most_8_of_180():
    import cv2

    pixels = np.full((1, 1, 3), (200, 60, 40), dtype=np.uint8)
    hue = int(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[0, 0, 0])
    rng = random.Random(1)
    results = [shift_colours(pixels, rng) for _ in range(3000)]
    changed = [result for result in results if (result != pixels).any()]
    assert len(changed) / 3000 == pytest.approx(COLOUR_PROBABILITY, abs=0.04)
    turns = [(int(cv2.cvtColor(result, cv2.COLOR_RGB2HSV)[0, 0, 0]) - hue + 90) % 180 - 90 for result in changed]
    assert max(turns) in (7, 8) and min(turns) in (-7, -8)
    assert {result.dtype for result in changed} == {np.dtype(np.uint8)}


def test_face_names():
    assert face_of("portrait_120_80_60_70") == (120, 80, 60, 70)
    assert face_of("a_b_c_120_80_60_70") == (120, 80, 60, 70)
    for stem in ("120_80_60_70", "portrait_120_80_60", "portrait_120_80_60_x", "portrait_0_80_60_70", "portrait_5_5_0_0"):
        assert face_of(stem) is None


def test_face_crop_of_a_fixed_size_is_centred():
    # Face of 100 px, window of 128 px, factors 2 to 2: the image is shrunk to 128 / (100 * 2).
    resized, corner = face_crop((500, 400, 100, 80), (1000, 800), (128, 128), (2.0, 2.0), False, random.Random(0))
    assert resized == (640, 512) and corner == (320 - 64, 256 - 64)


def test_face_crop_stays_inside_and_in_scale():
    rng = random.Random(3)
    scales = []
    for _ in range(500):
        face = (rng.randint(1, 999), rng.randint(0, 799), rng.randint(5, 300), rng.randint(5, 300))
        resized, corner = face_crop(face, (1000, 800), (128, 192), (2.0, 4.0), rng.random() < 0.5, rng)
        scales.append(resized[0] / 1000)
        assert all(0 <= corner[axis] <= resized[axis] - (128, 192)[axis] for axis in (0, 1))
        low = min(1, max(192 / 800, 128 / (max(face[2:]) * 4)))
        high = min(1, max(low, 128 / (max(face[2:]) * 2)))
        assert low - 0.002 <= scales[-1] <= high + 0.002
    assert len(set(scales)) > 100


def test_face_crop_enlarges_only_what_would_not_cover_the_window():
    resized, corner = face_crop((30, 30, 20, 20), (60, 90), (128, 128), (1.0, 3.0), True, random.Random(0))
    assert resized == (128, 192) and corner[0] == 0 and 0 <= corner[1] <= 64
