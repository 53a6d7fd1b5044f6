"""Colour profiles: what is trained is what a viewer shows."""

from __future__ import annotations

import hashlib
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data.cache import latent_key
from library.data.images import decode, decode_with_alpha
from library.data.pixels import ImageCrop

P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2)
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2)
PROPHOTO = ((0.79767, 0.28804, 0), (0.13519, 0.71187, 0), (0.03135, 0.00009, 0.82491), 1.8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SEEN = (220, 60, 40)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(red, green, blue, gamma: float) -> bytes:
    """A matrix profile, version 2 (ICC.1:2001-04); for a grey one give no colours."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)

    def xyz(value) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, value))

    tags = [(b"desc", desc), (b"cprt", b"text\0\0\0\0none\0"), (b"wtpt", xyz((0.9642, 1, 0.8249)))]
    if red is None:
        tags.append((b"kTRC", curve))
    else:
        tags += [(b"rXYZ", xyz(red)), (b"gXYZ", xyz(green)), (b"bXYZ", xyz(blue))]
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags:
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    space = b"GRAY" if red is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", 128 + len(table + data), bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp"
    return head + bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249) + bytes(48) + table + data


def stored(icc: bytes | None, mode: str = "RGB", kind: str = "PNG", seen=SEEN) -> bytes:
    """A file of one colour, which a viewer shows as `seen`."""
    image = Image.new("RGB", (8, 8), seen)
    if icc and mode in ("RGB", "RGBA"):
        there = ImageCms.buildTransform(SRGB, ImageCms.ImageCmsProfile(io.BytesIO(icc)), "RGB", "RGB")
        image = ImageCms.applyTransform(image, there)
    file = io.BytesIO()
    image.convert(mode).save(file, kind, icc_profile=icc, lossless=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("space", [P3, ADOBE, PROPHOTO], ids=["p3", "adobe", "prophoto"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_that_a_viewer_shows(space, kind, mode):
    pixels, alpha = decode_with_alpha(stored(profile(*space), mode, kind))
    assert np.abs(pixels.astype(int) - SEEN).max() <= 3
    assert (alpha is None) == (mode == "RGB" or kind == "WEBP")  # which leaves out alpha that says nothing


def test_srgb_profiles_change_nothing():
    plain = decode(stored(None))
    assert (decode(stored(SRGB.tobytes())) == plain).all() and plain[0, 0].tolist() == list(SEEN)


def test_a_grey_profile_counts_for_grey_images():
    icc = profile(None, None, None, 1.0)  # linear light: 55 of 255 is a middle grey
    file = io.BytesIO()
    Image.new("L", (8, 8), 55).save(file, "PNG", icc_profile=icc)
    assert abs(int(decode(file.getvalue())[0, 0, 0]) - 128) <= 2


@pytest.mark.parametrize(
    "icc, mode", [(b"no profile at all", "RGB"), (profile(*P3)[:200], "RGB"), (profile(None, None, None, 1.0), "RGB")]
)
def test_a_profile_that_cannot_be_used_is_reported_once(icc, mode, caplog):
    file = io.BytesIO()
    Image.new(mode, (8, 8), SEEN).save(file, "PNG", icc_profile=icc)
    for _ in range(2):
        assert decode(file.getvalue(), f"{len(icc)}.png")[0, 0].tolist() == list(SEEN)
    assert caplog.text.count(f"{len(icc)}.png: its colour profile is not used") == 1


def test_cached_latents_of_other_profiles_are_made_again_and_no_others():
    crop = ImageCrop(path=None, original_size=(8, 8), resized=(8, 8), corner=(0, 0), size=(8, 8), interpolation=None)
    erased, plain = stored(None, "RGBA"), stored(None)
    parts = {"version": 1, "content": hashlib.sha256(plain).hexdigest(), "cut": [(8, 8), (0, 0), (8, 8), None], "vae": "vae"}
    assert latent_key(plain, crop, "vae") == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    p3 = stored(profile(*P3))
    parts["content"] = hashlib.sha256(p3).hexdigest()
    assert latent_key(p3, crop, "vae") != hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    assert latent_key(plain, crop, "vae", mask=plain) != latent_key(plain, crop, "vae", mask=erased)
