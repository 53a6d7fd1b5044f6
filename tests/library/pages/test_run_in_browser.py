"""The page of a run in a real browser, from the disk. What it shows is made up here: no run is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.pages.chart_script import lay_chart_script
from library.pages.images import lay_image
from library.pages.page import folder_of, write_page

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def run_data(page: Path, **changes) -> dict:
    folder = folder_of(page)
    folder.mkdir(exist_ok=True)
    for step in (0, 100, 200):
        lay_image(Image.new("RGB", (64, 64), (step, 90, 200)), folder / f"sample-{step}.webp", 640)
    steps = list(range(1, 201))
    losses = [0.3 - step / 1000 for step in steps]
    prompt = {"text": NASTY, "negative": "", "size": [64, 64], "seed": 1, "steps": 8, "scale": 4.0, "sampler": "ddim"}
    images = {step: {0: [f"{folder.name}/sample-{step}.webp", f"sample/{step}.png"]} for step in (0, 100, 200)}
    example = {"src": f"{folder.name}/sample-0.webp", "caption": NASTY, "file": "a b#.png", "size": [64, 64]}
    dataset = {"number": 1, "size": [64, 64], "batch": 1, "images": 8, "reg": 0, "held_out": 0, "buckets": [[64, 64, 8, 8]],
               "subsets": [{"folder": NASTY, "images": 8, "repeats": 1, "reg": False}]}  # fmt: skip
    return {
        "name": NASTY, "lora": "mine.safetensors", "model": "base", "model_title": "SD 1.x", "base": "base",
        "network": "networks.lora",
        "trigger": "", "began": 0, "chart": lay_chart_script(folder), "secrets": [], "command": f"train {NASTY}",
        "data": {"datasets": [dataset], "tags": [[NASTY, 3]], "examples": [example],
                 "tokens": {"limit": 75, "counted": 8, "images": 8, "longest": 9, "cut": 0, "ranges": [[0, 4, 2], [5, 9, 6]]}},
        "settings": [{"group": "g", "name": "training_comment", "value": NASTY, "default": "", "help": "text"}],
        "step": 200, "steps": 400, "epoch": 1, "epochs": 2, "speed": 0.5, "left": 100.0, "seconds": 100.0, "average": 0.2,
        "skipped": 0, "memory": None, "best": [200, 0.2], "validation": [[100, 0.25], [200, 0.2]], "raw": [steps, losses],
        "mean": [steps, losses], "batches": 200, "smoothing": 20, "parts": [],
        "rates": [{"names": ["unet"], "curve": [[1, 200], [0.001, 0.0]]}], "state": "running", "reason": "", "every": 0.3,
        "written": 4102444800000, "warnings": [NASTY], "samples": {"prompts": [prompt], "steps": [0, 100, 200], "images": images},
        "files": [{"name": "mine-best.safetensors", "step": 200, "bytes": 1000, "loss": 0.2, "best": True}], **changes,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "a run #1.html"
    write_page(path, "run", "mine", run_data(path, state="finished"))
    return path


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
    problems = [entry["message"] for entry in window.get_log("browser") if "plotly.min.js" not in entry["message"]]
    assert not problems


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
    assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert window.execute_script("return document.documentElement.lang") == ("zh-Hans" if language == "zh-CN" else "en")
    assert ("采样图片" in window.execute_script("return document.getElementById('page').textContent")) == (language == "zh-CN")
    nameless = """return [...document.querySelectorAll('button, a, input, select')].filter(
        (one) => !one.textContent.trim() && !one.getAttribute('aria-label') && !(one.labels || []).length
        && !one.querySelector('img[alt]:not([alt=""])')
    ).length + [...document.querySelectorAll('img:not([alt])')].length"""
    assert window.execute_script(nameless) == 0
    paper = window.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 150) == dark


def test_it_refreshes_itself_and_keeps_the_readers_place(open_page, tmp_path):
    path = tmp_path / "mine.html"
    write_page(path, "run", "mine", run_data(path))
    window = open_page(path)
    window.execute_script(
        "const s = document.getElementById('slider'); s.value = 1; s.dispatchEvent(new Event('input')); window.mark = 1"
    )
    write_page(path, "run", "mine", run_data(path, step=300, warnings=["new"]))
    wait(window, "document.querySelector('.status').textContent.includes('Step 300')")
    assert "new" in window.execute_script("return document.querySelector('.callout').textContent")
    write_page(path, "run", "mine", run_data(path, step=400, state="finished"))
    wait(window, "document.querySelector('.pill').textContent === 'Finished'")
    assert window.execute_script("return window.mark") == 1, "it was not loaded anew"
    assert window.execute_script("return document.getElementById('slider').value") == "1"


def test_without_the_charts_script_it_says_so_and_shows_numbers(open_page, page):
    write_page(page, "run", "mine", run_data(page, chart=None, state="finished"))
    window = open_page(page)
    assert "pip install plotly" in window.execute_script(
        "return document.querySelector('#curves .callout:not([hidden])').textContent"
    )
    assert window.execute_script(
        "return document.querySelector('#curves details').open && document.querySelectorAll('#curves td').length > 10"
    )


def wait(window, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(window, 15, 0.05).until(lambda _: window.execute_script(f"return !!({condition})"))
