"""The page of gen_img's --sheet in a real browser, from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsers import COUNT_NAMELESS, Open, assert_fits_and_reads, wait
from made_up_pages import NASTY, write_comparison_page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_comparison_page(tmp_path_factory.mktemp("sheet") / "sheet_20260101 #1.html")


def test_rows_columns_and_an_image_that_was_not_drawn(open_page: Open, page):
    window = open_page(page)
    assert window.execute_script("return [...document.querySelectorAll('thead th')].map((one) => one.textContent)") == [
        "Prompt", "no network", "my lora x 0.5", "my lora x 1",
    ]  # fmt: skip
    assert window.execute_script("return [...document.querySelectorAll('tbody th')].map((one) => one.textContent)") == [
        "a catseed 1", "a catseed 2", f"{NASTY}seed 1", f"{NASTY}seed 2",
    ]  # fmt: skip
    wait(window, "[...document.querySelectorAll('td img')].filter((one) => one.complete && one.naturalWidth).length === 11")
    assert window.execute_script("return document.querySelector('td .empty').textContent") == "not drawn"
    assert not window.get_log("browser")


def test_pointer_and_keyboard_show_the_settings_of_an_image(open_page: Open, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    window = open_page(page)
    hints = "[...document.querySelectorAll('.hint')].filter((one) => getComputedStyle(one).display !== 'none')"
    seen = f"{hints}.map((one) => one.textContent)"
    ActionChains(window).move_to_element(window.find_elements(By.CSS_SELECTOR, "td .frame")[1]).perform()
    (hint,) = window.execute_script(f"return {seen}")
    assert "a cat" in hint and "seed 1" in hint and "my lora x 0.5" in hint and "blurry" in hint
    ActionChains(window).move_by_offset(0, -400).perform()
    window.execute_script("document.getElementById('size').focus()")
    window.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)
    wait(window, f"{seen}.length === 1")


def test_a_click_enlarges_the_saved_image(open_page: Open, page):
    window = open_page(page)
    window.execute_script("document.querySelectorAll('td .frame')[1].click()")
    wait(window, "document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth === 300")
    assert window.execute_script("return document.querySelector('dialog img').src") == (page.parent / "im #4.png").as_uri()
    assert "my lora x 0.5 · seed 1" in window.execute_script("return document.querySelector('dialog .about').textContent")


@pytest.mark.parametrize("width, dark, language", [(1280, True, "en-US"), (360, False, "zh-CN"), (320, True, "en-US")])
def test_it_fits_reads_and_has_names_for_all(open_page: Open, page, width, dark, language):
    window = open_page(page, width, dark, language)
    assert_fits_and_reads(window, "不使用网络", language == "zh-CN")
    assert window.execute_script(COUNT_NAMELESS) == 0
