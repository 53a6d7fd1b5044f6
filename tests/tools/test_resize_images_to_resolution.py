"""resize_images_to_resolution: sizes, names, what is kept, and bad files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.smaller_copies import FILTERS, new_size
from library.errors import RunFailed, UserError
from tools import resize_images_to_resolution
from tools.resize_images_to_resolution import main

ROOT = Path(__file__).parents[2]


def make_image(path: Path, size=(64, 32), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.zeros((height, width, len(mode)), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    if mode == "RGBA":
        pixels[..., 3] = 255
        pixels[:, : width // 2] = (0, 255, 0, 0)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "src", tmp_path / "dst"


def run(folders, *words, resolutions="16x16,8x8"):
    main([str(folders[0]), str(folders[1]), "--max_resolution", resolutions, *words])
    return sorted(str(path.relative_to(folders[1]).as_posix()) for path in folders[1].rglob("*") if path.is_file())


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    "size, resolution, expected",
    [
        ((1024, 512), (512, 512), (724, 362)),
        ((512, 1024), (512, 512), (362, 724)),
        ((1024, 1024), (384, 384), (384, 384)),
        ((3000, 2000), (256, 256), (313, 209)),
        ((100, 100), (512, 512), (100, 100)),
        ((10000, 1), (10, 10), (1000, 1)),
    ],
)
def test_sizes(size, resolution, expected):
    assert new_size(size, resolution) == expected


def test_trap_7_1_width_stays_width(folders):
    make_image(folders[0] / "a.png", (64, 32))
    run(folders)
    assert size_of(folders[1] / "a+16x16.jpg") == (22, 11)


@pytest.mark.parametrize("interpolation", ["area", "cubic", "lanczos4"])
def test_trap_7_2_every_interpolation_is_its_own(folders, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    folders[0].mkdir()
    Image.fromarray(noise).save(folders[0] / "a.png")
    run(folders, "--interpolation", interpolation, "--save_as_png")
    filters = {"area": Image.Resampling.BOX, "cubic": Image.Resampling.BICUBIC, "lanczos4": Image.Resampling.LANCZOS}
    found = np.asarray(Image.open(folders[1] / "a+16x16.png")).astype(int)
    errors = {name: np.abs(found - np.asarray(Image.fromarray(noise).resize((16, 16), f))).max() for name, f in filters.items()}
    assert errors[interpolation] <= 1 and min(errors, key=errors.get) == interpolation


def test_trap_7_3_each_resolution_is_made_from_the_original(folders):
    make_image(folders[0] / "a.png", (90, 61))
    run(folders, "--save_as_png", resolutions="40x40,13x13")
    both = (folders[1] / "a+13x13.png").read_bytes()
    main([str(folders[0]), str(folders[1].with_name("alone")), "--max_resolution", "13x13", "--save_as_png"])
    assert (folders[1].with_name("alone") / "a+13x13.png").read_bytes() == both


def test_trap_7_4_originals_are_copied_unchanged(folders):
    source = make_image(folders[0] / "a.png")
    assert run(folders) == ["a+16x16.jpg", "a+8x8.jpg", "a.png"]
    assert (folders[1] / "a.png").read_bytes() == source.read_bytes()


def test_trap_7_5_associated_files_with_a_relative_folder(folders, monkeypatch):
    make_image(folders[0] / "a.png")
    (folders[0] / "a.txt").write_text("caption", encoding="utf-8")
    (folders[0] / "other.txt").write_text("x", encoding="utf-8")
    monkeypatch.chdir(folders[0].parent)
    main(["src", "dst", "--max_resolution", "16x16", "--copy_associated_files"])
    names = sorted(path.name for path in folders[1].iterdir())
    assert names == ["a+16x16.jpg", "a+16x16.txt", "a.png", "a.txt", "other.txt"]


def test_trap_7_6_upper_case_suffixes_are_images(folders):
    make_image(folders[0] / "A.PNG")
    make_image(folders[0] / "b.JPeG", format="JPEG")
    assert run(folders) == ["A+16x16.jpg", "A+8x8.jpg", "A.PNG", "b+16x16.jpg", "b+8x8.jpg", "b.JPeG"]


def test_images_of_all_kinds_that_training_reads_are_resized_and_others_are_named(folders, capsys):
    make_image(folders[0] / "a.gif")
    make_image(folders[0] / "b.tiff")
    (folders[0] / "c.heic").write_bytes(b"x")
    with pytest.raises(RunFailed, match="1 image could not be used"):
        run(folders, resolutions="16x16")
    assert "c.heic: images of this kind are not read; it is copied as it is" in capsys.readouterr().err
    names = sorted(path.name for path in folders[1].iterdir())
    assert names == ["a+16x16.jpg", "a.gif", "b+16x16.jpg", "b.tiff", "c.heic"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_is_full_leaves_no_half_of_a_file(folders, capsys, monkeypatch):
    import resource

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep the half of what it compiles

    make_image(folders[0] / "a.png", (300, 300))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(RunFailed, match="1 image could not be used"):
            run(folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err and not list(folders[1].iterdir())


def test_subfolders_names_of_all_languages_and_small_images(folders):
    make_image(folders[0] / "猫" / "ñ 1.png", (4, 3))
    assert run(folders) == ["猫/ñ 1+16x16.jpg", "猫/ñ 1+8x8.jpg", "猫/ñ 1.png"]
    assert size_of(folders[1] / "猫" / "ñ 1+8x8.jpg") == (4, 3)  # never enlarged


def test_the_target_may_lie_in_the_source(folders):
    make_image(folders[0] / "a.png")
    inside = (folders[0], folders[0] / "out")
    assert run(inside) == run(inside) == ["a+16x16.jpg", "a+8x8.jpg", "a.png"]


def test_divisible_by_cuts_the_middle(folders):
    make_image(folders[0] / "a.png", (21, 13))
    run(folders, "--divisible_by", "8", "--save_as_png", resolutions="99x99")
    copy = np.asarray(Image.open(folders[1] / "a+99x99.png"))
    original = np.asarray(Image.open(folders[0] / "a.png"))
    assert np.array_equal(copy, original[2:10, 2:18])


def test_exif_orientation(folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    make_image(folders[0] / "a.jpg", (64, 32), exif=exif, quality=95)
    run(folders)
    assert size_of(folders[1] / "a+16x16.jpg") == (11, 22)


def test_transparency(folders):
    make_image(folders[0] / "a.png", (64, 32), "RGBA")
    run(folders, resolutions="16x16")
    white = np.asarray(Image.open(folders[1] / "a+16x16.jpg").convert("RGB"))[:, 3]
    assert white.min() > 240  # on white in a JPEG
    run(folders, "--save_as_png", resolutions="16x16")
    copy = Image.open(folders[1] / "a+16x16.png")
    assert copy.mode == "RGBA" and copy.getpixel((2, 5))[3] == 0
    visible = np.asarray(copy)
    edge = visible[:, 11]  # half of these pixels' area was transparent green
    assert edge[5, 3] in range(1, 256) and edge[:, 0].min() > 100  # red of the visible half, not darkened by the other


def test_sixteen_bits_are_scaled(folders):
    folders[0].mkdir()
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(folders[0] / "a.png")
    run(folders, "--save_as_png")
    assert np.asarray(Image.open(folders[1] / "a+16x16.png")).reshape(-1)[0] == 128


def test_jpeg_quality_is_100(folders):
    make_image(folders[0] / "a.png")
    run(folders)
    with Image.open(folders[1] / "a+16x16.jpg") as image:
        assert max(image.quantization[0]) == 1


def test_a_bad_file_is_named_and_the_rest_go_on(folders, capsys):
    make_image(folders[0] / "good.png")
    (folders[0] / "bad.png").write_bytes(b"no image")
    (folders[0] / "cut.png").write_bytes((folders[0] / "good.png").read_bytes()[:80])
    (folders[0] / "empty.jpg").write_bytes(b"")
    with pytest.raises(RunFailed, match="3 images could not be used") as caught:
        run(folders)
    assert caught.value.exit_code == 1 and (folders[1] / "good+8x8.jpg").exists()
    err = capsys.readouterr().err
    assert all(name in err for name in ("bad.png", "cut.png", "empty.jpg"))
    assert not [path for path in folders[1].iterdir() if path.name.startswith(".")]


def test_wrong_input(folders):
    make_image(folders[0] / "a.png")
    for words, message in {
        ("--divisible_by", "0"): "at least 1",
        ("--interpolation", "lanczos5"): "invalid choice",
        ("--save_as_pgn",): "did you mean '--save_as_png'",
    }.items():
        with pytest.raises(UserError, match=message):
            run(folders, *words)
    with pytest.raises(UserError, match="as in 512x512"):
        run(folders, resolutions="512")
    with pytest.raises(UserError, match="the source folder"):
        run((folders[0], folders[0]))
    with pytest.raises(UserError, match="there is no folder"):
        run((folders[0] / "none", folders[1]))
    make_image(folders[0] / "A.jpg")
    with pytest.raises(UserError, match="one name"):
        run(folders)


def test_as_a_script(folders):
    make_image(folders[0] / "a.png")
    (folders[0] / "b.png").write_bytes(b"")
    command = [sys.executable, str(ROOT / "tools" / "resize_images_to_resolution.py"), "src", "dst"]
    result = subprocess.run(command, cwd=folders[0].parent, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "error: 1 image could not be used" in result.stderr
    assert (folders[1] / "a+128x128.jpg").exists()


def test_every_interpolation_that_can_be_chosen_has_a_filter():
    assert ("area", *FILTERS) == resize_images_to_resolution.FILTERS


def test_the_images_are_resized_without_torch():
    """Importing it would take longer than a hundred images."""
    code = "import sys, library.data.smaller_copies; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
