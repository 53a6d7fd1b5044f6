"""The page of a run in a real browser, from the disk. What it shows is made up here: no run is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsers import COUNT_NAMELESS, assert_fits_and_reads, wait
from made_up_pages import NASTY, write_run_page


@pytest.fixture
def page(tmp_path) -> Path:
    return write_run_page(tmp_path / "a run #1.html", state="finished")


def test_the_chart_zooms_and_the_slider_moves_the_samples(open_page, page):
    window = open_page(page)
    wait(window, "document.querySelectorAll('#chart .trace').length >= 3")
    before = window.execute_script("return document.getElementById('chart').layout.xaxis.range")
    window.execute_script("document.querySelectorAll('#curves .button')[2].click()")
    wait(window, "document.getElementById('chart').layout.xaxis.range[0] >= 179")
    assert before[0] < 2
    window.execute_script("const s = document.getElementById('slider'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert window.execute_script("return document.querySelector('.samples .frame img').src").endswith("sample-0.webp")
    assert "step 0" in window.execute_script("return document.querySelector('.samples .frame img').alt")
    window.execute_script("document.querySelector('.samples .frame').click()")
    assert window.execute_script("return document.querySelector('dialog').open")
    problems = [entry["message"] for entry in window.get_log("browser")]
    assert not problems


def test_the_chart_offers_nothing_that_would_leave_the_machine(open_page, page):
    """plotly's own buttons have one that uploads the chart."""
    window = open_page(page)
    wait(window, "document.querySelector('.modebar-btn')")
    assert window.execute_script("return [...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)") == [
        "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes",
    ]  # fmt: skip
    assert not window.execute_script("return document.getElementById('chart')._context.plotlyServerURL")


def test_texts_of_users_stay_texts(open_page, page):
    window = open_page(page)
    wait(window, "document.querySelector('.js-plotly-plot')")
    assert window.title == "mine"
    assert window.execute_script("return document.querySelectorAll('script[src], #page script, img[onerror]').length") == 1
    assert NASTY in window.execute_script("return document.querySelector('h1').textContent")


@pytest.mark.parametrize("width, dark, language", [(1280, True, "en-US"), (360, False, "zh-CN"), (320, True, "en-US")])
def test_it_fits_reads_and_has_names_for_all(open_page, page, width, dark, language):
    window = open_page(page, width, dark, language)
    wait(window, "document.querySelector('.js-plotly-plot')")
    assert_fits_and_reads(window, "采样图片", language == "zh-CN")
    assert window.execute_script(COUNT_NAMELESS) == 0
    paper = window.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 150) == dark


def test_it_refreshes_itself_and_keeps_the_readers_place(open_page, tmp_path):
    path = write_run_page(tmp_path / "mine.html")
    window = open_page(path)
    window.execute_script(
        "const s = document.getElementById('slider'); s.value = 1; s.dispatchEvent(new Event('input')); window.mark = 1"
    )
    write_run_page(path, step=300, warnings=["new"])
    wait(window, "document.querySelector('.status').textContent.includes('Step 300')")
    assert "new" in window.execute_script("return document.querySelector('.callout').textContent")
    write_run_page(path, step=400, state="finished")
    wait(window, "document.querySelector('.pill').textContent === 'Finished'")
    assert window.execute_script("return window.mark") == 1, "it was not loaded anew"
    assert window.execute_script("return document.getElementById('slider').value") == "1"


def test_the_keyboard_reaches_and_moves_all(open_page, page):
    from selenium.webdriver.common.keys import Keys

    window = open_page(page)
    wait(window, "document.querySelector('.js-plotly-plot')")
    controls = "[...document.querySelectorAll('a, button, input, summary')].filter((one) => one.offsetWidth)"
    count = window.execute_script(f"window.reached = new Set(); return {controls}.length")
    for _ in range(count):
        window.switch_to.active_element.send_keys(Keys.TAB)
        assert window.execute_script(
            "const now = document.activeElement; reached.add(now); return getComputedStyle(now).outlineStyle"
        ) != "none"  # fmt: skip
    missed = f"{controls}.filter((one) => !reached.has(one)).map((one) => one.outerHTML.slice(0, 80))"
    assert not window.execute_script(f"return {missed}")
    window.execute_script("document.getElementById('slider').focus()")
    window.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert window.execute_script("return document.getElementById('slider').getAttribute('aria-valuetext')") == "Step 100"
    window.execute_script("document.querySelector('.samples .frame').focus()")
    window.switch_to.active_element.send_keys(Keys.ENTER)
    wait(window, "document.querySelector('dialog').open")
    window.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(window, "!document.querySelector('dialog').open")


def test_without_the_charts_script_it_says_so_and_shows_numbers(open_page, page):
    write_run_page(page, chart=None, state="finished")
    window = open_page(page)
    assert "pip install plotly" in window.execute_script(
        "return document.querySelector('#curves .callout:not([hidden])').textContent"
    )
    assert window.execute_script(
        "return document.querySelector('#curves details').open && document.querySelectorAll('#curves td').length > 10"
    )
