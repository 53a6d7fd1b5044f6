"""The page of --debug_dataset in a real browser, from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsers import COUNT_NAMELESS, Open, assert_fits_and_reads, wait
from made_up_pages import NASTY, write_data_page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_data_page(tmp_path_factory.mktemp("data") / "a page #1.html")


def shown(window) -> list[str]:
    """The files that are listed, in order."""
    return window.execute_script("return [...document.querySelectorAll('.cards .file')].map((one) => one.textContent)")


def choose(window, control: str, value: str) -> None:
    window.execute_script(
        f"const c = document.getElementById('{control}'); c.value = '{value}'; c.dispatchEvent(new Event('change'))"
    )


def test_it_lists_filters_and_sorts(open_page: Open, page):
    window = open_page(page)
    files = [f"{number} #.png" for number in range(6)]
    assert shown(window) == files
    choose(window, "problem", "duplicate")
    assert shown(window) == ["4 #.png", "5 #.png"]
    assert window.execute_script("return document.querySelector('[role=status]').textContent") == "2 of 6 images"
    choose(window, "problem", "any")
    assert shown(window) == [files[number] for number in (0, 1, 2, 4, 5)]  # mask, length, no caption, duplicate
    choose(window, "problem", "")
    choose(window, "order", "tokens")
    assert [shown(window)[0], shown(window)[-1]] == ["2 #.png", "1 #.png"]
    window.execute_script("document.querySelector('.filters .button').click()")
    assert shown(window)[0] == "1 #.png"
    window.execute_script(
        "const s = document.getElementById('search'); s.value = 'CAT asleep 4'; s.dispatchEvent(new Event('input'))"
    )
    assert shown(window) == ["4 #.png"]
    assert not window.get_log("browser")


def test_what_is_cut_off_is_marked_and_other_uses_are_there(open_page: Open, page):
    window = open_page(page)
    card = "[...document.querySelectorAll('.cards figure')][1]"
    assert window.execute_script(f"return {card}.querySelectorAll('details .caption').length") == 2
    marked = window.execute_script(f"return {card}.querySelector('del').lastChild.textContent")
    whole = window.execute_script(f"return {card}.querySelector('.caption').firstChild.textContent") + marked
    assert sorted(whole.split(", ")) == sorted(f"word{number}" for number in range(60)) and 20 < len(marked) < len(whole)
    assert "229 / 75 tokens" in window.execute_script(f"return {card}.querySelector('.tokens').textContent")
    assert "154 tokens are cut off" in window.execute_script(f"return {card}.querySelector('.chips').textContent")


def test_images_and_masks_are_loaded_and_enlarged(open_page: Open, page):
    window = open_page(page)
    wait(window, "[...document.querySelectorAll('.cards img')].every((one) => one.complete && one.naturalWidth)")
    assert window.execute_script("return document.querySelectorAll('.cards .over').length") == 6
    window.execute_script("document.getElementById('masks').click()")
    assert window.execute_script("return getComputedStyle(document.querySelector('.cards .over')).display") == "none"
    window.execute_script("document.querySelector('.cards .frame').click()")
    wait(window, "document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth")
    window.execute_script("document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert "1 #.png" in window.execute_script("return document.querySelector('dialog .about').textContent")
    link = window.execute_script("return document.querySelector('dialog a').href")
    assert link == (page.parent / "images <b>" / "1 #.png").as_uri()


def test_texts_of_users_stay_texts(open_page: Open, page):
    window = open_page(page)
    assert window.title == "a page #1"
    assert window.execute_script("return document.querySelectorAll('script[src], #page script, img[onerror]').length") == 0
    assert window.execute_script("return document.querySelectorAll('.caption')[9].firstChild.textContent") == NASTY


@pytest.mark.parametrize("width, dark, language", [(1280, True, "en-US"), (360, False, "zh-CN"), (320, True, "en-US")])
def test_it_fits_reads_and_has_names_for_all(open_page: Open, page, width, dark, language):
    window = open_page(page, width, dark, language)
    assert_fits_and_reads(window, "值得检查", language == "zh-CN")
    assert window.execute_script(COUNT_NAMELESS) == 0


def test_of_many_images_only_those_near_are_made(open_page: Open, tmp_path):
    window = open_page(write_data_page(tmp_path / "many.html", 400))
    assert 0 < len(shown(window)) < 200
    window.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait(window, f"document.querySelectorAll('.cards .file').length > {len(shown(window))}")
