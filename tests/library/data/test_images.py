"""Every kind of image file becomes upright RGB pixels, or is named with a reason."""

from __future__ import annotations

import io
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from library.data import images
from library.data.images import (
    FORMATS,
    MAX_PIXELS,
    BadImage,
    decode,
    decode_values,
    decode_with_alpha,
    fit,
    size_of,
    within_memory_limit,
)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 that differs at every pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def test_rgb_comes_through_unchanged():
    pixels = gradient(20, 10)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels))), pixels)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), "BMP")), pixels)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)


def test_16_bit_grey_is_scaled_not_cut_off():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    rgb = decode(encoded(Image.fromarray(values)))
    assert rgb.shape == (1, 6, 3)
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_16_bit_colour():
    import cv2

    values = np.full((2, 3, 3), 32896, dtype=np.uint16)  # 128 * 257
    assert decode(cv2.imencode(".png", values)[1].tobytes()).tolist() == np.full((2, 3, 3), 128).tolist()


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    rgb = decode(encoded(image, "JPEG", quality=95))
    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() <= 6


def test_transparent_parts_are_white_whatever_colour_hides_there():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)])
    assert decode(encoded(image))[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]


def test_grey_with_alpha():
    image = Image.new("LA", (2, 1))
    image.putdata([(7, 255), (7, 0)])
    assert decode(encoded(image))[0].tolist() == [[7, 7, 7], [255, 255, 255]]


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putdata([0, 1])
    assert decode(encoded(image))[0].tolist() == [[200, 100, 50], [1, 2, 3]]
    assert decode(encoded(image, transparency=1))[0].tolist() == [[200, 100, 50], [255, 255, 255]]


def test_one_bit_and_grey():
    assert decode(encoded(Image.new("1", (2, 2), 1))).tolist() == np.full((2, 2, 3), 255).tolist()
    assert decode(encoded(Image.new("L", (1, 1), 77))).tolist() == [[[77, 77, 77]]]


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("TIFF", {})])
def test_of_an_animation_the_first_frame(tmp_path, kind, options):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(content).tolist() == np.broadcast_to([255, 0, 0], (5, 6, 3)).tolist()
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(content)
    assert size_of(path) == (6, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_trap_4_16_exif_rotation_is_applied(tmp_path, orientation, suffix):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16] = 255  # the upper left quarter is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    upright = decode(path.read_bytes())
    # Where row 0 and column 0 of the file belong (EXIF 2.3, tag 274): top-left, top-right, bottom-right, ...
    expected = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    width, height = (32, 16) if orientation < 5 else (16, 32)
    assert size_of(path) == (width, height) == upright.shape[1::-1]
    quarters = upright.reshape(2, height // 2, 2, width // 2, 3).mean(axis=(1, 3, 4))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"lossless": True},
        {"quality": 80},
        {"quality": 80, "icc_profile": b"x" * 10},
        {"quality": 80, "exif": Image.Exif()},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_sizes_from_headers(tmp_path, options, mode):
    path = tmp_path / "a.webp"
    Image.new(mode, (517, 33), "red").save(path, **options)
    assert size_of(path) == (517, 33)


def test_names_with_spaces_and_other_alphabets(tmp_path):
    for name in ("with space.png", "žluťoučký kůň.png", "日本語 写真.png", "🐕.png"):
        path = tmp_path / name
        path.write_bytes(encoded(Image.new("RGB", (4, 3))))
        assert size_of(path) == (4, 3)


def test_what_cannot_be_used_has_a_reason(tmp_path):
    whole = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)))
    for content, reason in [
        (b"", "0 bytes"),
        (b"hello, this is text", "no image"),
        (whole[:12], "no image"),
        (whole[:-400], "cut off or damaged"),
        (whole[: len(whole) // 2], "cut off or damaged"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode(content)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(BadImage, match="0 bytes"):
        size_of(tmp_path / "empty.png")
    with pytest.raises(BadImage):
        size_of(tmp_path / "missing.png")


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "evil.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(BadImage, match="no image"):
        size_of(path)


def test_large_scans_are_no_attack(tmp_path):
    path = tmp_path / "scan.png"
    Image.new("1", (15_000, 13_000)).save(path)  # 195 megapixels: Pillow alone refuses from 179 on
    assert size_of(path) == (15_000, 13_000)
    head = bytearray(path.read_bytes()[:33])
    head[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(head) + path.read_bytes()[33:])
    with pytest.raises(BadImage, match=f"100000 x 100000 pixels, more than {MAX_PIXELS // 1_000_000:,} million"):
        size_of(path)


def test_png_with_a_large_text(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    assert decode(encoded(Image.new("RGB", (2, 2)), pnginfo=info)).shape == (2, 2, 3)


def test_fit_without_resizing_cuts():
    pixels = gradient(40, 30)
    assert np.array_equal(fit(pixels, (40, 30), (5, 2), (32, 24)), pixels[2:26, 5:37])


def test_trap_33_fit_shrinks_by_averaging_areas():
    pixels = gradient(64, 48)
    means = pixels.reshape(24, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(fit(pixels, (32, 24), (0, 0), (32, 24)) - means).max() <= 0.51


def test_fit_enlarges_with_lanczos():
    pixels = gradient(16, 16)
    whole = np.asarray(Image.fromarray(pixels).resize((40, 64), Image.Resampling.LANCZOS))
    cut = fit(pixels, (40, 64), (4, 16), (32, 32))
    assert np.abs(cut.astype(int) - whole[16:48, 4:36]).max() <= 1


@pytest.mark.parametrize("name", [None, "linear", "cubic", "lanczos", "area", "box"])
def test_fine_lines_become_their_mean_where_an_image_shrinks(name):
    """Filters are widened (antialiasing): one that looks at a few pixels gives stripes of black and white."""
    lines = np.zeros((240, 240, 3), dtype=np.uint8)
    lines[::3] = 255
    result = fit(lines, (32, 32), (0, 0), (32, 32), name)[2:-2].astype(int)
    assert abs(result - 85).max() <= 20


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"])
@pytest.mark.parametrize("resized", [(20, 24), (90, 100), (20, 100)])
def test_fit_with_each_interpolation(name, resized):
    flat = np.full((50, 60, 3), 123, dtype=np.uint8)
    result = fit(flat, resized, (2, 3), (16, 16), name)
    assert result.shape == (16, 16, 3) and (result == 123).all()
    slope = fit(gradient(60, 50), resized, (2, 3), (16, 16), name).astype(int)
    assert (np.diff(slope[..., 0].mean(axis=0)) >= 0).all() and slope[:, -1, 0].mean() > slope[:, 0, 0].mean()


def test_fit_of_a_strip_needs_little_memory():
    import tracemalloc

    strip = gradient(1, 5000)
    tracemalloc.start()
    result = fit(strip, (256, 1_280_000), (0, 639_488), (256, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.shape == (1024, 256, 3) and peak < 20_000_000
    assert abs(int(result[512, 0, 1]) - int(strip[2500, 0, 1])) <= 1


def test_fit_outside_of_the_image_is_refused():
    with pytest.raises(ValueError):
        fit(gradient(40, 30), (40, 30), (20, 0), (32, 24))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM"])
def test_a_damaged_file_of_any_kind_is_a_bad_image_and_nothing_else(kind):
    """Seeded: the decoders raise RuntimeError, ZeroDivisionError, struct.error and more for what is broken.

    A small image, so that more of the damage falls into the headers.
    """
    if kind not in FORMATS:
        pytest.skip(f"this Pillow cannot read {kind}")
    whole = encoded(Image.fromarray(gradient(24, 24)), kind)
    dice, refused = random.Random(1), 0
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(dice.choice((1, 2, 4, 16))):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        try:
            decode_with_alpha(bytes(broken[: dice.randrange(1, len(broken))] if dice.random() < 0.2 else broken))
        except BadImage as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode"), ZeroDivisionError(), KeyError(3)])
def test_what_ever_a_decoder_raises_names_the_file_as_bad(monkeypatch, error, tmp_path):
    def broken(*_, **__):
        raise error

    content = encoded(Image.fromarray(gradient(8, 8)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    with pytest.raises(BadImage, match="cut off or damaged"):
        decode(content)
    monkeypatch.setattr(Image, "open", broken)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage):
        size_of(tmp_path / "a.png")


def test_what_is_erased_in_an_image_of_values_is_black():
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[:, 4:] = 255
    values[0, :4, :3] = 200  # of another colour, and erased all the same
    assert decode_values(encoded(Image.fromarray(values)))[:, [0, 7]].tolist() == [[[0] * 3, [255] * 3]] * 8
    opaque = Image.fromarray(gradient(9, 7))
    assert np.array_equal(decode_values(encoded(opaque)), gradient(9, 7))


def test_images_decoded_at_once_are_bounded_by_their_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS_AT_ONCE", 100)
    held, most, lock = [0], [0], threading.Lock()

    def decode_one(size: tuple[int, int]) -> None:
        with within_memory_limit(size):
            with lock:
                held[0] += size[0] * size[1]
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= size[0] * size[1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_one, [(5, 8)] * 20))
        assert most[0] <= 80
        list(pool.map(decode_one, [(30, 30)] * 5))  # larger than the bound: one at a time
    assert most[0] == 900
