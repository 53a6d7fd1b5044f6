"""The three pages in Firefox, from the disk: the other engine shows them whole too. test_*_in_browser.py test what they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsers import Firefox, assert_fits_and_reads, firefox, wait
from made_up_pages import write_comparison_page, write_data_page, write_run_page


@pytest.fixture(scope="module")
def window() -> Iterator[Firefox]:
    with firefox("zh-CN", dark=True) as browser:
        browser.narrow()
        yield browser


def looks_right(window: Firefox, word: str) -> None:
    assert_fits_and_reads(window, word, is_chinese=True)
    paper = window.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, paper[4:-1].split(","))) < 150


def enlarge(window: Firefox, frame: str, condition: str) -> None:
    """Click an image. condition: what then holds of the one in the dialog."""
    window.execute_script(f"document.querySelector('{frame}').click()")
    wait(window, f"document.querySelector('dialog').open && document.querySelector('dialog img').{condition}")


def test_the_run_and_its_refresh(window, tmp_path):
    page = write_run_page(tmp_path / "mine.html")
    window.get(page.as_uri())
    wait(window, "document.querySelectorAll('#chart .trace').length >= 3")
    looks_right(window, "采样图片")
    write_run_page(page, step=400, state="finished")
    wait(window, "document.querySelector('.pill').textContent === '已完成'")


def test_the_dataset(window, tmp_path):
    window.get(write_data_page(tmp_path / "debug_dataset.html").as_uri())
    wait(window, "document.querySelectorAll('.cards figure').length === 6")
    looks_right(window, "值得检查")
    enlarge(window, ".cards .frame", "naturalWidth")


def test_the_sheet(window, tmp_path):
    window.get(write_comparison_page(tmp_path / "sheet.html").as_uri())
    wait(window, "[...document.querySelectorAll('td img')].some((one) => one.naturalWidth)")
    looks_right(window, "不使用网络")
    enlarge(window, "td .frame", "naturalWidth === 300")
