"""library/sheets.py: contact sheets."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from library.sheets import LARGEST_SHEET, SMALLEST_CELL, _font, _natural_cell, _wrap, contact_sheet

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def image(colour, size=(64, 64), mode="RGB") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def boxes_of(sheet: Image.Image, colour) -> tuple[int, int, int, int]:
    """The box that holds all pixels of this colour."""
    mask = Image.new("L", sheet.size)
    mask.putdata([255 * (pixel == colour) for pixel in sheet.get_flattened_data()])
    return mask.getbbox()


def test_images_stand_in_their_row_and_column_enlarged():
    sheet = contact_sheet([[image(RED), image(GREEN)], [image(BLUE), None]], ["one", "two"], ["left", "right"], title="Title")
    red, green, blue = (boxes_of(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert (red[2] - red[0], red[3] - red[1]) == (SMALLEST_CELL, SMALLEST_CELL)
    assert red[1] == green[1] and red[0] == blue[0]
    assert red[2] < green[0] and red[3] < blue[1]
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    without_text = contact_sheet([[image(RED), image(GREEN)], [image(BLUE), None]], [], [])
    assert without_text.width < sheet.width and without_text.height < sheet.height


def test_labels_and_title_are_drawn():
    dark = lambda sheet: sum(max(pixel) < 120 for pixel in sheet.get_flattened_data())  # noqa: E731
    white = image((255, 255, 255))
    assert dark(contact_sheet([[white]], [], [])) == 0
    for arguments in ((["row"], [], None), ([], ["column"], None), ([], [], "title")):
        assert dark(contact_sheet([[white]], *arguments)) > 20


def test_sizes_keep_their_proportions_and_fit_the_cell():
    sheet = contact_sheet(
        [[image(RED, (100, 50)), image(GREEN, (300, 600)), image(BLUE, (3, 900))]], ["r"], ["a", "b", "c"], cell=120
    )
    for colour, (width, height) in ((RED, (120, 60)), (GREEN, (60, 120)), (BLUE, (1, 120))):
        left, top, right, bottom = boxes_of(sheet, colour)
        assert (right - left, bottom - top) == (width, height)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_of_image(mode):
    assert contact_sheet([[image(RED, mode=mode)]], ["x"], ["y"]).mode == "RGB"


def test_transparency_is_shown_on_white():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    sheet = contact_sheet([[clear]], [], [])
    assert sheet.getpixel((sheet.width // 2, sheet.height // 2)) == (255, 255, 255)


def test_long_labels_wrap_and_end_in_an_ellipsis_and_lose_no_word():
    text = "a photo of a cat sitting on a wooden chair in the warm evening light"
    font = _font(text, 16)
    lines = _wrap(text, 16, 150)
    assert " ".join(lines) == text and all(font.getlength(line) <= 150 for line in lines)
    cut = _wrap(text, 16, 150, max_lines=2)
    assert len(cut) == 2 and cut[-1].endswith("…") and font.getlength(cut[-1]) <= 150
    unbroken = "x" * 200
    assert "".join(_wrap(unbroken, 16, 150)) == unbroken
    assert _wrap("", 16, 150) == [] and _wrap("ab", 16, 1) == ["a", "b"]


@pytest.mark.parametrize("text", ["风景 картина", "🙂 emoji", "half \udce9 a surrogate", "tab\tand\nnewline\x00", "مرحبا", ""])
def test_any_text_draws(text):
    contact_sheet([[image(RED)]], [text], [text], title=text)


@pytest.mark.filterwarnings("error")
def test_without_a_font_for_it_any_text_still_draws_and_nothing_is_reported(monkeypatch, caplog, capfd):
    monkeypatch.setattr("library.sheets.fallback_fonts", lambda size: ())
    texts = ["一只猫坐在窗台上" * 20, "日本語のキャプション", "고양이", "क्षत्रिय", "🐱"]
    contact_sheet([[image(RED)]] * len(texts), texts, [texts[0]], title=texts[0])
    assert not caplog.text and capfd.readouterr() == ("", "")


def test_cyrillic_is_not_drawn_as_boxes_where_a_font_has_it():
    text = "картина"
    font = _font(text, 16)
    if font.getname()[0] == _font("abc", 16).getname()[0]:
        pytest.skip("this machine has no other font")
    assert bytes(font.getmask("к")) != bytes(font.getmask("\uffff"))


def test_nothing_to_show_is_still_an_image_and_ragged_rows_are_filled():
    assert contact_sheet([], [], []).size > (0, 0)
    assert contact_sheet([[None, None]], ["a"], ["b", "c"]).size > (0, 0)
    assert contact_sheet([[image(RED)], [image(RED), image(GREEN)]], [], []).size > (0, 0)


def test_large_sheets_stay_openable():
    big = [[image(RED, (512, 512))] * 20] * 40
    assert (_natural_cell(big, 20) ** 2) * 40 * 21 <= LARGEST_SHEET
    assert _natural_cell(big[:2], 20) == 512


def test_label_counts_must_match():
    with pytest.raises(ValueError, match="2 rows but 1 row labels"):
        contact_sheet([[None], [None]], ["only one"], [])
    with pytest.raises(ValueError, match="2 columns but 1 column labels"):
        contact_sheet([[None, None]], [], ["only one"])


def test_a_word_without_end_takes_no_time_and_no_room():
    started = time.perf_counter()
    sheet = contact_sheet([[image(RED)]], ["x" * 100_000], ["y" * 100_000], title="z" * 100_000)
    assert time.perf_counter() - started < 30 and sheet.width * sheet.height < LARGEST_SHEET
